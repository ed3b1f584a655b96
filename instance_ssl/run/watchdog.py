"""What ends a run from outside: signals, a launcher that has died, and work that hangs.

A signal or a dead launcher only leaves a request; whoever works asks for it between two pieces of work, when a
checkpoint can be written. Only a hang is acted on here, for nothing else would.
"""

import contextlib
import faulthandler
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from instance_ssl.distributed.clock import AwakeClock
from instance_ssl.run.console import complain

EXIT_LOST_PEER, EXIT_HANG = 3, 4

_SECONDS_BETWEEN_LOOKS = 0.5
# So long the main thread may take to notice by itself, in its next collective, that a rank beside it has died.
_SECONDS_TO_NOTICE = 10.0
_SECONDS_FOR_WORDS = 10.0
# A hang is common to all ranks: so long the first to notice stays, for the others would only lose a peer.
_SECONDS_FOR_OTHERS = 1.5


class Stopped(Exception):
    """The run ends early on request, and goes on when the same command is given again."""


@dataclass(frozen=True)
class ProcessId:
    """A process of this machine: its number, which is used again, and when it began.

    Attributes:
        began: on Linux in clock ticks since the machine started, which no step of the system clock moves; elsewhere in
            seconds since the epoch.
    """

    pid: int
    began: float

    @staticmethod
    def of(process: psutil.Process) -> "ProcessId":
        """Of a process that is there."""
        return ProcessId(process.pid, _beginning(process))

    def is_alive(self) -> bool:
        """Whether this very process still runs."""
        try:
            process = psutil.Process(self.pid)
            return _beginning(process) == self.began and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def _beginning(process: psutil.Process) -> float:
    """`ProcessId.began`. psutil's `create_time` adds the boot time, and moves with the system clock."""
    if sys.platform != "linux":
        return process.create_time()
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_bytes()
    except OSError:
        raise psutil.NoSuchProcess(process.pid) from None
    # Fields from the third on: the second, the program's name in parentheses, may hold spaces and parentheses itself.
    return int(stat.rpartition(b")")[2].split()[19])


class Guard:
    """Watches over this process from a thread of its own.

    DeepSpeed's launcher leaves its ranks behind when it is killed, or when its own parent is (on one machine no signal
    reaches them), so each rank looks after the launchers above it itself, and on a node after the ssh connection that
    its launcher was started over, which ends with the machine, or the `pdsh`, at its other end.

    Args:
        rank: for messages.
        on_end: called with one line before the guard itself ends the process.

    Attributes:
        reason: why an end was asked for; None while none was.
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
        """Installs the handlers and starts looking; call it once, from the main thread, in place of `watch`."""
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
        """Starts looking, and leaves signals and launchers alone."""
        threading.Thread(target=self._look_on, name="guard", daemon=True).start()

    @property
    def is_launched(self) -> bool:
        """Whether a DeepSpeed launcher started this process."""
        return bool(self._launchers)

    def dead_peer(self) -> int | None:
        """A rank of this machine that has died, if any has."""
        return next((rank for rank, peer in self.local_peers.items() if not peer.is_alive()), None)

    def request(self, reason: str) -> None:
        """Asks for an end; the first reason stays."""
        if self.reason is None:
            self.reason = reason

    def check(self) -> None:
        """For work that has nothing to save.

        Raises:
            Stopped: when an end was asked for on this rank.
        """
        self.beat()
        if self.reason is not None:
            raise Stopped(self.reason)

    def await_end(self, seconds: float) -> None:
        """Waits until an end is asked for, so long at most."""
        deadline = time.monotonic() + seconds
        while self.reason is None and time.monotonic() < deadline:
            time.sleep(0.1)

    def beat(self) -> None:
        """Says that work goes on."""
        self._last_beat = self._now

    @contextmanager
    def hangs_after(self, seconds: float, directory: Path | None = None) -> Iterator[None]:
        """While this lasts, a process without a beat for so long writes its stacks and exits.

        Args:
            directory: where the stacks go; without one to standard error.
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
            self._end_at_the_latest(EXIT_LOST_PEER)
            self._end(f"rank {self.rank}: rank {dead} has died", EXIT_LOST_PEER)
        if self._hang_seconds is not None and silent > self._hang_seconds:
            self._end_at_the_latest(EXIT_HANG)
            stacks = self._write_stacks()
            time.sleep(_SECONDS_FOR_OTHERS)
            what = f"nothing has moved for {silent:.0f} s (safety.hang_seconds); stacks {stacks}"
            self._end(f"rank {self.rank}: {what}", EXIT_HANG)

    def _end_at_the_latest(self, code: int) -> None:
        """Ends the process soon in any case: its last words can hang too, on a dead disk or a pipe nobody empties."""
        timer = threading.Timer(_SECONDS_FOR_WORDS, os._exit, [code])
        timer.daemon = True
        timer.start()

    def _write_stacks(self) -> str:
        """Writes the stacks of all threads, and says where they are."""
        if self._stacks is not None:
            with contextlib.suppress(OSError), self._stacks.open("w") as file:
                faulthandler.dump_traceback(file)
                return f"in {self._stacks}"
        faulthandler.dump_traceback(sys.stderr)
        return "above"

    def _end(self, line: str, code: int) -> None:
        """Ends the process from beside its main thread, which cannot be asked: it waits in a collective."""
        self._on_end(line)
        complain(line)
        os._exit(code)


def launchers_of(process: psutil.Process) -> list[psutil.Process]:
    """The DeepSpeed launchers above a process, nearest first; none when it was started bare."""
    return list(itertools.takewhile(is_launcher, _above(process)))


def _above(process: psutil.Process) -> Iterator[psutil.Process]:
    """A process's parent, its parent, and so on. psutil's `parents` is lost when the system clock steps meanwhile."""
    with contextlib.suppress(psutil.Error):
        while parent := process.ppid():
            process = psutil.Process(parent)
            yield process


def descendants_of(process: psutil.Process) -> list[psutil.Process]:
    """All processes below one. psutil's `children` loses some when the system clock steps meanwhile."""
    children: dict[int, list[psutil.Process]] = {}
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error):
            other = psutil.Process(pid)
            children.setdefault(other.ppid(), []).append(other)
    found = children.pop(process.pid, [])
    for child in found:  # which grows as it is read
        found += children.pop(child.pid, [])
    return found


def connection_of(launcher: psutil.Process) -> ProcessId | None:
    """The sshd that holds the connection over which another machine started a launcher; None where none did.

    A person's own session is none: `deepspeed` typed there is a launcher too, and may outlive it.
    """
    if "deepspeed.launcher.launch" not in launcher.cmdline():
        return None
    sshd = next((above for above in _above(launcher) if above.name().startswith("sshd")), None)
    return None if sshd is None else ProcessId.of(sshd)


def own_process_id() -> ProcessId:
    """Of this process."""
    return ProcessId.of(psutil.Process())


def is_launcher(process: psutil.Process) -> bool:
    """Whether a process is DeepSpeed's launcher, one that starts it or one that it starts ranks from."""
    try:
        arguments = process.cmdline()
    except psutil.Error:
        return False
    return any(Path(argument).name in ("deepspeed", "deepspeed.launcher.launch") for argument in arguments)
