"""Directories of files that are there only when they are whole, written by all ranks together.

Each rank writes its files into one temporary directory, from a thread of its own and hashing what passes by. Once all
ranks have finished well, rank 0 writes MANIFEST.json (size and SHA-256 of every file) and renames the directory: that
is the commit. Readers take the newest directory that its manifest describes; damage is found before anything is
loaded. The hashes guard against accidents, not against someone who can rewrite them; but no file of a checkpoint can
execute code either way (`read_tensors`).
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from instance_ssl import faults
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError, in_one_line, reason
from instance_ssl.files.disk_space import find_no_space, why_not_written
from instance_ssl.files.structured import MalformedError, read_json

MANIFEST = "MANIFEST.json"
_REMOVED = ".removed-"
_TEMPORARY = ".writing-"
# Of every directory, if it has one: the "step" in it is that of the directory's name.
POSITION = "training.json"
_COMMITTED_NAME = re.compile(r"step_[0-9]{9,}")
# What only a checkpoint of this project holds; other files that lie in one are somebody's own, and no harm.
_OURS = re.compile(rf"(rows|rank)_.*\.pt|encoder\.pt|sampling\.pt|{re.escape(POSITION)}")

# A file's content: tensors and plain values for `torch.save`, or text.
Content = dict[str, Any] | str


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256, in hexadecimal, of one file."""

    bytes: int
    sha256: str


class DirectoryWriter:
    """Writes one directory after another below `parent`, while its caller goes on.

    Args:
        parent: of the directories; removed leftovers in it are those of runs that have ended.
        world: all ranks; every one calls `start` and `commit`, in the same order.
        keep: newest directories that a commit leaves.
        is_permanent: step → whether its directory is never removed.
    """

    def __init__(self, parent: Path, world: Group, *, keep: int, is_permanent: Callable[[int], bool]) -> None:
        self.parent = parent
        self._world = world
        self._keep, self._is_permanent = keep, is_permanent
        self._thread: threading.Thread | None = None
        self._step = 0
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
        """Begins to write this rank's files of `parent`/step_…; the caller does not change their content any more.
        Collective. Nothing is written where the disk has no room for the files of all ranks.

        `find_problem`, called beside the training too, may say why they must not be committed.
        """
        assert not self.is_busy
        self._step, self._records, self._problem = step, {}, None
        self._needed = sum(self._world.all_gather_objects(sum(map(content_bytes, files.values()))))
        self._thread = threading.Thread(target=self._write, args=(files, find_problem), name="checkpoint")
        self._thread.start()

    def commit(self) -> Path:
        """Waits for every rank's files and makes the directory appear.

        Raises:
            UserError: when any rank could not write; nothing new is left then and older directories stay.
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

    @property
    def _final(self) -> Path:
        return self.parent / f"step_{self._step:09d}"

    @property
    def _temporary(self) -> Path:
        return self.parent / f"{_TEMPORARY}{self._final.name}"

    def _write(self, files: Mapping[str, Content], find_problem: Callable[[], str | None]) -> None:
        rank, step = self._world.rank, self._step
        try:
            self._problem = find_problem()
            if self._problem is not None:
                return
            faults.reach("save.before", rank, step)
            if not self._temporary.exists():  # else another rank has written part of it, which is free no more
                self._problem = find_no_space(self.parent, self._needed)
            if self._problem is not None:
                return
            self._temporary.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                path = self._temporary / name
                self._records[name] = write_file(path, content, lambda: faults.reach("save.mid", rank, step))
        except Exception as error:  # whatever ends this thread: what is not whole must not be committed
            self._problem = f"rank {rank}: {why_not_written(error, self.parent, self._needed)}"

    def _publish(self, records: dict[str, FileRecord]) -> str | None:
        """Manifest, rename, retention; returns what went wrong, if anything."""
        try:
            faults.reach("save.before_commit", 0, self._step)
            write_file(self._temporary / MANIFEST, _manifest_text(records))
            sync_directory(self._temporary)
            if self._final.exists():  # damaged, or resolution would have begun after it
                remove_directory(self._final)
            self._temporary.rename(self._final)
            faults.reach("commit.mid", 0, self._step)
            sync_directory(self.parent)
        except OSError as error:
            return f"rank 0: {why_not_written(error, self.parent, self._needed)}"
        retain(self.parent, self._keep, self._is_permanent)
        return None


def content_bytes(content: Any) -> int:
    """Bytes of a file of such content, a little less than it takes."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict | list | tuple):
        return sum(map(content_bytes, content.values() if isinstance(content, dict) else content))
    return len(content) if isinstance(content, str) else 8


def write_file(path: Path, content: Content, on_begun: Callable[[], object] = lambda: None) -> FileRecord:
    """Writes a file through to the disk and says what was written. `on_begun` is called once part of it is there.

    Raises:
        OSError: when it cannot be written; torch's own error about that names a line of its C++ code.
    """
    with path.open("wb") as file:
        hashing = _HashingFile(file, on_begun)
        if isinstance(content, str):
            hashing.write(content.encode())
        else:
            try:
                _save_tensors(content, cast(BinaryIO, hashing))
            except RuntimeError as error:
                raise hashing.error or error from None
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(hashing.size, hashing.digest.hexdigest())


def replace_file(path: Path, content: Content) -> None:
    """`write_file`, whole or not at all: what was there before stays until then."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_file(temporary, content)
    temporary.replace(path)


def _save_tensors(content: dict[str, Any], file: BinaryIO) -> None:
    """`torch.save` without its own checksums, which would take half as long again as SHA-256 does."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, file)
    finally:
        torch.serialization.set_crc32_options(before)


class _HashingFile:
    """What `torch.save` needs of a file: bytes are hashed as they pass, large pieces beside their writing."""

    def __init__(self, file: BinaryIO, on_begun: Callable[[], object]) -> None:
        self._file, self._on_begun = file, on_begun
        self.digest, self.size = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        hashing = threading.Thread(target=self.digest.update, args=(data,))
        hashing.start()
        try:
            self._file.write(data)
            if self.size == 0:
                self._file.flush()
                self._on_begun()
        except OSError as error:
            self.error = self.error or error
            raise
        finally:
            hashing.join()
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def read_tensors(path: Path, *, mapped: bool = True) -> dict[str, Any]:
    """Content of a file of tensors, on the CPU and mapped, so that slices cost what they hold.

    Only tensors and plain containers are ever built: a file that asks for more is refused, and runs nothing.

    Args:
        mapped: False reads also what versions of torch before 1.6 wrote, as some published weights were.

    Raises:
        UserError: for such a file, or one that cannot be read.
    """
    try:
        if mapped:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            with path.open("rb") as file:  # of a path, torch goes by the suffix
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise almost anything
        why = "it holds more than tensors" if isinstance(error, pickle.UnpicklingError) else in_one_line(error)
        raise UserError(f"{path} cannot be loaded: {why}; nothing in it was run, give an intact one") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be loaded: it holds a {type(content).__name__}, not named tensors")
    return content


def committed_directories(parent: Path) -> list[Path]:
    """Directories with the name of a committed one, newest first, whole or not; what else is there is left alone."""
    named = [path for path in parent.glob("step_*") if _COMMITTED_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=step_of, reverse=True)


def step_of(directory: Path) -> int:
    """The step in the name of a committed directory."""
    return int(directory.name.removeprefix("step_"))


def newest_sound_directory(parent: Path) -> Path | None:
    """The newest committed directory that is what its name says, by the sizes of its files, unhashed."""
    return next(filter(_seems_whole, committed_directories(parent)), None)


def foreign_files(directory: Path) -> list[str]:
    """Names of what lies in a committed directory and was not written by this project."""
    records = _read_manifest(directory)
    known = {MANIFEST} if isinstance(records, str) else {MANIFEST, *records}
    others = {path.name for path in directory.iterdir()} - known
    return sorted(name for name in others if not _OURS.fullmatch(name))


def verify(directory: Path, group: Group, names: tuple[str, ...] | None = None) -> str | None:
    """None when the directory is what its manifest says, else the first problem. Collective; the ranks share the work.

    A name step_… must be that of its content. Files that are not this project's are no problem (`foreign_files`).

    Args:
        names: the only files whose content matters; None: all, and no others of this project may be there.
    """
    outcome = _look_at(directory, all_files=names is None) if group.rank == 0 else None
    outcome = group.broadcast_object(outcome)
    if isinstance(outcome, str):
        return outcome
    assert outcome is not None
    chosen = sorted(name for name in outcome if names is None or name in names)
    problem = None
    for name in chosen[group.rank :: group.size]:
        problem = problem or _compare(directory / name, outcome[name])
    return next((text for text in group.all_gather_objects(problem) if text is not None), None)


def retain(parent: Path, keep: int, is_permanent: Callable[[int], bool]) -> None:
    """Removes all but the newest `keep` intact directories and the permanent ones.

    Damaged ones (by size: hashing all at every save would take longer than the save) are neither counted nor removed.
    """
    intact = [directory for directory in committed_directories(parent) if _seems_whole(directory)]
    for directory in intact[keep:]:
        if not is_permanent(step_of(directory)):
            remove_directory(directory)


def remove_directory(directory: Path) -> None:
    """Removes a committed directory so that what an interruption leaves of it is none."""
    hidden = directory.with_name(_REMOVED + directory.name)
    shutil.rmtree(hidden, ignore_errors=True)
    directory.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clear_leftovers(parent: Path) -> None:
    """Removes what interrupted saves and removals have left. Only for the one run that has the directory locked."""
    for pattern in (_TEMPORARY, _REMOVED):
        for directory in parent.glob(pattern + "*"):
            shutil.rmtree(directory, ignore_errors=True)


def _manifest_text(records: dict[str, FileRecord]) -> str:
    files = {name: asdict(records[name]) for name in sorted(records)}
    return json.dumps({"files": files, "checksum": _checksum(files)}, indent=2) + "\n"


def _checksum(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _read_manifest(directory: Path) -> dict[str, FileRecord] | str:
    """The manifest's records, or what is wrong with it."""
    try:
        manifest = read_json(directory / MANIFEST)
        files = manifest["files"]
        if manifest["checksum"] != _checksum(files):
            return f"{MANIFEST} has changed since it was written"
        records = {name: FileRecord(**record) for name, record in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {in_one_line(error)}"
    if any(Path(name).name != name for name in records):
        return f"{MANIFEST} names files outside its directory"
    return records


def _look_at(directory: Path, *, all_files: bool) -> dict[str, FileRecord] | str:
    """The manifest's records, or what is wrong before any file is read through."""
    records = _read_manifest(directory)
    if isinstance(records, str):
        return records
    unknown = [path.name for path in directory.iterdir() if path.name not in records and _OURS.fullmatch(path.name)]
    if unknown and all_files:
        return f"{min(unknown)} is not in {MANIFEST}"
    return find_other_step(directory) or records


def find_other_step(directory: Path) -> str | None:
    """What is wrong with a directory's name that is not that of its content: it is a copy by another name, say."""
    if not _COMMITTED_NAME.fullmatch(directory.name) or not (directory / POSITION).exists():
        return None
    try:
        step = read_json(directory / POSITION).get("step")
    except (OSError, MalformedError) as error:
        return f"{POSITION}: {reason(error)}"
    return None if step == step_of(directory) else f"its name says step {step_of(directory)}, {POSITION} says {step}"


def _compare(path: Path, expected: FileRecord) -> str | None:
    try:
        with path.open("rb") as file:
            found = FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None if found == expected else f"{path.name} has changed since it was written"


def _seems_whole(directory: Path) -> bool:
    records = _look_at(directory, all_files=False)
    if isinstance(records, str):
        return False
    try:
        return all((directory / name).stat().st_size == record.bytes for name, record in records.items())
    except OSError:
        return False


def sync_directory(directory: Path) -> None:
    """Writes a directory's entries through to the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
