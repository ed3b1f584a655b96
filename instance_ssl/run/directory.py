"""Lock and status of a stage directory.

A launcher's exit code proves little: DeepSpeed's is 0 when its ranks were orphaned. `status.json` gives the state,
`running`, `complete`, `stopped` (the same command resumes) or `failed`, and the reason.
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

# JSON takes at most 12 bytes a character, and the other keys some more.
_ROOM, _ROOM_BYTES, _MAX_REASON = ".status.json.room", 2**14, 1200
# The folder of an update of the images that is committed and not finished; the run directory is between two states.
UPDATE = "update"

State = Literal["running", "complete", "stopped", "failed"]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Locks a directory for this process, by an advisory lock on a file in it; the lock ends with the process.

    Raises:
        UserError: another process holds the lock; the message names it.
    """
    with (directory / "lock").open("a+") as file:
        try:
            # A record lock: forked loader processes do not inherit it, so it ends with this process.
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
    """Writes status.json, whole; a directory that cannot be written to does not end a run.

    From "running" on, a file reserves room for one more status, so that it can be written to a full disk.

    Args:
        run: identifies this start of the run, for `end_status`.
    """
    if reason is not None and len(reason) > _MAX_REASON:
        reason = reason[:_MAX_REASON] + "…"
    status = {"state": state, "reason": reason, "run": run, "host": socket.gethostname(), "process": os.getpid()}
    status["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    path, room = directory / "status.json", directory / _ROOM
    with contextlib.suppress(OSError):
        # Overwriting reserved blocks and renaming takes no room, unlike `whole_file`.
        _write_over(room, (json.dumps(status, indent=2) + "\n").encode())
        os.replace(room, path)
        if state == "running":
            _write_over(room, bytes(_ROOM_BYTES))


def _write_over(path: Path, content: bytes) -> None:
    """Overwrites a file in the blocks that it has, and syncs it."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(file.write(content))
        file.flush()
        os.fsync(file.fileno())


def end_status(directory: Path, state: State, reason: str, run: str | None) -> None:
    """Writes how a run ended, unless status.json has it already: the first reason is the true one.

    A rank that was suspended and wakes long after its run has ended does not overwrite the next run's status.
    """
    told = read_json(directory / "status.json")
    if told is None or (told.get("run") == run and told.get("state") == "running"):
        write_status(directory, state, reason, run)


def read_state(directory: Path, run: str | None) -> str | None:
    """The state in status.json; None where it is of another run or cannot be read."""
    told = read_json(directory / "status.json") or {}
    return str(told["state"]) if told.get("run") == run and "state" in told else None


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads an object from a JSON file; None where it is missing or damaged."""
    try:
        return structured.read_json(path)
    except (OSError, ValueError):
        return None


def require_space(directory: Path, checkpoint_bytes: int, keep: int) -> None:
    """Refuses (`UserError`) a disk without room for the checkpoints of a run.

    Args:
        directory: of the checkpoints; those already in it will make room for new ones.
        keep: number that stays; one more is written before the oldest is removed.
    """
    there = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) if directory.exists() else 0
    needed = (keep + 1) * checkpoint_bytes
    if problem := find_no_space(directory, needed - there):
        raise UserError(
            f"{problem}, for {keep + 1} checkpoints of {in_mib(checkpoint_bytes)}: make room, lower checkpoint.keep, "
            "or give a --run-dir on another disk"
        )
