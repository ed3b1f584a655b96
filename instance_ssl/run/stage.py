"""What all stages share: command line → config → group → data → run directory → stage → result.json → exit code."""

import argparse
import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torchvision
import yaml

from instance_ssl import faults
from instance_ssl.config.deepspeed import DeepSpeedSettings, load_ds_config
from instance_ssl.config.experiment import ExperimentConfig, load_config
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.files.disk_space import saving, why_not_written
from instance_ssl.run import agreement, checks, identity, manifest, pending_update, precision
from instance_ssl.run.arguments import parse_arguments
from instance_ssl.run.console import exit_code_of
from instance_ssl.run.directory import locked, write_json, write_status, write_text
from instance_ssl.run.launch import check_world
from instance_ssl.run.limits import check_limits
from instance_ssl.run.log import RunLog
from instance_ssl.run.process import Process, exit_code
from instance_ssl.run.watchdog import Guard, Stopped
from instance_ssl.training import engine
from instance_ssl.training.allocator import keep_freed_memory

_T = TypeVar("_T")

# Outside a stage, where opening millions of files gives a sign of life now and then only.
_LEAST_HANG_SECONDS = 1800.0


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
        return agreement.together(load, self.world)

    def on_rank_0(self, work: Callable[[], _T]) -> _T:
        """What rank 0 alone does: its (picklable) result on all ranks, or its failure. Collective.

        Raises:
            UserError: on all ranks.
        """
        return agreement.rank_0_alone(work, self.world)

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

    def work(process: Process) -> None:
        keep_freed_memory(os.environ)  # here, so that loader processes, which are forked, inherit it
        faults.reach("start", process.rank)
        process.guard.start()
        offered = {spec.name: spec for spec in (*stages, *further)}
        arguments = parse_arguments(list(offered))
        chosen = [offered[name] for name in arguments.stages] if arguments.stages else stages
        with contextlib.ExitStack() as held:
            context = _open(arguments, process, held, chosen)
            for spec in chosen:
                _run_stage(replace(context, name=spec.name), spec.run, process)
            if after is not None and not arguments.stages:
                after(context)
            context.world.barrier()

    return _run(work)


def run_measurement(measure: Callable[[Group], None]) -> int:
    """Runs a measurement, which needs a world but no run directory, and returns the process's exit code."""

    def work(process: Process) -> None:
        process.guard.watch()
        world = comm.initialize()
        process.meet(world)
        measure(world)
        world.barrier()

    return _run(work)


def _run(work: Callable[[Process], None]) -> int:
    """Does the work of this process; a launch or limits that cannot serve are refused before anything else."""

    def checked() -> int:
        check_world(os.environ)
        check_limits()
        process = Process()
        return exit_code(lambda: work(process), process)

    return exit_code_of(checked)


def _open(
    arguments: argparse.Namespace, process: Process, held: contextlib.ExitStack, chosen: Sequence[StageSpec]
) -> Stage:
    """Everything that can be refused is refused here, before a file is written. `held` ends with the work."""
    needs_labels = any(spec.needs_labels for spec in chosen)
    trains = any(spec.name not in checks.READING_STAGES for spec in chosen)
    checks.check_hostfile()
    config = load_config(arguments.config, arguments.set)
    ds = load_ds_config(
        arguments.deepspeed_config,
        global_batch_size=config.optimization.global_batch_size if trains else None,
        max_grad_norm=config.optimization.max_grad_norm,
        world_size=comm.launched_world_size(),
    )
    engine.check_zero_section(ds)
    if needs_labels:
        checks.check_labels(config)
    run_directory = (arguments.run_dir or Path("runs") / arguments.config.stem).resolve()
    world = comm.initialize(config.safety.join_seconds)
    held.enter_context(process.guard.hangs_after(max(config.safety.hang_seconds, _LEAST_HANG_SECONDS)))
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
    agreement.rank_0_alone(lambda: pending_update.finish(run_directory), world)
    agreement.rank_0_alone(lambda: identity.check_unchanged(config, run_directory), world)
    if arguments.run_dir is None and [spec.name for spec in chosen] == ["export"]:
        checks.check_run_to_export(config, run_directory, world)
    checks.check_made_before(config, run_directory, [spec.name for spec in chosen], world)
    arrange = manifest.as_known(run_directory, config.data, [spec.name for spec in chosen])
    source = checks.open_images(config.data, "train", world, process.log, arrange)
    if trains:
        checks.check_size(config, len(source), ds.micro_batch_size, world.size, arguments.deepspeed_config)
        checks.check_micro_batch(config, ds.micro_batch_size)
    evaluation_sources = checks.open_evaluation(config, source, world, process.log) if needs_labels else None
    manifest.record(source, run_directory, world)
    checks.say_left_out((source, *(evaluation_sources or ())), process.log)
    batch = (
        f"global batch {config.optimization.global_batch_size} = {ds.micro_batch_size} images x "
        f"{ds.accumulation_steps} micro-batches x {world.size} ranks, {config.augmentation.num_views} views each; "
    )
    process.log.say(
        f"{len(source):,} images, {world.size} x {world.device.type}; {batch if trains else ''}run in {run_directory}"
    )
    ds = precision.settle(ds, world, process.log)
    return Stage("", run_directory, config, ds, world, process.log, process.guard, source, evaluation_sources)


def _run_stage(stage: Stage, function: Callable[[Stage], dict[str, Any]], process: Process) -> None:
    result_path = stage.directory / "result.json"
    if stage.on_rank_0(lambda: _is_complete(stage)):
        stage.log.say(f"{stage.name}: already complete, see {result_path}")
        return
    with contextlib.ExitStack() as held:
        _enter(stage, process.run, held)
        process.directory = stage.directory
        held.enter_context(process.guard.hangs_after(stage.config.safety.hang_seconds, stage.directory))
        held.enter_context(stage.log.metrics_in(stage.directory))
        started = time.perf_counter()
        # Before the work: a training that goes on beside an evaluation may commit a newer one meanwhile.
        newest = _newest_checkpoint(stage)
        figures = function(stage)
        if stage.name in identity.BOUND_STAGES:
            newest = _newest_checkpoint(stage)
        record = {"stage": stage.name, **figures, "newest_checkpoint": newest}
        record["seconds"] = round(time.perf_counter() - started, 3)
        stage.on_rank_0(lambda: _conclude(stage, record, process.run))
        process.directory = None


def _conclude(stage: Stage, record: dict[str, Any], run: str | None) -> None:
    data = {"kind": stage.config.data.kind, "num_instances": len(stage.source), "digest": stage.source.digest}
    path = stage.directory / "result.json"
    with saving(path):
        write_json(path, {**record, "data": data, **_environment(stage.world)})
    write_status(stage.directory, "complete", run=run)


def _is_complete(stage: Stage) -> bool:
    newest = _newest_checkpoint(stage)
    return identity.is_complete(stage.directory, stage.config, newest, stage.source.digest, stage.log)


def _newest_checkpoint(stage: Stage) -> str | None:
    return checks.what_is_evaluated(stage.config.evaluation, stage.checkpoints_of("pretrain"))


def _enter(stage: Stage, run: str | None, held: contextlib.ExitStack) -> None:
    """Takes the stage's directory for this run and writes down what is run there.

    Raises:
        UserError: when another run has it, or it cannot be written to.
    """

    def enter() -> None:
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
            write_status(stage.directory, "running", run=run)
        except OSError as error:
            raise UserError(f"{stage.directory}: {why_not_written(error, stage.directory, 0)}") from error

    stage.on_rank_0(enter)


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
