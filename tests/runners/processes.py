"""Starts runners the way a user does: bare, or under the deepspeed launcher."""

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_bare(runner: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python runners/<runner>.py …`"""
    return _run([sys.executable, str(ROOT / "runners" / f"{runner}.py"), *arguments], cwd)


def main_of(runner: str) -> Callable[[Sequence[str]], int]:
    """The `main` of a runner that starts no process group, to be called with words in this process."""
    spec = importlib.util.spec_from_file_location(f"runner_{runner}", ROOT / "runners" / f"{runner}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[Sequence[str]], int] = module.main
    return main


def run_launched(runner: str, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_gpus <ranks> runners/<runner>.py …`; on a CPU machine these are that many processes."""
    return _run(launch_command(runner, ranks, *arguments), ROOT)


def launch_command(runner: str, ranks: int, *arguments: str) -> list[str]:
    """The command of `run_launched`, on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(port)]
    return [*launcher, str(ROOT / "runners" / f"{runner}.py"), *arguments]


def cpu_environment() -> dict[str, str]:
    """Of processes that a test starts: this checkout, one thread, no GPU."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=cpu_environment(), capture_output=True, text=True, timeout=300)
