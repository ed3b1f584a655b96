"""The supervisor with real processes: signals arrive, the dead are replaced, success is not taken on trust."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from processes import ROOT, cpu_environment, launch_command, run_bare

SHORT = ["--set", "optimization.epochs=4", "optimization.warmup_epochs=1", "checkpoint.every_steps=5"]
SUPERVISE = [sys.executable, str(ROOT / "runners/supervise.py"), "--pause-seconds", "1"]


@pytest.fixture(scope="module")
def initialised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("supervise") / "run"
    finished = run_bare("initialize_classifier", "--run-dir", str(run), *SHORT)
    assert finished.returncode == 0, finished.stderr
    return run


@pytest.fixture
def run(initialised: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(initialised, tmp_path / "run"))


def supervise(run: Path, *flags: str) -> subprocess.Popen[str]:
    command = [*SUPERVISE, *flags, *launch_command("pretrain", 2, "--run-dir", str(run), *SHORT)]
    return subprocess.Popen(command, cwd=ROOT, env=cpu_environment(), stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], object], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def below(supervisor: subprocess.Popen[str], word: str) -> list[psutil.Process]:
    """Processes below the supervisor with an argument that begins so."""
    found = []
    for process in psutil.Process(supervisor.pid).children(recursive=True):
        try:
            if any(argument.startswith(word) for argument in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def ranks(supervisor: subprocess.Popen[str]) -> list[psutil.Process]:
    return below(supervisor, "--local_rank=")


def has_begun(run: Path) -> bool:
    return any((run / "pretrain/checkpoints").glob("step_*"))


def status(run: Path) -> dict[str, str]:
    return json.loads((run / "pretrain/status.json").read_text())


@pytest.mark.full
def test_a_signal_ends_in_a_checkpoint_and_no_process_is_left(run: Path) -> None:
    supervisor = supervise(run)
    wait_for(lambda: has_begun(run))
    processes = psutil.Process(supervisor.pid).children(recursive=True)
    supervisor.send_signal(signal.SIGTERM)
    _, errors = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 75, errors
    assert status(run)["state"] == "stopped"
    assert not [process for process in processes if process.is_running()]
    resumed = run_bare("pretrain", "--run-dir", str(run), *SHORT)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout


@pytest.mark.fault
def test_a_killed_rank_is_replaced_and_the_run_completes(run: Path) -> None:
    supervisor = supervise(run, "--restarts", "1")
    wait_for(lambda: has_begun(run) and ranks(supervisor))
    ranks(supervisor)[-1].kill()
    _, errors = supervisor.communicate(timeout=120)
    assert supervisor.returncode == 0, errors
    assert "restart 1 of 1" in errors
    assert status(run)["state"] == "complete"


@pytest.mark.fault
def test_a_launcher_that_claims_success_is_not_believed(run: Path) -> None:
    """Killed with SIGKILL, launch.py takes the ranks' fate with it, and DeepSpeed's runner exits with 0."""
    supervisor = supervise(run, "--restarts", "0")
    wait_for(lambda: has_begun(run) and ranks(supervisor))
    below(supervisor, "deepspeed.launcher.launch")[0].kill()
    _, errors = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 1, errors
    assert "the launcher reports success, but" in errors
    assert status(run)["state"] == "stopped"
    assert "has died" in status(run)["reason"]


@pytest.mark.full
def test_a_stage_that_failed_another_day_does_not_count(run: Path) -> None:
    (run / "evaluate_knn").mkdir()
    (run / "evaluate_knn/status.json").write_text(json.dumps({"state": "failed", "reason": "of old"}))
    supervisor = supervise(run, "--restarts", "0")
    _, errors = supervisor.communicate(timeout=120)
    assert supervisor.returncode == 0, errors
    again = supervise(run, "--restarts", "0")  # which finds it complete, and begins nothing
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors


@pytest.mark.full
def test_a_mistake_is_not_tried_again(run: Path) -> None:
    command = [*SUPERVISE, *launch_command("pretrain", 2, "--run-dir", str(run), "--set", "optimization.epochs=many")]
    finished = subprocess.run(command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=120)
    assert finished.returncode == 2
    assert finished.stderr.count("error: ") == 1
    assert "restart" not in finished.stderr


def test_a_bad_launch_is_one_line(tmp_path: Path) -> None:
    command = [*SUPERVISE, "deepspeed", "--hostfile", str(tmp_path / "absent"), "runners/pretrain.py"]
    finished = subprocess.run(command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=120)
    assert finished.returncode == 2
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: --hostfile {tmp_path / 'absent'}: No such file or directory"]
    assert "Traceback" not in finished.stderr
