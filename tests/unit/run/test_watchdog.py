"""The guard: signals leave a request, dead processes are told from living ones."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from instance_ssl.distributed.clock import AwakeClock
from instance_ssl.run.watchdog import (
    Guard,
    ProcessId,
    Stopped,
    descendants_of,
    is_launcher,
    launchers_of,
)


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_only_leaves_a_request(handlers: None) -> None:
    guard = Guard(0)
    guard.start()
    guard.check()
    os.kill(os.getpid(), signal.SIGTERM)
    assert guard.reason == "SIGTERM"
    os.kill(os.getpid(), signal.SIGINT)
    assert guard.reason == "SIGTERM"  # the first reason stays
    with pytest.raises(Stopped, match="SIGTERM"):
        guard.check()


def test_a_process_is_known_by_its_beginning_too() -> None:
    own = ProcessId.of(psutil.Process())
    assert own.is_alive()
    assert not ProcessId(own.pid, own.began - 1).is_alive()  # its number, but of a process before it


def test_a_dead_peer_is_found_before_it_is_buried() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    guard = Guard(0)
    guard.local_peers = {0: ProcessId.of(psutil.Process()), 3: ProcessId.of(psutil.Process(child.pid))}
    assert guard.dead_peer() is None
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert guard.dead_peer() == 3
    child.wait()
    assert guard.dead_peer() == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/venv/bin/deepspeed"], True),
        (["deepspeed.launcher.launch", "--master_port=1", "runners/pretrain.py"], True),
        (["/venv/bin/torchrun", "--nproc-per-node", "2", "runners/pretrain.py"], True),
        (["torch.distributed.run", "runners/pretrain.py"], True),
        (["/venv/bin/accelerate", "launch", "runners/pretrain.py"], True),
        (["train"], False),
        (["runners/pretrain.py", "--run-dir", "runs/torchrun"], False),
    ],
)
def test_launchers_are_known_by_their_command(words: list[str], expected: bool, tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()", *words], stdin=subprocess.PIPE)
    try:
        while "input()" not in psutil.Process(child.pid).cmdline():  # until then it is a copy of this process
            pass
        assert is_launcher(psutil.Process(child.pid)) == expected
    finally:
        child.kill()
        child.wait()


@pytest.fixture
def stepping_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system clock steps by a second whenever psutil looks: the boot time in /proc/stat moves with it."""
    seconds = itertools.count(1_700_000_000)
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: float(next(seconds)))


@pytest.mark.parametrize("name", ["plain", "a) R (b c", ") Z 1 2 3"])
def test_a_step_of_the_system_clock_kills_nobody(stepping_clock: None, name: str, tmp_path: Path) -> None:
    """Nor does a program's name, which /proc/PID/stat holds in parentheses, confuse when its process began."""
    renames = f"import ctypes; ctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0); print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", renames], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    guard = Guard(0)
    guard.local_peers = {1: ProcessId.of(psutil.Process(child.pid))}
    assert guard.local_peers[1] == ProcessId.of(psutil.Process(child.pid))
    assert guard.dead_peer() is None
    child.kill()
    child.wait()
    assert guard.dead_peer() == 1


def test_relatives_are_found_while_the_system_clock_steps(stepping_clock: None) -> None:
    code = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', 'print(flush=True); input()'])"
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, "deepspeed.launcher.launch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        rank = next(p for p in descendants_of(psutil.Process()) if p.ppid() == launcher.pid)
        assert [process.pid for process in launchers_of(rank)] == [launcher.pid]
    finally:
        launcher.communicate(b"\n")


def test_time_in_which_a_process_was_stopped_is_no_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now, ends = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    guard = Guard(0)
    monkeypatch.setattr(guard, "_end", lambda code, describe: ends.append(describe()))

    def look_after(seconds: float) -> None:
        now[0] += seconds
        guard._now = guard._clock.read()
        guard._look()

    with guard.hangs_after(30, tmp_path):
        for _ in range(10):
            look_after(3600)  # stopped again and again: the machine sleeps
        assert not ends
        guard.beat()
        for _ in range(59):
            look_after(0.5)
        assert not ends
        for _ in range(2):
            look_after(0.5)
        assert "nothing has moved for 30 s" in ends[0]


def test_a_clock_counts_what_is_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = AwakeClock()
    for seconds in (0.5, 1.0, 10_000.0, 0.5):
        now[0] += seconds
        clock.read()
    assert 2 <= clock.read() <= 10
