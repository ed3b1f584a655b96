"""Signals to, and the death of, DeepSpeed's launcher, which leaves its ranks to themselves (F16, F19)."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import Launched
from processes import FAULTY_RUNNERS, ROOT, cpu_environment, launch_command
from rig import checkpoints, digests, flags, quick_first, run, status, wait_for

GRACE_SECONDS = 35


def start(place: Path) -> Launched:
    return Launched(place, launch_command("pretrain", 2, *flags(place), runners=FAULTY_RUNNERS))


HARM: dict[str, Callable[[Launched], object]] = {
    "SIGTERM to the runner": lambda it: it.runner.terminate(),
    "SIGKILL of launch.py": lambda it: it.launch.kill(),
    "SIGINT to all, as Ctrl-C sends it": lambda it: os.killpg(it.runner.pid, signal.SIGINT),
    "SIGTERM to launch.py": lambda it: it.launch.terminate(),
    "SIGTERM to one rank": lambda it: it.ranks[1].terminate(),
    "SIGKILL of the runner": lambda it: it.runner.kill(),
    "SIGTERM to all": lambda it: os.killpg(it.runner.pid, signal.SIGTERM),
}
FIRST = ("SIGTERM to the runner", "SIGKILL of launch.py")


@pytest.mark.parametrize("harm", quick_first([*HARM], lambda harm: harm == FIRST[0], lambda harm: harm not in FIRST))
def test_every_end_is_one_checkpoint_and_no_orphan(place: Path, clean: dict[str, str], harm: str) -> None:
    launched = start(place)
    try:
        began = time.monotonic()
        HARM[harm](launched)
        wait_for(launched.all_gone, GRACE_SECONDS)
        assert time.monotonic() - began < (10 if "SIGKILL" in harm else GRACE_SECONDS)
    finally:
        launched.kill()
    assert status(place)["state"] == "stopped"
    assert len(checkpoints(place)) in (1, 2)
    if harm == "SIGTERM to one rank":
        assert launched.runner.returncode == 75
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


@pytest.mark.fault
def test_a_killed_rank_ends_the_launch_in_seconds(place: Path, clean: dict[str, str]) -> None:
    launched = start(place)
    try:
        launched.ranks[1].kill()
        wait_for(launched.all_gone, 15)
    finally:
        launched.kill()
    assert launched.runner.returncode not in (0, 2, 75)
    assert "rank 1 on" in status(place)["reason"]
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


@pytest.mark.full
def test_a_hostfile_that_is_not_there_is_refused(place: Path) -> None:
    """DeepSpeed itself would go on with this machine alone."""
    command = launch_command("pretrain", 2, *flags(place))
    command[1:1] = ["--hostfile", str(place / "hosts")]
    finished = subprocess.run(command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=90)
    assert finished.returncode == 2, finished.stderr
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "hosts does not exist" in lines[0]
    assert "Traceback" not in finished.stderr
