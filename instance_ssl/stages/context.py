"""What all stages share: command line → config → group → data → run directory → stage → result.json → exit code."""

import argparse
import contextlib
import os
import platform
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
import torchvision
import yaml

from instance_ssl import engine, faults
from instance_ssl.allocator import keep_freed_memory
from instance_ssl.config import ExperimentConfig, flatten, load_config
from instance_ssl.console import complain, heard_or_not
from instance_ssl.data.sources import ImageSource
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.ds_config import DeepSpeedSettings, load_ds_config
from instance_ssl.errors import EXIT_USER_ERROR, AbsentPeersError, RankError, UserError
from instance_ssl.guard import EXIT_LOST_PEER, Guard, Stopped, own_process_id
from instance_ssl.run_directory import State, locked, read_json, read_state, write_json, write_status, write_text
from instance_ssl.run_log import RunLog
from instance_ssl.stages import checks, instances, precision
from instance_ssl.stages.arguments import parse_arguments

_T = TypeVar("_T")

EXIT_FAILURE = 1
EXIT_STOPPED = 75  # EX_TEMPFAIL: the same command goes on


@dataclass(frozen=True)
class Stage:
    """What a stage gets: where it runs, on what, and where its files go.

    Attributes:
        source: the images to train on.
        evaluation_sources: labelled images, train and test; None where no stage of the run needs them.
    """

    name: str
    run_directory: Path
    config: ExperimentConfig
    ds: DeepSpeedSettings
    world: Group
    log: RunLog
    guard: Guard
    source: ImageSource
    evaluation_sources: tuple[ImageSource, ImageSource] | None = None

    @property
    def directory(self) -> Path:
        """The stage's own directory."""
        return self.run_directory / self.name

    def checkpoints_of(self, stage: str) -> Path:
        """Where a stage of this run keeps its checkpoints."""
        return self.run_directory / stage / "checkpoints"

    def check_together(self) -> None:
        """For work of all ranks in step: ends it on all of them when any was asked to end. Collective.

        Raises:
            Stopped: on all ranks.
        """
        self.guard.beat()
        wanted = torch.tensor([int(self.guard.reason is not None)], device=self.world.device)
        if self.world.all_reduce_max_(wanted).item():
            self.stop_together()

    def stop_together(self) -> NoReturn:
        """Ends the work on all ranks, for the reason that one of them has. Collective.

        Raises:
            Stopped: always.
        """
        reasons = [reason for reason in self.world.all_gather_objects(self.guard.reason) if reason is not None]
        raise Stopped(reasons[0])

    def together(self, load: Callable[[], _T]) -> _T:
        """Does what may fail on one rank alone (reading its own file, say), and fails on all if it does. Collective.

        Raises:
            UserError: on all ranks, with the first one's reason.
        """
        result, problem = None, None
        try:
            result = load()
        except UserError as error:
            problem = str(error)
        problem = next((text for text in self.world.all_gather_objects(problem) if text is not None), None)
        if problem is not None:
            raise UserError(problem)
        return cast(_T, result)

    def on_rank_0(self, work: Callable[[], _T]) -> _T:
        """What rank 0 alone does: its (picklable) result on all ranks, or its failure. Collective.

        Raises:
            UserError: on all ranks.
        """
        return cast(_T, self.world.broadcast_object(self.together(lambda: work() if self.world.rank == 0 else None)))

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The JSON's precision, for forward passes outside the engine."""
        dtype = self.ds.autocast_dtype
        return torch.autocast(self.world.device.type, dtype) if dtype else contextlib.nullcontext()


class StageSpec(NamedTuple):
    """A stage that a runner offers: its directory's name, what it does, and whether it needs labelled images."""

    name: str
    run: Callable[[Stage], dict[str, Any]]
    needs_labels: bool = False


def run_stages(
    stages: Sequence[StageSpec], after: Callable[[Stage], None] | None = None, further: Sequence[StageSpec] = ()
) -> int:
    """Runs stages one after another in one process group and returns the process's exit code.

    Complete stages are skipped; `after` follows the last. `--stages` names those, `further` ones too, to run instead.
    """
    keep_freed_memory(os.environ)  # here, so that loader processes, which are forked, inherit it
    process = _Process()
    faults.reach("start", process.rank)
    process.guard.start()

    def work() -> None:
        offered = {spec.name: spec for spec in (*stages, *further)}
        arguments = parse_arguments(list(offered))
        chosen = [offered[name] for name in arguments.stages] if arguments.stages else stages
        context = _open(arguments, process, needs_labels=any(spec.needs_labels for spec in chosen))
        for spec in chosen:
            _run_stage(replace(context, name=spec.name), spec.run, process)
        if after is not None and not arguments.stages:
            after(context)
        context.world.barrier()

    return _exit_code(work, process)


def run_measurement(measure: Callable[[Group], None]) -> int:
    """Runs a measurement, which needs a world but no run directory, and returns the process's exit code."""

    def work() -> None:
        world = comm.initialize()
        measure(world)
        world.barrier()

    return _exit_code(work, _Process())


class _Process:
    """This process: how it is watched, and where it works now."""

    def __init__(self) -> None:
        self.rank = comm.launched_rank()
        self.guard = Guard(self.rank, on_end=lambda line: self.end("failed", line))
        self.log = RunLog(is_main=self.rank == 0, on_progress=self.guard.beat)
        self.directory: Path | None = None

    def meet(self, world: Group) -> None:
        """Tells the guard which processes of this machine are the other ranks."""
        peers = world.all_gather_objects((socket.gethostname(), own_process_id()))
        here = socket.gethostname()
        self.guard.local_peers = {
            rank: process for rank, (host, process) in enumerate(peers) if host == here and rank != self.rank
        }

    def end(self, state: State, reason: str) -> None:
        """Says in the stage's status.json how it ended."""
        if self.directory is not None:
            write_status(self.directory, state, reason)

    def told_state(self) -> str | None:
        """The state in the stage's status.json, which another rank may have written."""
        return None if self.directory is None else read_state(self.directory)

    def describe_loss(self) -> str:
        """Which rank on this host has died, if one of them has."""
        dead = self.guard.dead_peer()
        return "another rank has stopped" if dead is None else f"rank {dead} on {socket.gethostname()} has died"


def _exit_code(work: Callable[[], None], process: _Process) -> int:
    """0 when the work is done; a user's mistake is one line and exit code 2, a lost peer and a stop have their own."""
    try:
        work()
        comm.finalize()
    except UserError as error:
        if process.rank == 0 or isinstance(error, RankError):
            complain(f"error: {error}")
            process.end("failed", str(error))
        if not isinstance(error, RankError):  # then all ranks are here, and leave together
            comm.finalize()
            if process.guard.is_launched and comm.launched_beside_rank_0():
                # A launcher ends all at the first exit it sees, and rank 0, which says it, may have to start up yet.
                process.guard.await_end(seconds=60)
        return EXIT_LOST_PEER if isinstance(error, AbsentPeersError) else EXIT_USER_ERROR
    except Stopped as stop:
        process.log.say(f"stopped ({stop}); the same command goes on from here")
        if process.rank == 0 or process.guard.reason is not None:  # in an evaluation, one rank may stop alone
            process.end("stopped", str(stop))
        return EXIT_STOPPED
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            cure = "lower data.num_workers if it was for lack of memory"
            complain(reason := f"rank {process.rank}: a loader process was killed; {cure} ({error})")
            process.end("failed", reason)
            return EXIT_FAILURE
        if not comm.lost_peer(error):
            return _fault(error, process)
        time.sleep(1)  # what has died may still be there for a moment
        reason = process.describe_loss()
        complain(f"rank {process.rank}: {reason}; stopping too")
        # A signal may have come since: a launcher sends it to all when one rank dies. Only a rank that stopped says so.
        told = process.told_state()
        if told not in ("failed", "stopped"):  # else the other rank has said why, and knows better
            process.end("failed", reason)
        if process.guard.is_launched:
            time.sleep(4)  # the launcher reports the first exit it sees: let it be the other rank's
        return EXIT_STOPPED if told == "stopped" else EXIT_LOST_PEER
    except Exception as error:
        return _fault(error, process)
    return 0


def _fault(error: Exception, process: _Process) -> int:
    """No user's mistake: the one end that shows a traceback."""
    process.end("failed", line := f"rank {process.rank}: {type(error).__name__}: {error}")
    complain(line.split("\n")[0])
    with heard_or_not(sys.stderr):
        traceback.print_exception(error)
    return EXIT_FAILURE


def _open(arguments: argparse.Namespace, process: _Process, *, needs_labels: bool) -> Stage:
    """Everything that can be refused is refused here, before a file is written."""
    checks.check_hostfile()
    config = load_config(arguments.config, arguments.set)
    ds = load_ds_config(
        arguments.deepspeed_config,
        global_batch_size=config.optimization.global_batch_size,
        max_grad_norm=config.optimization.max_grad_norm,
        world_size=comm.launched_world_size(),
    )
    engine.check_zero_section(ds)
    if needs_labels:
        checks.check_labels(config)
    run_directory = (arguments.run_dir or Path("runs") / arguments.config.stem).resolve()
    world = comm.initialize(config.safety.join_seconds)
    process.meet(world)
    checks.check_ranks_agree(
        {
            "configuration (--config, --set)": config.model_dump_json(),
            "DeepSpeed configuration": ds.describe(),
            "run directory": str(run_directory),
            "version": checks.versions_in_use(),
        },
        world,
    )
    checks.check_sources(config.evaluation, world)
    checks.check_unchanged(config, run_directory)
    source = checks.open_images(
        config.data, "train", world, process.log, instances.as_known(run_directory, config.data)
    )
    checks.check_size(config, len(source))
    checks.check_micro_batch(config, ds.micro_batch_size)
    evaluation_sources = checks.open_evaluation(config, source, world, process.log) if needs_labels else None
    instances.record(source, run_directory, world)
    checks.say_left_out((source, *(evaluation_sources or ())), process.log)
    process.log.say(
        f"{len(source):,} images, {world.size} x {world.device.type}; global batch "
        f"{config.optimization.global_batch_size} = {ds.micro_batch_size} images x {ds.accumulation_steps} "
        f"micro-batches x {world.size} ranks, {config.augmentation.num_views} views each; run in {run_directory}"
    )
    ds = precision.settle(ds, world, process.log)
    return Stage("", run_directory, config, ds, world, process.log, process.guard, source, evaluation_sources)


def _run_stage(stage: Stage, function: Callable[[Stage], dict[str, Any]], process: _Process) -> None:
    result_path = stage.directory / "result.json"
    done = _is_complete(stage) if stage.world.rank == 0 else None
    if stage.world.broadcast_object(done):
        stage.log.say(f"{stage.name}: already complete, see {result_path}")
        return
    with contextlib.ExitStack() as held:
        _enter(stage, held)
        process.directory = stage.directory
        held.enter_context(process.guard.hangs_after(stage.config.safety.hang_seconds, stage.directory))
        held.enter_context(stage.log.metrics_in(stage.directory))
        started = time.perf_counter()
        # Before the work: a training that goes on beside an evaluation may commit a newer one meanwhile.
        newest = _newest_checkpoint(stage)
        figures = function(stage)
        if stage.world.rank == 0:
            if stage.name in checks.BOUND_STAGES:
                newest = _newest_checkpoint(stage)
            data = {"kind": stage.config.data.kind, "num_instances": len(stage.source), "digest": stage.source.digest}
            record = {
                "stage": stage.name,
                **figures,
                "newest_checkpoint": newest,
                "data": data,
                "seconds": round(time.perf_counter() - started, 3),
                **_environment(stage.world),
            }
            write_json(result_path, record)
            write_status(stage.directory, "complete")
        stage.world.barrier()
        process.directory = None


def _is_complete(stage: Stage) -> bool:
    result_path, config_path = stage.directory / "result.json", stage.directory / "config.yaml"
    result = read_json(result_path)
    if result is None:
        return False
    if stage.name in checks.BOUND_STAGES:
        return True
    same = config_path.exists() and flatten(load_config(config_path)) == flatten(stage.config)
    return same and result.get("newest_checkpoint") == _newest_checkpoint(stage)


def _newest_checkpoint(stage: Stage) -> str | None:
    return checks.what_is_evaluated(stage.config.evaluation, stage.checkpoints_of("pretrain"))


def _enter(stage: Stage, held: contextlib.ExitStack) -> None:
    """Takes the stage's directory for this run and writes down what is run there.

    Raises:
        UserError: when another run has it, or it cannot be written to.
    """
    problem = None
    if stage.world.rank == 0:
        try:
            stage.directory.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(stage.directory))
            # It is of what config.yaml says: of another configuration there is none until it is done.
            (stage.directory / "result.json").unlink(missing_ok=True)
            config = yaml.safe_dump(stage.config.model_dump(mode="json"), sort_keys=False)
            write_text(stage.directory / "config.yaml", config)
            section = stage.ds.classifier.model_dump()
            write_json(stage.directory / "ds_config.json", {**stage.ds.engine, "instance_classifier": section})
            write_json(stage.directory / "environment.json", _environment(stage.world))
            write_status(stage.directory, "running")
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{stage.directory}: {error.strerror}"
    problem = stage.world.broadcast_object(problem)
    if problem is not None:
        raise UserError(problem)


def _environment(world: Group) -> dict[str, Any]:
    on_cuda = world.device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **engine.versions(), "torchvision": torchvision.__version__},
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if on_cuda else platform.machine() + " cpu",
    }


def _commit() -> str | None:
    """The checkout's commit, with `+` when files differ from it; None outside a checkout."""
    root = str(Path(__file__).resolve().parents[2])

    def git(*arguments: str) -> str:
        command = ["git", "-C", root, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
