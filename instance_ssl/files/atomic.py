"""Writes files whole or not at all: into a temporary file beside the target, synced, then renamed over it.

Readers see the old content or the new, also after a kill or a power failure.
"""

import errno
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from instance_ssl.files.disk_space import saving

# Some network file systems cannot sync a directory.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


@contextmanager
def whole_file(path: Path, *, several_writers: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`, whose file replaces `path` when the block ends without an error.

    After an error the temporary file is removed. One that a kill leaves behind is overwritten by the next write.

    Args:
        several_writers: whether other processes may write the same file now: each gets a temporary path of its own.

    Raises:
        OSError: the file cannot be written.
    """
    tag = f".{secrets.token_hex(4)}" if several_writers else ""
    temporary = path.with_name(f".{path.name}{tag}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


@contextmanager
def saved_file(path: Path, needed: int = 0) -> Iterator[Path]:
    """`whole_file` for about `needed` bytes; a `UserError` where it cannot be written or the disk has no room."""
    with saving(path, needed), whole_file(path) as temporary:
        yield temporary


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all; raises as `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON object, whole or not at all; raises as `whole_file`."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_lines(lines: Iterable[str], path: Path) -> None:
    """Writes lines, whole or not at all, never all of them in memory; raises as `whole_file`."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(line + "\n" for line in lines)


def sync_directory(directory: Path) -> None:
    """Makes renames in a directory survive a power failure, where its file system can; raises OSError."""
    try:
        _sync(directory)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
