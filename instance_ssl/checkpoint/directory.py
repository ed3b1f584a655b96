"""Writes checkpoint directories, all ranks together, so that a directory appears only when it is whole.

Each rank writes its files into one temporary directory, in a thread of its own, and hashes them on the way. Once all
ranks have succeeded, rank 0 writes MANIFEST.json (size and SHA-256 of every file) and renames the directory: that is
the commit. Readers take the newest directory that matches its manifest; damage is found before anything is loaded. The
hashes guard against accidents, not against someone who can rewrite them; but no file of a checkpoint can execute code
either way (`read_tensors`).
"""

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from instance_ssl.checkpoint.committed import (
    MANIFEST,
    FileRecord,
    checksum,
    committed_directories,
    seems_whole,
    step_of,
)
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError, in_one_line
from instance_ssl.files.atomic import saved_file, sync_directory
from instance_ssl.files.disk_space import find_no_space, why_not_written
from instance_ssl.files.hashing import HashingFile

_REMOVED = ".removed-"
_TEMPORARY = ".writing-"
# A file's content: tensors and plain values for `torch.save`, or text.
Content = dict[str, Any] | str


class DirectoryWriter:
    """Writes one directory after another below `parent`, in the background.

    Args:
        world: all ranks; each calls `start` and `commit`, in the same order.
        keep: number of newest directories that a commit leaves.
        is_permanent: step → whether its directory is never removed.
    """

    def __init__(self, parent: Path, world: Group, *, keep: int, is_permanent: Callable[[int], bool]) -> None:
        self.parent = parent
        self._world = world
        self._keep, self._is_permanent = keep, is_permanent
        self._thread: threading.Thread | None = None
        self._final = self._temporary = parent  # where the directory appears, and where it is written
        self._needed = 0
        self._records: dict[str, FileRecord] = {}
        self._problem: str | None = None

    @property
    def is_busy(self) -> bool:
        """Between `start` and `commit`, on all ranks alike."""
        return self._thread is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files are still being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self, step: int, files: Mapping[str, Content], find_problem: Callable[[], str | None] = lambda: None
    ) -> None:
        """Starts to write this rank's files of `parent`/step_…; the caller must not change their content. Collective.

        Nothing is written where the disk has no room for the files of all ranks. `find_problem` runs in the background
        as well; it returns why the files must not be committed, or None.
        """
        assert not self.is_busy
        self._final = self.parent / f"step_{step:09d}"
        self._temporary = self.parent / f"{_TEMPORARY}{self._final.name}"
        self._records, self._problem = {}, None
        self._needed = sum(self._world.all_gather_objects(sum(map(content_bytes, files.values()))))
        self._thread = threading.Thread(target=self._write, args=(files, find_problem), name="checkpoint")
        self._thread.start()

    def commit(self) -> Path:
        """Waits for every rank's files and makes the directory appear.

        Raises:
            UserError: a rank could not write; the new directory is removed and older ones stay.
        """
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        results = self._world.all_gather_objects((self._records, self._problem))
        problem = next((text for _, text in results if text is not None), None)
        if self._world.rank == 0 and problem is None:
            problem = self._publish({name: record for records, _ in results for name, record in records.items()})
        problem = self._world.broadcast_object(problem)
        if problem is not None:
            if self._world.rank == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise UserError(
                f"checkpoint {self._final} could not be written ({problem}); older checkpoints are untouched"
            )
        return self._final

    def _write(self, files: Mapping[str, Content], find_problem: Callable[[], str | None]) -> None:
        try:
            self._problem = find_problem()
            if self._problem is None and not self._temporary.exists():  # else other ranks' files take part of the room
                self._problem = find_no_space(self.parent, self._needed)
            if self._problem is not None:
                return
            self._temporary.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                self._records[name] = write_file(self._temporary / name, content)
        except Exception as error:  # whatever it is: an incomplete directory must not be committed
            self._problem = f"rank {self._world.rank}: {why_not_written(error, self.parent, self._needed)}"

    def _publish(self, records: dict[str, FileRecord]) -> str | None:
        """Manifest, rename, retention; returns what went wrong, if anything."""
        try:
            write_file(self._temporary / MANIFEST, _manifest_text(records))
            sync_directory(self._temporary)
            if self._final.exists():  # it is damaged, or the run would have resumed from it
                remove_directory(self._final)
            self._temporary.rename(self._final)
            sync_directory(self.parent)
        except OSError as error:
            return f"rank 0: {why_not_written(error, self.parent, self._needed)}"
        retain(self.parent, self._keep, self._is_permanent)
        return None


def content_bytes(content: Any) -> int:
    """Bytes that a file of such content takes, without the format's overhead."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict | list | tuple):
        return sum(map(content_bytes, content.values() if isinstance(content, dict) else content))
    return len(content) if isinstance(content, str) else 8


def write_file(path: Path, content: Content) -> FileRecord:
    """Writes a file, syncs it, and returns its size and hash; raises OSError where it cannot be written."""
    with path.open("wb") as file:
        hashing = HashingFile(file)
        if isinstance(content, str):
            hashing.write(content.encode())
        else:
            # Without torch's own checksums, which would take half as long again as SHA-256 does.
            before = torch.serialization.get_crc32_options()
            torch.serialization.set_crc32_options(False)
            try:
                torch.save(content, cast(BinaryIO, hashing))
            except RuntimeError as error:  # names a line of torch's C++ code
                raise hashing.error or error from None
            finally:
                torch.serialization.set_crc32_options(before)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(hashing.size, hashing.digest.hexdigest())


def replace_file(path: Path, content: Content) -> None:
    """Writes a file whole or not at all; raises as `saved_file`."""
    with saved_file(path, content_bytes(content)) as temporary:
        write_file(temporary, content)


def read_tensors(path: Path, *, mapped: bool = True) -> dict[str, Any]:
    """Reads a file of tensors onto the CPU, memory-mapped: a slice costs only what it holds.

    Only tensors and plain containers are ever built; a file that asks for more is refused before it can run code.

    Args:
        mapped: False also reads files of torch before 1.6, as some published weights are.

    Raises:
        UserError: the file cannot be read, or holds more than tensors.
    """
    try:
        if mapped:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            with path.open("rb") as file:  # given a path, torch decides by its suffix
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise almost anything
        why = "it holds more than tensors" if isinstance(error, pickle.UnpicklingError) else in_one_line(error)
        raise UserError(f"{path} cannot be loaded: {why}; nothing in it was run, give an intact one") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be loaded: it holds a {type(content).__name__}, not named tensors")
    return content


def retain(parent: Path, keep: int, is_permanent: Callable[[int], bool]) -> None:
    """Removes all directories but the newest `keep` intact ones and the permanent ones.

    Damaged directories are neither counted nor removed. Damage is judged by file size: hashing all would take longer
    than the save.
    """
    for directory in [path for path in committed_directories(parent) if seems_whole(path)][keep:]:
        if not is_permanent(step_of(directory)):
            remove_directory(directory)


def remove_directory(directory: Path) -> None:
    """Removes a committed directory; an interruption leaves none that readers would take."""
    hidden = directory.with_name(_REMOVED + directory.name)
    shutil.rmtree(hidden, ignore_errors=True)
    directory.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clear_leftovers(parent: Path) -> None:
    """Removes what interrupted saves and removals have left. Only for the run that holds the lock."""
    for pattern in (_TEMPORARY, _REMOVED):
        for directory in parent.glob(pattern + "*"):
            shutil.rmtree(directory, ignore_errors=True)


def _manifest_text(records: dict[str, FileRecord]) -> str:
    files = {name: asdict(records[name]) for name in sorted(records)}
    return json.dumps({"files": files, "checksum": checksum(files)}, indent=2) + "\n"
