"""Finds and verifies committed directories; imports no torch."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instance_ssl.errors import in_one_line, reason
from instance_ssl.files.structured import MalformedError, read_json

if TYPE_CHECKING:
    from instance_ssl.distributed.comm import Group

MANIFEST = "MANIFEST.json"
# Where a directory has this file, its "step" is that of the directory's name.
POSITION = "training.json"
_COMMITTED_NAME = re.compile(r"step_[0-9]{9,}")
# Files that only this project writes into a checkpoint; others in it are ignored.
_OURS = re.compile(rf"(rows|rank)_.*\.pt|encoder\.pt|sampling\.pt|{re.escape(POSITION)}")


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256, in hexadecimal, of one file."""

    bytes: int
    sha256: str


def committed_directories(parent: Path) -> list[Path]:
    """Directories with the name of a committed one, newest first, whole or not."""
    named = [path for path in parent.glob("step_*") if _COMMITTED_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=step_of, reverse=True)


def step_of(directory: Path) -> int:
    """The step in the name of a committed directory."""
    return int(directory.name.removeprefix("step_"))


def newest_sound_directory(parent: Path) -> Path | None:
    """The newest committed directory that `seems_whole`."""
    return next(filter(seems_whole, committed_directories(parent)), None)


def foreign_files(directory: Path) -> list[str]:
    """Names of what lies in a committed directory and was not written by this project."""
    records = _read_manifest(directory)
    known = {MANIFEST} if isinstance(records, str) else {MANIFEST, *records}
    others = {path.name for path in directory.iterdir()} - known
    return sorted(name for name in others if not _OURS.fullmatch(name))


def verify(directory: Path, group: "Group", names: tuple[str, ...] | None = None) -> str | None:
    """Returns the first difference between a directory and its manifest, or None. Collective; the ranks share the work.

    The step in the directory's name must be that of its content. `foreign_files` are ignored.

    Args:
        names: the only files to compare; None: all, and no others of this project may be there.
    """
    records = group.broadcast_object(_look_at(directory, all_files=names is None) if group.rank == 0 else None)
    if isinstance(records, str):
        return records
    chosen = sorted(name for name in records if names is None or name in names)
    problems = (_find_change(directory / name, records[name]) for name in chosen[group.rank :: group.size])
    return next(filter(None, group.all_gather_objects(next(filter(None, problems), None))), None)


def checksum(files: Mapping[str, Any]) -> str:
    """The manifest's own SHA-256, of its records."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _read_manifest(directory: Path) -> dict[str, FileRecord] | str:
    """The manifest's records, or what is wrong with it."""
    try:
        manifest = read_json(directory / MANIFEST)
        files = manifest["files"]
        if manifest["checksum"] != checksum(files):
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
    """What is wrong with a directory whose name gives another step than its content: a renamed copy, say."""
    if not _COMMITTED_NAME.fullmatch(directory.name) or not (directory / POSITION).exists():
        return None
    try:
        step = read_json(directory / POSITION).get("step")
    except (OSError, MalformedError) as error:
        return f"{POSITION}: {reason(error)}"
    return None if step == step_of(directory) else f"its name says step {step_of(directory)}, {POSITION} says {step}"


def _find_change(path: Path, expected: FileRecord) -> str | None:
    try:
        with path.open("rb") as file:
            found = FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None if found == expected else f"{path.name} has changed since it was written"


def seems_whole(directory: Path) -> bool:
    """Whether a committed directory matches its manifest and name, judged by the sizes of its files, unhashed."""
    records = _look_at(directory, all_files=False)
    try:
        return not isinstance(records, str) and all(
            (directory / name).stat().st_size == record.bytes for name, record in records.items()
        )
    except OSError:
        return False
