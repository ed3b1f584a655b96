"""Runs an ablation's runs as processes, a few at a time; skips finished runs and reports failed ones."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from instance_ssl.run.console import tell
from settings import RUNNERS, Ablation, Run

EXIT_DONE, EXIT_FAILED, EXIT_STOPPED = 0, 1, 75
_SECONDS_BETWEEN_LOOKS = 0.2
_LOG = "ablation.log"


def is_done(run: Run, directory: Path) -> bool:
    """Whether every stage of the run has written its result."""
    return all((directory / stage / "result.json").exists() for stage in run.stages)


@dataclass
class _Child:
    run: Run
    process: subprocess.Popen[bytes]
    began: float


class Batch:
    """Runs up to `jobs` runs at a time.

    Passes SIGTERM and SIGINT on to the running processes, which save and exit; the same command resumes.

    Args:
        ablation: names the runner and the two configurations.
        directory: parent of the runs' directories.
        jobs: runs at a time.
        say: prints a line.
    """

    def __init__(
        self,
        ablation: Ablation,
        directory: Path,
        *,
        jobs: int,
        say: Callable[[str], None] = tell,
    ) -> None:
        self._ablation, self._directory, self._jobs, self._say = ablation, directory, jobs, say
        self._children: list[_Child] = []
        self._signal: int | None = None
        self._failed = 0

    def run(self, runs: Iterable[Run]) -> int:
        """Runs what is not done yet; returns 0 if all runs are done, 1 if some failed, 75 after a signal."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        runs = list(runs)
        waiting = [run for run in runs if not is_done(run, self._directory / run.name)]
        self._say(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done")
        while self._children or (waiting and self._signal is None):
            while waiting and len(self._children) < self._jobs and self._signal is None:
                self._start(waiting.pop(0))
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            for child in [child for child in self._children if child.process.poll() is not None]:
                self._children.remove(child)
                self._judge(child, len(waiting))
        if self._signal is not None:
            self._say("stopped; the same command resumes")
            return EXIT_STOPPED
        return EXIT_FAILED if self._failed else EXIT_DONE

    def _start(self, run: Run) -> None:
        directory = self._directory / run.name
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / _LOG).open("ab") as log:
            # A session of its own, so that Ctrl-C in the terminal reaches this process alone, which passes it on once.
            process = subprocess.Popen(
                self._command(run, directory), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._children.append(_Child(run, process, time.monotonic()))
        if self._signal is not None:  # arrived while the process started
            self._pass_on()

    def _command(self, run: Run, directory: Path) -> list[str]:
        # Processes that each use a thread per core would slow one another down.
        threads = max(1, (os.cpu_count() or 1) // self._jobs)
        words = [f"OMP_NUM_THREADS={threads}"] if self._jobs > 1 else []
        command = ["env", *words, sys.executable, str(RUNNERS / f"{self._ablation.runner}.py")]
        command += ["--config", str(self._ablation.config), "--run-dir", str(directory)]
        command += ["--deepspeed_config", str(self._ablation.deepspeed_config)]
        return [*command, "--stages", *run.stages, "--set", *run.overrides]

    def _judge(self, child: _Child, num_waiting: int) -> None:
        code, directory = child.process.returncode, self._directory / child.run.name
        if code == 0:
            seconds = time.monotonic() - child.began
            self._say(f"done: {child.run.label} ({seconds:.0f} s); {num_waiting + len(self._children)} left")
        elif self._signal is None:
            self._failed += 1
            self._say(f"failed: {child.run.label} (exit code {code}): {_last_line(directory / _LOG)}")

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._signal is None:
            self._signal = number
            self._pass_on()

    def _pass_on(self) -> None:
        for child in self._children:
            with contextlib.suppress(OSError):
                child.process.send_signal(signal.SIGTERM)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"{path} is empty")
