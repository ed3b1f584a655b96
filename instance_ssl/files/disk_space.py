"""Checks for room on a disk before a save, and explains in one line why a file could not be written."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from instance_ssl.errors import UserError, escape, reason

_FULL = {errno.ENOSPC, errno.EDQUOT}
_ROOM_BYTES = 2**20  # a disk with less is full


def find_no_space(directory: Path, needed: int) -> str | None:
    """A message where fewer than `needed` bytes are free for a directory, which need not exist yet; else None."""
    return None if _free(directory) >= needed else _no_space(directory, needed)


def why_not_written(error: Exception, directory: Path, needed: int) -> str:
    """Returns in one line why a file of about `needed` bytes was not written. Some libraries raise no `OSError`."""
    if error.errno in _FULL if isinstance(error, OSError) else _free(directory) < _ROOM_BYTES:
        return _no_space(directory, needed)
    return reason(error)


@contextmanager
def saving(path: Path, needed: int = 0) -> Iterator[None]:
    """Wraps the writing of a file of about `needed` bytes, and raises a `UserError` where it fails.

    The block is not entered where the disk has no room.
    """
    if problem := find_no_space(path.parent, needed):
        raise UserError(f"{escape(str(path))} could not be written: {problem}")
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and _free(path.parent) >= _ROOM_BYTES:
            raise
        why = why_not_written(error, path.parent, needed)
        raise UserError(f"{escape(str(path))} could not be written: {why}") from None


def in_mib(size: int) -> str:
    """A number of bytes in MiB or GiB, for a message."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _no_space(directory: Path, needed: int) -> str:
    need = f"{in_mib(needed)} needed, " if needed else ""
    return f"no space left in {escape(str(directory))}: {need}{in_mib(_free(directory))} free"


def _free(directory: Path) -> int:
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    return shutil.disk_usage(existing).free
