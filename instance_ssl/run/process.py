"""A process of a run from its start to its exit code: guard, log, status and error messages."""

import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from instance_ssl.distributed import launched
from instance_ssl.errors import EXIT_USER_ERROR, AbsentPeersError, RankError, UserError
from instance_ssl.run import limits
from instance_ssl.run.console import complain, complain_last, show_traceback, tell_torchrun
from instance_ssl.run.directory import State, end_status, read_state
from instance_ssl.run.log import RunLog
from instance_ssl.run.watchdog import EXIT_LOST_PEER, Guard, ProcessId, Stopped

if TYPE_CHECKING:
    from instance_ssl.distributed.comm import Group

EXIT_FAILURE = 1
EXIT_STOPPED = 75  # EX_TEMPFAIL: the same command resumes


class Process:
    """This process: its guard, its log and its current stage directory.

    Attributes:
        run: identifies this start of the run on all ranks; None before they have met.
        directory: of the current stage; None between stages.
    """

    def __init__(self) -> None:
        self.rank = launched.rank()
        self.guard = Guard(self.rank, on_end=lambda line: self.end("failed", line))
        self.log = RunLog(is_main=self.rank == 0, on_progress=self.guard.beat)
        self.run: str | None = None
        self.directory: Path | None = None

    def meet(self, world: "Group") -> None:
        """Gives the run an identifier, and tells the guard which local processes are the other ranks. Collective."""
        self.run = world.broadcast_object(secrets.token_hex(8))
        here = socket.gethostname()
        peers = enumerate(world.all_gather_objects((here, ProcessId.of(psutil.Process()))))
        self.guard.local_peers = {rank: peer for rank, (host, peer) in peers if host == here and rank != self.rank}

    def leave_world(self) -> None:
        """Leaves the world, if this process has met the other ranks, which may end before it from then on."""
        self.guard.local_peers = {}
        if self.run is not None:
            from instance_ssl.distributed import comm

            comm.finalize()

    def end(self, state: State, reason: str) -> None:
        """Writes to the stage's status.json how the run ended, unless another rank has."""
        if self.directory is not None:
            end_status(self.directory, state, reason, self.run)

    def told_state(self) -> str | None:
        """Returns the state in the stage's status.json, which another rank may have written."""
        return None if self.directory is None else read_state(self.directory, self.run)


def exit_code(work: Callable[[], None], process: Process) -> int:
    """Does the work and returns the exit code: 0, 1 (a bug), 2 (a `UserError`), 3 (a lost peer) or 75 (stopped)."""
    try:
        work()
        process.leave_world()
    except UserError as error:
        if (shortage := limits.describe_shortage(error)) is not None:
            return _fail(shortage, process)
        tell_torchrun(f"error: {error}")
        if process.rank == 0 or isinstance(error, RankError):
            complain(f"error: {error}")
            process.end("failed", str(error))
        if not isinstance(error, RankError):  # then all ranks are here and exit together
            process.leave_world()
            _let_rank_0_print(process)
        return EXIT_LOST_PEER if isinstance(error, AbsentPeersError) else EXIT_USER_ERROR
    except Stopped as stop:
        process.log.say(f"stopped ({stop}); the same command resumes from here")
        if process.rank == 0 or process.guard.reason is not None:  # in an evaluation one rank may stop alone
            process.end("stopped", str(stop))
        return EXIT_STOPPED
    except Exception as error:
        return _fault(error, process)
    return 0


def _let_rank_0_print(process: Process) -> None:
    """Waits for the signal that this rank's exit would bring to rank 0, which prints the error and may still start up.

    Launchers end the ranks of their machine at the first exit that they see; mpirun, and srun with --kill-on-bad-exit,
    end those of all machines.
    """
    if process.guard.is_launched:
        if 0 < process.rank < launched.local_size():
            process.guard.await_end(seconds=60)
    elif launched.is_task() and process.rank > 0:
        process.guard.await_end(seconds=20)  # in vain under an srun that lets all tasks end by themselves


def _fault(error: Exception, process: Process) -> int:
    """Reports a killed loader, a lost peer or a shortage in one line, and any other error with its traceback."""
    if isinstance(error, RuntimeError):
        from instance_ssl.distributed import comm

        if str(error).startswith("DataLoader worker"):
            cure = "lower data.num_workers if memory ran out"
            complain_last(reason := f"rank {process.rank}: a loader process was killed; {cure} ({error})")
            process.end("failed", reason)
            return EXIT_FAILURE
        if comm.lost_peer(error):
            time.sleep(1)  # a dying process may still exist for a moment
            dead = process.guard.dead_peer()
            reason = "another rank has stopped" if dead is None else f"rank {dead} on {socket.gethostname()} has died"
            complain_last(f"rank {process.rank}: {reason}; stopping too")
            # A launcher signals all ranks when one dies: a signal proves no stop, and a rank that stopped has said so.
            told = process.told_state()
            process.end("failed", reason)
            if process.guard.is_launched:
                time.sleep(4)  # the launcher reports the first exit it sees: let it be the other rank's
            return EXIT_STOPPED if told == "stopped" else EXIT_LOST_PEER
    if (shortage := limits.describe_shortage(error)) is not None:
        return _fail(shortage, process)
    process.end("failed", line := f"rank {process.rank}: {type(error).__name__}: {error}")
    complain_last(line.split("\n")[0])
    show_traceback(error)
    return EXIT_FAILURE


def _fail(shortage: str, process: Process) -> int:
    """Reports what this rank ran out of, exit code 2."""
    complain_last(f"error: {(reason := f'rank {process.rank} on {socket.gethostname()}: {shortage}')}")
    process.end("failed", reason)
    return EXIT_USER_ERROR
