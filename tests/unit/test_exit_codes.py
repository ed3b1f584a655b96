"""What a process says and returns when another rank has gone."""

import json
from pathlib import Path

import pytest

from instance_ssl.guard import EXIT_LOST_PEER, ProcessId
from instance_ssl.run_directory import State, write_status
from instance_ssl.stages.context import EXIT_STOPPED, _exit_code, _Process


def lose_a_peer() -> None:
    raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")


@pytest.mark.parametrize(
    ("told", "code", "state", "reason"),
    [
        ("running", EXIT_LOST_PEER, "failed", "rank 1 on"),
        ("stopped", EXIT_STOPPED, "stopped", "by the other"),
        ("failed", EXIT_LOST_PEER, "failed", "by the other"),
    ],
)
@pytest.mark.parametrize("signal", [None, "SIGTERM"])
def test_a_signal_that_follows_a_rank_s_death_does_not_hide_it(
    tmp_path: Path, signal: str | None, told: State, code: int, state: str, reason: str
) -> None:
    """A launcher ends all ranks when one dies; what the dead rank itself has told stays."""
    process = _Process()
    process.directory = tmp_path
    process.guard.local_peers = {1: ProcessId(2**22 + 1, 0.0)}  # above the largest number a process can have
    write_status(tmp_path, told, "by the other")
    if signal is not None:
        process.guard.request(signal)
    assert _exit_code(lose_a_peer, process) == code
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == state
    assert reason in status["reason"]
