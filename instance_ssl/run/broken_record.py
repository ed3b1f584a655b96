"""D/broken.txt: the images that training could not read, one a line, in the order in which they were found.

A line holds the file's size in bytes, the reason and the name, separated by tabs. As long as the file has this size it
counts as broken, and the next update of the images excludes it; a repaired file is a new image. A last line that was
not written to its end does not count. Functions raise a `UserError` where the record cannot be read or written.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from instance_ssl.errors import UserError, printable, unescape
from instance_ssl.files.name_lists import list_line

_LOST = "not in the data set any more"


@dataclass(frozen=True)
class Broken:
    """Size in bytes of a file that could not be read, and why, in one line."""

    size: int
    why: str


def as_line(name: str, broken: Broken) -> str:
    """How an image is listed among those that have no id (`ImageSource.left_out`)."""
    return f"{list_line(name)}: {broken.why}"


def record_path(run_directory: Path) -> Path:
    """The record of a run."""
    return run_directory / "broken.txt"


def read_broken(run_directory: Path) -> dict[str, Broken]:
    """The recorded images by name."""
    lines = _read_lines(record_path(run_directory), 3)
    return {unescape(name): Broken(int(size), why) for size, why, name in lines}


def append_broken(run_directory: Path, found: Mapping[str, Broken]) -> None:
    """Adds images, by name, to the record, and drops a last line that was not written to its end."""
    path = record_path(run_directory)
    # The reason may hold escaped names, which are not escaped twice.
    lines = [
        f"{one.size}\t{printable(one.why.replace(chr(9), ' '))}\t{list_line(name)}\n" for name, one in found.items()
    ]
    try:
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write("".join(lines).encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def left_out_path(run_directory: Path) -> Path:
    """What earlier versions recorded instead: images whose classes took no part, though their ids stayed."""
    return run_directory / "left_out.txt"


def read_left_out(run_directory: Path) -> dict[int, str | None]:
    """Id → why of the images that an earlier version excluded; None for one that was not in the data set any more.

    A line is id, step, reason and name, with tabs between.
    """
    lines = _read_lines(left_out_path(run_directory), 4)
    return {int(index): None if why == _LOST else why for index, _, why, _ in lines}


def _read_lines(path: Path, num_fields: int) -> list[list[str]]:
    """The fields of every whole line, the first of them a number; [] without such a file."""
    if not path.exists():
        return []
    try:
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        text = whole.decode("utf-8", "surrogateescape")
        lines = [line.split("\t", num_fields - 1) for line in text.split("\n")] if whole else []
        if any(len(line) != num_fields or int(line[0]) < 0 for line in lines):
            raise ValueError
        return lines
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged: restore it") from None
