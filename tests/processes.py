"""Starts runners: forked from the tests' server, or the way a user does, by `python` or the deepspeed launcher.

A start of Python takes seven CPU seconds and a launch of two ranks twenty: only tests whose subject is the start or
the launcher use `run_python` and `run_launched`.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path

from fork_server import start_script

ROOT = Path(__file__).parents[1]
RUNNERS = ROOT / "runners"
# These carry out the fault that their environment orders.
FAULTY_RUNNERS = ROOT / "tests/faults/runners"
_PATIENCE_SECONDS = 900  # for what hangs: on a machine that is busy a launch alone may take minutes


def run_bare(runner: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What `python runners/<runner>.py …` does, in a forked process; an absolute path names another script."""
    return _start_and_wait(runner, arguments, cwd, [{}])


def main_of(runner: str) -> Callable[[Sequence[str]], int]:
    """The `main` of a runner that starts no process group, to be called with words in this process."""
    spec = importlib.util.spec_from_file_location(f"runner_{runner}", _script(runner))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[Sequence[str]], int] = module.main
    return main


def run_forked(runner: str, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a launcher does with `runners/<runner>.py …`, in forked processes that share standard output and error.

    The exit code is the first that is not 0, in the order in which ranks end, as a launcher sees it. No rank is stopped
    because another has ended.
    """
    world = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    by_rank = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return _start_and_wait(runner, arguments, ROOT, by_rank)


def run_tasks(runner: str, by_task: list[dict[str, str]], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Like `run_forked`, with processes that are told their place by these variables alone, as `srun` tells it."""
    return _start_and_wait(runner, arguments, ROOT, by_task)


def run_python(runner: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python runners/<runner>.py …`"""
    return _run([sys.executable, str(_script(runner)), *arguments], cwd)


def run_launched(runner: str, ranks: int, *arguments: str, runners: Path = RUNNERS) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_gpus <ranks> runners/<runner>.py …`; on a CPU machine these are that many processes."""
    return _run(launch_command(runner, ranks, *arguments, runners=runners), ROOT)


def launch_command(runner: str, ranks: int, *arguments: str, runners: Path = RUNNERS) -> list[str]:
    """The command of `run_launched`, on a port that is free."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", free_port()]
    return [*launcher, str(_script(runner, runners)), *arguments]


def torchrun_command(
    runner: str, ranks: int, *arguments: str, flags: Sequence[str] = (), runners: Path = RUNNERS
) -> list[str]:
    """`torchrun --nproc-per-node <ranks> flags … runners/<runner>.py …`, which finds a free port itself."""
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", str(ranks), *flags]
    return [*launcher, str(_script(runner, runners)), *arguments]


def run_accelerated(runner: str, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --multi_gpu --num_processes <ranks> runners/<runner>.py …`, which needs no GPU."""
    flags = ["--multi_gpu", "--num_processes", str(ranks), "--num_machines", "1", "--mixed_precision", "no"]
    flags += ["--dynamo_backend", "no", "--main_process_port", free_port()]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(_script(runner)), *arguments]
    return _run(command, ROOT)


def cpu_environment() -> dict[str, str]:
    """Of processes that a test starts: this checkout, one thread, no GPU."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _script(runner: str, runners: Path = RUNNERS) -> Path:
    return (runners / f"{runner}.py").resolve()


def _run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=cpu_environment(), capture_output=True, text=True, timeout=_PATIENCE_SECONDS
    )


def _start_and_wait(
    runner: str, arguments: tuple[str, ...], cwd: Path, by_rank: list[dict[str, str]]
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as directory:
        stdout, stderr = Path(directory, "stdout"), Path(directory, "stderr")
        processes = [
            start_script(_script(runner), arguments, cpu_environment() | own, cwd, stdout, stderr) for own in by_rank
        ]
        end, pending, codes = time.monotonic() + _PATIENCE_SECONDS, set(processes), []
        while pending and time.monotonic() < end:
            connection.wait([process.sentinel for process in pending], timeout=max(0.0, end - time.monotonic()))
            ended = [process for process in pending if not process.is_alive()]
            codes += [process.exitcode or 0 for process in ended]
            pending -= set(ended)
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        said, errors = (path.read_text() if path.exists() else "" for path in (stdout, stderr))
    assert not late, f"ranks {late} of {runner} did not end in {_PATIENCE_SECONDS} s\n{said}\n{errors}"
    code = next((code for code in codes if code), 0)
    return subprocess.CompletedProcess([runner, *arguments], code, said, errors)
