"""D/left_out.txt: the images that take no part any more, one a line, in the order in which they were found.

A line is id, steps of the training that were done by then (0: found before it), why, and name, with tabs between.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from instance_ssl.data.image_sources import ImageSource
from instance_ssl.errors import UserError, printable
from instance_ssl.files.name_lists import list_line

LOST = "not in the data set any more"


@dataclass(frozen=True)
class Found:
    """When an image was found to be missing or unreadable, and why it is left out.

    Attributes:
        step: steps of the training that were done by then.
        why: one line; `LOST` where the data set lost it with leave.
    """

    step: int
    why: str


def record_path(run_directory: Path) -> Path:
    """Where the record is."""
    return run_directory / "left_out.txt"


def read_left_out(run_directory: Path, num_images: int) -> dict[int, Found]:
    """What is recorded by id, without a last line that was not written to its end.

    Raises:
        UserError: when it cannot be read, or is not of so many images.
    """
    path, found = record_path(run_directory), {}
    if not path.exists():
        return {}
    try:
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        for line in whole.decode("utf-8", "surrogateescape").split("\n") if whole else []:
            index, step, why, _ = line.split("\t", 3)
            found[int(index)] = Found(int(step), why)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged: restore it") from None
    if any(not 0 <= index < num_images for index in found):
        raise UserError(f"{path} is not of these {num_images} images: restore it")
    return found


def append_left_out(run_directory: Path, found: Mapping[int, Found], source: ImageSource) -> None:
    """Adds to the record, from which a line that was not written to its end is taken away.

    Raises:
        UserError: when it cannot be written.
    """
    path = record_path(run_directory)
    lines = []
    for index, one in found.items():
        why = printable(one.why.replace("\t", " "))  # it may hold escaped names: not twice
        lines.append(f"{index}\t{one.step}\t{why}\t{list_line(source.names[index])}\n")
    try:
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write("".join(lines).encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
