"""What a process says and returns when another rank has gone."""

import errno
import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from instance_ssl.errors import UserError
from instance_ssl.run.directory import State, write_status
from instance_ssl.run.process import EXIT_STOPPED, Process, exit_code
from instance_ssl.run.watchdog import EXIT_LOST_PEER, ProcessId


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
    process = Process()
    process.directory = tmp_path
    process.guard.local_peers = {1: ProcessId(2**22 + 1, 0.0)}  # above the largest number a process can have
    write_status(tmp_path, told, "by the other")
    if signal is not None:
        process.guard.request(signal)
    assert exit_code(lose_a_peer, process) == code
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == state
    assert reason in status["reason"]


@pytest.mark.parametrize("error", [dist.DistNetworkError, dist.DistStoreError], ids=lambda error: error.__name__)
def test_a_rank_that_dies_while_a_group_is_made_is_a_lost_peer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: type[RuntimeError]
) -> None:
    """Ranks meet again for each group, DeepSpeed's own too; the store is gone with rank 0."""

    def make_a_group() -> None:
        raise error("Failed to recv, got 0 bytes. Connection was likely closed.")

    process = Process()
    process.directory = tmp_path
    write_status(tmp_path, "running")
    assert exit_code(make_a_group, process) == EXIT_LOST_PEER
    assert "Traceback" not in capsys.readouterr().err


def test_the_first_reason_stays(tmp_path: Path) -> None:
    """A rank that was stopped, and wakes when the others have gone, finds them dead: that is not why."""
    process = Process()
    process.directory = tmp_path
    write_status(tmp_path, "running")
    process.end("failed", "nothing has moved")
    process.end("failed", "rank 0 has died")
    process.end("stopped", "SIGTERM")
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "nothing has moved"


def test_a_rank_of_an_earlier_start_does_not_speak_for_the_next(tmp_path: Path) -> None:
    process = Process()
    process.directory, process.run = tmp_path, "earlier"
    write_status(tmp_path, "running", run="later")
    assert exit_code(lose_a_peer, process) == EXIT_LOST_PEER
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
    assert process.told_state() is None


def open_too_many() -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "images/1.png")


def misread() -> None:
    try:
        open_too_many()
    except OSError as error:
        raise UserError(f"images/1.png is damaged: {error}") from None


def lack_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def lack_a_thread() -> None:
    raise RuntimeError("can't start new thread")


def lack_python_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (open_too_many, "open files (ulimit -n: "),
        (misread, "open files (ulimit -n: "),
        (lack_memory, "memory (ulimit -v: "),
        (lack_python_memory, "memory (ulimit -v: "),
        (lack_a_thread, "threads or processes (ulimit -u: "),
    ],
)
def test_a_shortage_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], work: Callable[[], None], expected: str
) -> None:
    process = Process()
    process.directory = tmp_path
    write_status(tmp_path, "running")
    assert exit_code(work, process) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: rank 0 on {socket.gethostname()}: out of {expected}")
    assert json.loads((tmp_path / "status.json").read_text())["reason"] in line


def test_a_directory_in_use_is_no_shortage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lock's error reads "Resource temporarily unavailable", as that of a process that cannot be started."""

    def meet_a_lock() -> None:
        try:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except BlockingIOError:
            raise UserError("in use") from None

    assert exit_code(meet_a_lock, Process()) == 2
    assert capsys.readouterr().err == "error: in use\n"


def make_a_mistake() -> None:
    raise UserError("data.root a\x1b[31mb does not exist")


def fail_oddly() -> None:
    raise ValueError("one\ntwo")


@pytest.mark.parametrize(
    ("work", "code", "expected"),
    [
        (make_a_mistake, 2, "error: data.root a\\x1b[31mb does not exist"),
        (lack_a_thread, 2, "threads or processes (ulimit -u: "),
        (lose_a_peer, 3, "rank 1: another rank has stopped; stopping too"),
        (fail_oddly, 1, "rank 1: ValueError: one"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_ends_its_report_with_the_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[], None],
    code: int,
    expected: str,
    rank: str,
) -> None:
    """Of every rank, whether or not it prints the line itself: torchrun takes the first to fail for the cause."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", rank)
    assert exit_code(work, Process()) == code
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(tmp_path / "error.json"))
    *_, last, border = str(ChildFailedError("runners/pretrain.py", {0: failure})).splitlines()
    assert border.strip("=") == ""
    assert last.startswith("  traceback : ")
    assert expected.replace("rank 1", f"rank {rank}") in last


def test_a_rank_that_ends_first_at_the_end_has_not_died() -> None:
    ended = subprocess.Popen(["true"])
    peer = ProcessId.of(psutil.Process(ended.pid))
    ended.wait()
    process = Process()
    process.guard.local_peers = {1: peer}
    assert process.guard.dead_peer() == 1
    process.leave_world()
    assert process.guard.dead_peer() is None
