"""The guard: signals leave a request, dead processes are told from living ones."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from instance_ssl.guard import Guard, ProcessId, Stopped, is_launcher, own_process_id


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
    own = own_process_id()
    assert own.is_alive()
    assert not ProcessId(own.pid, own.began - 1).is_alive()  # its number, but of a process before it


def test_a_dead_peer_is_found_before_it_is_buried() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    guard = Guard(0)
    guard.local_peers = {0: own_process_id(), 3: ProcessId.of(psutil.Process(child.pid))}
    assert guard.dead_peer() is None
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert guard.dead_peer() == 3
    child.wait()
    assert guard.dead_peer() == 3


@pytest.mark.parametrize(
    ("words", "expected"), [(["/venv/bin/deepspeed"], True), (["deepspeed.launcher.launch"], True), (["train"], False)]
)
def test_launchers_are_known_by_their_command(words: list[str], expected: bool, tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()", *words], stdin=subprocess.PIPE)
    try:
        assert is_launcher(psutil.Process(child.pid)) == expected
    finally:
        child.kill()
        child.wait()
