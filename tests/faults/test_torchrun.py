"""Ranks and torchrun itself die or are told to stop: torchrun restarts what failed, and every end is a checkpoint."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launches import Launched
from processes import FAULTY_RUNNERS, ROOT, cpu_environment, torchrun_command
from rig import checkpoints, digests, flags, quick_first, run, status, wait_for

PATIENCE_SECONDS = 300  # for what hangs: on a machine that is busy a start alone takes a minute


def start(place: Path, *launcher_flags: str, workers: int = 0) -> Launched:
    arguments = flags(place, settings={"data.num_workers": workers})
    return Launched(place, torchrun_command("pretrain", 2, *arguments, flags=launcher_flags, runners=FAULTY_RUNNERS))


@pytest.mark.full
def test_a_killed_rank_is_restarted_and_the_run_ends_as_if_nothing_had_happened(
    place: Path, clean: dict[str, str]
) -> None:
    """F19, F20: by torchrun's own --max-restarts, from the newest checkpoint."""
    launched = start(place, "--max-restarts", "1")
    try:
        wait_for(lambda: checkpoints(place), PATIENCE_SECONDS)
        launched.ranks[1].kill()
        code = launched.runner.wait(PATIENCE_SECONDS)
    finally:
        launched.kill()
    text = launched.output.read_text()
    assert code == 0, text
    assert "resuming from" in text
    assert status(place)["state"] == "complete"
    assert digests(place) == clean


STOPS: dict[str, Callable[[Launched], object]] = {
    "SIGTERM to torchrun": lambda it: it.runner.terminate(),
    "SIGKILL of torchrun": lambda it: it.runner.kill(),
    "SIGINT to torchrun, as Ctrl-C sends it": lambda it: it.runner.send_signal(signal.SIGINT),
    "SIGTERM to one rank": lambda it: it.ranks[1].terminate(),
}


@pytest.mark.parametrize("stop", quick_first([*STOPS], lambda stop: False, lambda stop: "SIGINT" in stop))
def test_every_stop_is_a_checkpoint_and_no_orphan(place: Path, clean: dict[str, str], stop: str) -> None:
    """F16, F19. torchrun signals the loaders' processes too."""
    launched = start(place, workers=1)
    try:
        STOPS[stop](launched)
        wait_for(launched.all_gone, PATIENCE_SECONDS)
    finally:
        launched.kill()
    assert launched.runner.returncode == (-9 if "SIGKILL" in stop else 1), launched.output.read_text()
    assert status(place)["state"] == "stopped"
    assert len(checkpoints(place)) in (1, 2)
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


@pytest.mark.full
def test_a_killed_rank_without_restarts_ends_the_launch_and_is_named(place: Path) -> None:
    launched = start(place)
    try:
        launched.ranks[1].kill()
        wait_for(launched.all_gone, PATIENCE_SECONDS)
    finally:
        launched.kill()
    assert launched.runner.returncode == 1
    assert "rank 1 on" in status(place)["reason"]
    assert "Signal 9 (SIGKILL)" in launched.output.read_text().splitlines()[-2]


@pytest.mark.full
def test_a_mistake_is_the_last_line_of_torchruns_report(place: Path) -> None:
    """Even where rank 0 starts up last; torchrun itself exits with 1, the ranks with 2."""
    arguments = [*flags(place), "optimization.epochs=many"]
    command = torchrun_command("pretrain", 2, *arguments, runners=FAULTY_RUNNERS)
    environment = cpu_environment() | {"INSTANCE_SSL_FAULT": "start:0:*:sleep=5"}
    environment |= {"INSTANCE_SSL_FAULT_RECORD": str(place / "fault.txt")}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert (place / "fault.txt").exists()
    assert finished.returncode == 1
    lines = finished.stderr.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert lines[-2].startswith("  traceback : error: --set optimization.epochs=many")
    assert sum(line.startswith("  exitcode  : 2 ") for line in lines) == 2


SUPERVISE = [sys.executable, str(ROOT / "runners/supervise.py"), "--pause-seconds", "1"]


@pytest.mark.full
def test_under_the_supervisor_a_mistake_keeps_its_exit_code(place: Path) -> None:
    command = [*SUPERVISE, *torchrun_command("pretrain", 2, *flags(place), "optimization.epochs=many")]
    finished = subprocess.run(
        command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert finished.returncode == 2, finished.stderr
    assert "restart" not in finished.stderr


@pytest.mark.full
def test_under_the_supervisor_a_signal_ends_in_a_checkpoint(place: Path) -> None:
    command = torchrun_command("pretrain", 2, *flags(place), runners=FAULTY_RUNNERS)
    launched = Launched(place, [*SUPERVISE, *command])
    try:
        launched.runner.terminate()
        wait_for(launched.all_gone, PATIENCE_SECONDS)
    finally:
        launched.kill()
    assert launched.runner.returncode == 75, launched.output.read_text()
    assert status(place)["state"] == "stopped"
    assert checkpoints(place)


@pytest.mark.fault
def test_under_the_supervisor_a_killed_rank_is_replaced(place: Path, clean: dict[str, str]) -> None:
    command = torchrun_command("pretrain", 2, *flags(place), runners=FAULTY_RUNNERS)
    launched = Launched(place, [*SUPERVISE, "--restarts", "1", *command])
    try:
        wait_for(lambda: checkpoints(place), PATIENCE_SECONDS)
        psutil.Process(launched.ranks[0].pid).kill()
        code = launched.runner.wait(PATIENCE_SECONDS)
    finally:
        launched.kill()
    assert code == 0, launched.output.read_text()
    assert "restart 1 of 1" in launched.output.read_text()
    assert digests(place) == clean
