"""Keeps a launched run going: passes signals on, waits for every process, restarts a run that died.

`deepspeed` does not pass signals on to the ranks of one machine, leaves them behind when it is killed, and then exits
with 0. So this process signals the ranks itself, adopts orphans (Linux hands them to the nearest "subreaper"), and
reads the outcome from the run's status.json files. `torchrun` exits with 1 whatever the ranks exit with, and writes
that to a file.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import psutil

from instance_ssl.distributed.clock import AwakeClock
from instance_ssl.errors import EXIT_USER_ERROR
from instance_ssl.run.console import complain
from instance_ssl.run.directory import read_json
from instance_ssl.run.launch import Launch
from instance_ssl.run.process import EXIT_FAILURE, EXIT_STOPPED
from instance_ssl.run.watchdog import descendants_of, is_launcher

_PR_SET_CHILD_SUBREAPER = 36
# A run that lasted this long did not fail at its start: the count of restarts begins again.
_LONG_RUN_SECONDS = 600.0
_SECONDS_BETWEEN_LOOKS = 0.5


class Supervisor:
    """Runs one launch until it completes, fails for good, or receives a signal.

    Args:
        restarts: how often in a row a failed run is restarted.
        pause_seconds: between a failure and the next start.
        grace_seconds: from a signal, or the launcher's exit, until remaining processes are killed.
    """

    def __init__(self, launch: Launch, *, restarts: int, pause_seconds: float, grace_seconds: float) -> None:
        self._launch = launch
        self._restarts, self._pause_seconds, self._grace_seconds = restarts, pause_seconds, grace_seconds
        self._before: dict[Path, _Status] = {}
        self._runner: subprocess.Popen[bytes] | None = None
        self._signal: int | None = None
        self._clock = AwakeClock()  # a supervisor that was suspended must not kill ranks that had no time to save

    def run(self) -> int:
        """Runs until the end and returns the last exit code: 0 only if every stage that began is complete."""
        if sys.platform == "linux":  # orphaned descendants become this process's children
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        failures = 0
        while True:
            began = self._clock.read()
            code = self._attempt()
            if code in (0, EXIT_USER_ERROR) or self._signal is not None:
                return code
            failures = 1 if self._clock.read() - began > _LONG_RUN_SECONDS else failures + 1
            if failures > self._restarts:
                complain(f"supervise: ended with {code}, and {self._restarts} restarts did not help: giving up")
                return code
            complain(f"supervise: ended with {code}; restart {failures} of {self._restarts}")
            self._wait(lambda: self._signal is not None, self._pause_seconds)
            if self._signal is not None:
                return EXIT_STOPPED

    def _attempt(self) -> int:
        self._before = {status.path: status for status in _statuses(self._launch.run_directory)}
        # Its own session: a Ctrl-C in the terminal reaches only this process, which passes it on once.
        with tempfile.TemporaryDirectory() as directory:
            report = Path(directory, "error.json")
            environment = {**os.environ, "TORCHELASTIC_ERROR_FILE": str(report)}
            self._runner = subprocess.Popen(self._launch.command, start_new_session=True, env=environment)
            code = self._wait_for(self._runner)
            if code == EXIT_FAILURE:
                code = _code_of_ranks(report) or code
        return self._judge(code)

    def _wait_for(self, runner: subprocess.Popen[bytes]) -> int:
        """Waits for the launcher and all that it started, passes a signal on, and returns the launcher's exit code."""
        told: float | None = None
        while runner.poll() is None:
            now = self._clock.read()
            if self._signal is not None and told is None:
                told = now
                self._pass_on()
            if told is not None and now - told > self._grace_seconds:
                complain(f"supervise: still there {self._grace_seconds:.0f} s after the signal: killing the rest")
                runner.kill()
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        else:
            # A node's ranks save when their connection ends. Debian's pdsh is a script around the program.
            _send(signal.SIGTERM, _descendants(lambda one: one.name() in ("pdsh", "pdsh.bin", "ssh")))
            self._wait(lambda: not _descendants(), self._grace_seconds)  # ranks that the launcher left behind
        code = runner.wait()  # before the rest is killed and reaped, which would take its exit code along
        rest = _descendants()
        _send(signal.SIGKILL, rest)
        psutil.wait_procs(rest, timeout=10)
        return code

    def _judge(self, code: int) -> int:
        if code < 0:  # by a signal
            code = EXIT_STOPPED if self._signal is not None else 128 - code
        if code == EXIT_FAILURE and self._signal is not None and self._saved_elsewhere():
            code = EXIT_STOPPED
        unfinished = [status for status in self._own_statuses() if status.state != "complete"] if code == 0 else []
        if unfinished:
            complain(f"supervise: the launcher reports success, but {unfinished[0]}")
            code = EXIT_FAILURE
        return code

    def _saved_elsewhere(self) -> bool:
        """Whether the nodes' ranks saved and exited: over ssh, a runner that is told to stop exits before they have."""

        def states() -> set[str]:
            return {status.state for status in self._own_statuses()}

        self._wait(lambda: "running" not in states(), self._grace_seconds)
        return "stopped" in states() <= {"stopped", "complete"}

    def _own_statuses(self) -> list["_Status"]:
        """Returns the status of the stages that this attempt began; if none, of the runner's own stage, or else of all.

        A stage that failed some other day is not this attempt's failure.
        """
        statuses = _statuses(self._launch.run_directory)
        begun = [status for status in statuses if status != self._before.get(status.path)]
        named = [status for status in statuses if status.path.parent.name == Path(self._launch.script[0]).stem]
        return begun or named or statuses

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._signal is None:
            self._signal = number

    def _pass_on(self) -> None:
        """Signals this machine's ranks, which save and exit; over ssh, and of torchrun, the launcher, which does so."""
        ranks = [] if self._launch.passes_signals_on else _descendants(_is_rank)
        complain(f"supervise: {signal.Signals(self._signal or 0).name}: the run saves its state and exits")
        if not ranks and self._runner is not None:
            self._runner.terminate()
        _send(signal.SIGTERM, ranks)

    def _wait(self, until: Callable[[], bool], seconds: float) -> None:
        end = self._clock.read() + seconds
        while self._clock.read() < end and not until():
            time.sleep(_SECONDS_BETWEEN_LOOKS)


class _Status(NamedTuple):
    path: Path
    state: str
    reason: str | None
    written_ns: int

    def __str__(self) -> str:
        return f"{self.path} says {self.state}" + (f": {self.reason}" if self.reason else "")


def _statuses(run_directory: Path | None) -> list[_Status]:
    """Reads each stage's status.json."""
    found = []
    for path in sorted((run_directory or Path(os.devnull)).glob("*/status.json")):
        with contextlib.suppress(OSError):
            status = read_json(path) or {}
            state, reason = status.get("state"), status.get("reason")
            if isinstance(state, str):
                found.append(_Status(path, state, None if reason is None else str(reason), path.stat().st_mtime_ns))
    return found


def _code_of_ranks(report: Path) -> int | None:
    """Returns the exit code of the rank that failed first, from torchrun's report; None where it wrote none."""
    with contextlib.suppress(OSError):
        message = (read_json(report) or {}).get("message")
        code = message.get("errorCode") if isinstance(message, dict) else None
        return code if isinstance(code, int) and 0 < code < 256 else None
    return None


def _descendants(is_meant: Callable[[psutil.Process], bool] = lambda one: True) -> list[psutil.Process]:
    """Returns the running processes below this one, adopted ones included."""
    alive = []
    for process in descendants_of(psutil.Process()):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and is_meant(process):
                alive.append(process)
    return alive


def _is_rank(process: psutil.Process) -> bool:
    return is_launcher(psutil.Process(process.ppid())) and not is_launcher(process)


def _send(number: signal.Signals, processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
