"""Watches for what ends a run from outside: signals, a dead launcher, and work that hangs.

A signal or a dead launcher only leaves a request, which the work checks when a checkpoint can be written. A hang and a
dead local rank end the process from here, because nothing else would.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import FrameType

import psutil

from instance_ssl.distributed.clock import AwakeClock
from instance_ssl.run.console import complain_last

EXIT_LOST_PEER, EXIT_HANG = 3, 4

# Programs, and modules of `python -m`, that start ranks as their child processes.
_LAUNCHERS = (
    *("deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run"),
    *("accelerate", "accelerate-launch", "accelerate.commands.launch"),
)

_SECONDS_BETWEEN_LOOKS = 0.5
# Time for the main thread to notice by itself, in its next collective, that a local rank has died.
_SECONDS_TO_NOTICE = 10.0
_SECONDS_FOR_WORDS = 10.0
# A hang is common to all ranks: the first to notice waits this long, or the others would only see a lost peer.
_SECONDS_FOR_OTHERS = 1.5


class Stopped(Exception):
    """The run ends early on request; the same command resumes it."""


@dataclass(frozen=True)
class ProcessId:
    """A local process: its number, which the system reuses, and its start time.

    The time is in clock ticks since boot on Linux, where psutil's `create_time` changes with the system clock; in
    seconds since the epoch elsewhere.
    """

    pid: int
    began: float

    @staticmethod
    def of(process: psutil.Process) -> "ProcessId":
        """Identifies a running process."""
        return ProcessId(process.pid, _beginning(process))

    def is_alive(self) -> bool:
        """Whether this same process still runs."""
        try:
            process = psutil.Process(self.pid)
            return _beginning(process) == self.began and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def _beginning(process: psutil.Process) -> float:
    if sys.platform != "linux":
        return process.create_time()
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_bytes()
    except OSError:
        raise psutil.NoSuchProcess(process.pid) from None
    # Fields from the third on: the second, the program's name in parentheses, may hold spaces and parentheses itself.
    return int(stat.rpartition(b")")[2].split()[19])


class Guard:
    """Watches this process from a thread of its own.

    DeepSpeed's launcher leaves its ranks behind when it or its parent is killed (on one machine no signal reaches
    them), and so does torchrun. Each rank therefore watches the launchers above it, and on a node the ssh connection of
    its launcher, which ends with the machine or the `pdsh` at its other end.

    Args:
        on_end: called with one line before the guard ends the process.

    Attributes:
        reason: why a stop was requested; None if none was.
        local_peers: the other ranks on this machine.
    """

    def __init__(self, rank: int, on_end: Callable[[str], None] = lambda line: None) -> None:
        self.rank = rank
        self.reason: str | None = None
        self.local_peers: dict[int, ProcessId] = {}
        self._on_end = on_end
        self._launchers: list[ProcessId] = []
        self._connection: ProcessId | None = None
        self._hang_seconds: float | None = None
        self._stacks: Path | None = None
        self._clock = AwakeClock()
        self._now = self._last_beat = 0.0

    def start(self) -> None:
        """Installs the signal handlers and starts watching; call it once from the main thread, instead of `watch`."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        launchers = launchers_of(psutil.Process())
        self._launchers = [ProcessId.of(process) for process in launchers]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # a closed terminal; nohup says that it may close
            signal.signal(signal.SIGHUP, self._on_signal)
            if launchers:
                self._connection = connection_of(launchers[-1])
        self.watch()

    def watch(self) -> None:
        """Starts watching for hangs and dead local ranks, without signals and launchers."""
        threading.Thread(target=self._look_on, name="guard", daemon=True).start()

    @property
    def is_launched(self) -> bool:
        """Whether a launcher started this process; Slurm and MPI are not launchers here."""
        return bool(self._launchers)

    def dead_peer(self) -> int | None:
        """Returns a local rank that has died, or None."""
        return next((rank for rank, peer in self.local_peers.items() if not peer.is_alive()), None)

    def request(self, reason: str) -> None:
        """Requests a stop; the first reason is kept."""
        self.reason = self.reason or reason

    def check(self) -> None:
        """Raises `Stopped` if a stop was requested on this rank; for work that has nothing to save."""
        self.beat()
        if self.reason is not None:
            raise Stopped(self.reason)

    def await_end(self, seconds: float) -> None:
        """Waits until a stop is requested, at most this long."""
        deadline = time.monotonic() + seconds
        while self.reason is None and time.monotonic() < deadline:
            time.sleep(0.1)

    def beat(self) -> None:
        """Records that work advances."""
        self._last_beat = self._now

    @contextmanager
    def hangs_after(self, seconds: float, directory: Path | None = None) -> Iterator[None]:
        """Within this context, a process without a beat for this long writes its stacks and exits.

        Args:
            directory: of the stacks; None writes them to standard error.
        """
        self.beat()
        before = self._hang_seconds, self._stacks
        self._stacks = None if directory is None else directory / f"stacks_rank_{self.rank:05d}.txt"
        self._hang_seconds = seconds
        try:
            yield
        finally:
            self._hang_seconds, self._stacks = before

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.request(signal.Signals(number).name)

    def _look_on(self) -> None:
        while True:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            self._now = self._clock.read()
            self._look()

    def _look(self) -> None:
        for launcher in self._launchers:
            if not launcher.is_alive():
                self.request(f"the launcher (process {launcher.pid}) has died")
        if self._connection is not None and not self._connection.is_alive():
            self.request("the ssh connection that the launcher was started over has ended")
        silent = self._now - self._last_beat
        if silent > _SECONDS_TO_NOTICE and (dead := self.dead_peer()) is not None:
            self._end(EXIT_LOST_PEER, lambda: f"rank {dead} has died")
        if self._hang_seconds is not None and silent > self._hang_seconds:
            self._end(EXIT_HANG, lambda: self._describe_hang(silent))

    def _end(self, code: int, describe: Callable[[], str]) -> None:
        """Ends the process from this thread: the main thread is blocked in a collective."""
        # In any case soon: reporting can hang too, on a dead disk or a full pipe.
        timer = threading.Timer(_SECONDS_FOR_WORDS, os._exit, [code])
        timer.daemon = True
        timer.start()
        line = f"rank {self.rank}: {describe()}"
        self._on_end(line)
        complain_last(line)
        os._exit(code)

    def _describe_hang(self, seconds: float) -> str:
        """Writes the stacks of all threads, gives the other ranks time to do so, and returns where they are."""
        where = "above"
        if self._stacks is not None:
            with contextlib.suppress(OSError), self._stacks.open("w") as file:
                faulthandler.dump_traceback(file)
                where = f"in {self._stacks}"
        if where == "above":
            faulthandler.dump_traceback(sys.stderr)
        time.sleep(_SECONDS_FOR_OTHERS)
        return f"nothing has moved for {seconds:.0f} s (safety.hang_seconds); stacks {where}"


def launchers_of(process: psutil.Process) -> list[psutil.Process]:
    """Returns the launchers above a process, nearest first; none if it was started bare."""
    return list(takewhile(is_launcher, _above(process)))


def _above(process: psutil.Process) -> Iterator[psutil.Process]:
    """Yields a process's ancestors. psutil's `parents` fails when the system clock is set meanwhile."""
    with contextlib.suppress(psutil.Error):
        while parent := process.ppid():
            process = psutil.Process(parent)
            yield process


def descendants_of(process: psutil.Process) -> list[psutil.Process]:
    """Returns all descendants of a process. psutil's `children` misses some when the system clock is set meanwhile."""
    children: dict[int, list[psutil.Process]] = {}
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error):
            other = psutil.Process(pid)
            children.setdefault(other.ppid(), []).append(other)
    found = children.pop(process.pid, [])
    for child in found:  # grows as it is read
        found += children.pop(child.pid, [])
    return found


def connection_of(launcher: psutil.Process) -> ProcessId | None:
    """Returns the sshd of the connection over which another machine started a launcher, or None.

    A person's own session does not count: `deepspeed` typed there is a launcher too, and may outlive it.
    """
    if "deepspeed.launcher.launch" not in launcher.cmdline():
        return None
    sshd = next((above for above in _above(launcher) if above.name().startswith("sshd")), None)
    return None if sshd is None else ProcessId.of(sshd)


def is_launcher(process: psutil.Process) -> bool:
    """Whether a process is `deepspeed`, the launcher that it starts, `torchrun` or `accelerate`."""
    try:
        arguments = process.cmdline()
    except psutil.Error:
        return False
    before_runner = takewhile(lambda argument: not argument.endswith(".py"), arguments)
    return any(Path(argument).name in _LAUNCHERS for argument in before_runner)
