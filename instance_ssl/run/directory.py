"""Who works in a stage's directory, and how that ended: a lock that no crash leaves behind, and status.json.

A launcher's exit code proves little (DeepSpeed's is 0 when its ranks were orphaned); `status.json` says what came of
it: `running`, `complete`, `stopped` (the same command goes on) or `failed`, with the reason.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from instance_ssl.errors import UserError
from instance_ssl.files import structured
from instance_ssl.files.disk_space import find_no_space, in_mib

# At most 12 bytes a character, as JSON writes it, and some for the rest.
_ROOM, _ROOM_BYTES, _MAX_REASON = ".status.json.room", 2**14, 1200
State = Literal["running", "complete", "stopped", "failed"]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds a directory for one process: an advisory lock on a file in it, which ends with the process in any case.

    Raises:
        UserError: when another process holds it, naming that one.
    """
    path = directory / "lock"
    with path.open("a+") as file:
        try:
            # A record lock, which loader processes forked from this one do not share: it dies with this process alone.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN, or EACCES on some systems
            file.seek(0)
            holder = file.read().strip() or "another run"
            raise UserError(f"{directory} is in use by {holder}: wait for it, or give another --run-dir") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def write_status(directory: Path, state: State, reason: str | None = None, run: str | None = None) -> None:
    """Writes status.json, whole; a directory that cannot be written to is not what ends a run.

    From "running" on, room is kept in the directory for one more status, which so finds its way onto a full disk.

    Args:
        run: names this start of the run, for `end_status`.
    """
    if reason is not None and len(reason) > _MAX_REASON:
        reason = reason[:_MAX_REASON] + "…"
    status = {
        "state": state,
        "reason": reason,
        "run": run,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path, room = directory / "status.json", directory / _ROOM
    with contextlib.suppress(OSError):
        # Written over the blocks that are kept for it, and renamed: that takes no room, however full the disk is.
        _write_over(room, (json.dumps(status, indent=2) + "\n").encode())
        os.replace(room, path)
        if state == "running":
            _write_over(room, bytes(_ROOM_BYTES))


def _write_over(path: Path, content: bytes) -> None:
    """Writes a file in the blocks that it has, and through to the disk."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(file.write(content))
        file.flush()
        os.fsync(file.fileno())


def end_status(directory: Path, state: State, reason: str, run: str | None) -> None:
    """Writes how a run ended, unless status.json says so already: the first reason is the true one.

    Nor does a rank that was stopped, and woke when its run was long over, speak for the next one.
    """
    told = read_json(directory / "status.json")
    if told is None or (told.get("run") == run and told.get("state") == "running"):
        write_status(directory, state, reason, run)


def read_state(directory: Path, run: str | None) -> str | None:
    """The state that status.json tells of a run, if it is of this one and can be read."""
    told = read_json(directory / "status.json") or {}
    return str(told["state"]) if told.get("run") == run and "state" in told else None


def read_json(path: Path) -> dict[str, Any] | None:
    """An object from a JSON file; None where it is not there, or not whole."""
    try:
        return structured.read_json(path)
    except (OSError, ValueError):
        return None


def require_space(directory: Path, checkpoint_bytes: int, keep: int) -> None:
    """Refuses a disk on which the checkpoints of a run will not find room.

    Args:
        directory: where they go; those already in it will make room for new ones.
        checkpoint_bytes: of one of them.
        keep: how many stay; one more is written before the oldest goes.

    Raises:
        UserError: saying how much is missing.
    """
    there = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) if directory.exists() else 0
    needed = (keep + 1) * checkpoint_bytes
    if problem := find_no_space(directory, needed - there):
        raise UserError(
            f"{problem}, for {keep + 1} checkpoints of {in_mib(checkpoint_bytes)}: make room, lower checkpoint.keep, "
            "or give a --run-dir on another disk"
        )
