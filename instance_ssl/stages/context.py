"""What all stages share: command line → config → group → data → run directory → stage → result.json → exit code."""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
import yaml

from instance_ssl import engine
from instance_ssl.config import DataConfig, ExperimentConfig, flatten, load_config
from instance_ssl.data.datasets import ImageSource, open_source, write_instances
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.ds_config import DeepSpeedSettings, load_ds_config
from instance_ssl.errors import RankError, UserError
from instance_ssl.run_log import RunLog

EXIT_USER_ERROR = 2
EXIT_LOST_PEER = 3

# Sections that a finished or half-finished run may see changed: they do not touch what was learned.
_FREE_KEYS = ("evaluation", "log", "data.num_workers", "data.limit_test", "data.root")
_BOUND_STAGES = ("initialize_classifier", "pretrain")


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
    source: ImageSource
    evaluation_sources: tuple[ImageSource, ImageSource] | None = None

    @property
    def directory(self) -> Path:
        """The stage's own directory."""
        return self.run_directory / self.name

    def checkpoints_of(self, stage: str) -> Path:
        """Where a stage of this run keeps its checkpoints."""
        return self.run_directory / stage / "checkpoints"

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The JSON's precision, for forward passes outside the engine."""
        dtype = self.ds.autocast_dtype
        return torch.autocast(self.world.device.type, dtype) if dtype else contextlib.nullcontext()


class StageSpec(NamedTuple):
    """A stage that a runner offers: its directory's name, what it does, and whether it needs labelled images."""

    name: str
    run: Callable[[Stage], dict[str, Any]]
    needs_labels: bool = False


def run_stages(stages: Sequence[StageSpec], after: Callable[[Stage], None] | None = None) -> int:
    """Runs stages one after another in one process group and returns the process's exit code.

    Stages already complete in the run directory are skipped. `after` is called once all are complete.
    """
    log = RunLog(is_main=comm.launched_rank() == 0)

    def work() -> None:
        context = _open(_parse_arguments(), log, needs_labels=any(spec.needs_labels for spec in stages))
        for spec in stages:
            _run_stage(replace(context, name=spec.name), spec.run)
        if after is not None:
            after(context)
        context.world.barrier()

    return _exit_code(work)


def run_measurement(measure: Callable[[Group], None]) -> int:
    """Runs a measurement, which needs a world but no run directory, and returns the process's exit code."""

    def work() -> None:
        world = comm.initialize()
        measure(world)
        world.barrier()

    return _exit_code(work)


def _exit_code(work: Callable[[], None]) -> int:
    """0 when the work is done; a user's mistake is one line and exit code 2, a lost peer another."""
    try:
        work()
        comm.finalize()
    except UserError as error:
        if comm.launched_rank() == 0 or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        if not isinstance(error, RankError):  # then all ranks are here, and leave together
            comm.finalize()
        return EXIT_USER_ERROR
    except RuntimeError as error:
        if not comm.lost_peer(error):
            raise
        print(f"rank {comm.launched_rank()}: another rank has stopped; stopping too", file=sys.stderr, flush=True)
        time.sleep(5)  # the launcher reports the first exit it sees: let it be the other rank's
        return EXIT_LOST_PEER
    return 0


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what an experiment is."""
    root = Path(__file__).resolve().parents[2]
    parser.add_argument(
        "--config",
        type=Path,
        default=root / "runners/configs/pipeline_digits.yaml",
        help="experiment YAML: what changes the mathematics",
    )
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        default=root / "ds_configs/cpu_float32.json",
        help="DeepSpeed JSON: engine, precision, memory",
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=v", help="override config keys")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--run-dir", type=Path, default=None, help="where the run lies (default: runs/<config name>)")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    return parser.parse_args()


def _open(arguments: argparse.Namespace, log: RunLog, *, needs_labels: bool) -> Stage:
    """Everything that can be refused is refused here, before a file is written."""
    config = load_config(arguments.config, arguments.set)
    ds = load_ds_config(
        arguments.deepspeed_config,
        global_batch_size=config.optimization.global_batch_size,
        max_grad_norm=config.optimization.max_grad_norm,
        world_size=comm.launched_world_size(),
    )
    engine.check_zero_section(ds)
    if needs_labels:
        _check_labels(config)
    run_directory = (arguments.run_dir or Path("runs") / arguments.config.stem).resolve()
    _check_unchanged(config, run_directory)
    world = comm.initialize()
    source = _open_images(config.data, "train", world)
    check_size(config, len(source))
    evaluation_sources = _open_evaluation(config, source, world) if needs_labels else None
    _record_instances(source, run_directory, world)
    log.say(
        f"{len(source):,} images, {world.size} x {world.device.type}; global batch "
        f"{config.optimization.global_batch_size} = {ds.micro_batch_size} images x {ds.accumulation_steps} "
        f"micro-batches x {world.size} ranks, {config.augmentation.num_views} views each; run in {run_directory}"
    )
    return Stage("", run_directory, config, ds, world, log, source, evaluation_sources)


def _open_images(data: DataConfig, split: str, world: Group) -> ImageSource:
    """The images of a split, opened by rank 0 and sent to all: every rank sees the same list."""
    opened: ImageSource | UserError | None = None
    if world.rank == 0:
        limit = data.limit_train if split == "train" else data.limit_test
        try:
            opened = open_source(data.kind, split, root=data.root, list_file=data.list_file, limit=limit)
        except UserError as error:
            opened = UserError(str(error))
    opened = world.broadcast_object(opened)
    if isinstance(opened, UserError):
        raise opened
    assert opened is not None
    return opened


def _check_labels(config: ExperimentConfig) -> None:
    kind = (config.evaluation.data or config.data).kind
    if kind in ("folder", "list"):
        raise UserError(
            f"data.kind {kind} has no labels to evaluate with: point evaluation.data at a labelled set (kind tree), "
            "or run runners/initialize_classifier.py and runners/pretrain.py alone"
        )


def _open_evaluation(config: ExperimentConfig, source: ImageSource, world: Group) -> tuple[ImageSource, ImageSource]:
    """Opens what evaluation will read, so that its mistakes show before the training and not after it."""
    data = config.evaluation.data or config.data
    if data.image_size != config.data.image_size:
        raise UserError(
            f"evaluation.data.image_size {data.image_size} differs from data.image_size {config.data.image_size}, "
            "which the encoder is trained at: set both alike"
        )
    train = source if config.evaluation.data is None else _open_images(data, "train", world)
    test = _open_images(data, "test", world)
    largest = max(config.evaluation.knn.neighbours)
    if largest > len(train):
        raise UserError(f"evaluation.knn.neighbours asks for {largest} of {len(train)} training images")
    return train, test


def check_size(config: ExperimentConfig, num_images: int) -> None:
    """Refuses what this many images are too few for."""
    if config.classifier.num_hard_classes >= num_images:
        raise UserError(
            f"classifier.num_hard_classes {config.classifier.num_hard_classes} must be below the number of images "
            f"{num_images}: a class has only {num_images - 1} others"
        )
    if config.optimization.global_batch_size > num_images:
        raise UserError(
            f"optimization.global_batch_size {config.optimization.global_batch_size} exceeds the {num_images} images"
        )


def _check_unchanged(config: ExperimentConfig, run_directory: Path) -> None:
    """A run directory belongs to one experiment; what was learned under another is not mixed in."""
    for stage in _BOUND_STAGES:
        path = run_directory / stage / "config.yaml"
        if not path.exists():
            continue
        then, now = flatten(load_config(path)), flatten(config)
        for key, value in now.items():
            if then.get(key) != value and not key.startswith(_FREE_KEYS):
                raise UserError(
                    f"{run_directory} holds a run with {key} = {then.get(key)}, not {value}; "
                    "give another --run-dir or the same value"
                )


def _record_instances(source: ImageSource, run_directory: Path, world: Group) -> None:
    """instances.txt and data.json: which image is which class. A run goes on only with the very same list."""
    problem = None
    if world.rank == 0:
        record = {"num_instances": len(source), "digest": source.digest}
        path = run_directory / "data.json"
        try:
            if path.exists() and json.loads(path.read_text()) != record:
                problem = (
                    f"the images have changed since {run_directory} was begun ({path} has another digest): instance "
                    "ids would no longer match the classifier's rows; restore the images or give another --run-dir"
                )
            elif not path.exists():
                run_directory.mkdir(parents=True, exist_ok=True)
                write_instances(source, run_directory / "instances.txt")
                write_json(path, record)
        except OSError as error:
            problem = f"--run-dir {run_directory}: {error.strerror}"
        except ValueError:
            problem = f"{path} is damaged: restore it or give another --run-dir"
    problem = world.broadcast_object(problem)
    if problem is not None:
        raise UserError(problem)


def _run_stage(stage: Stage, function: Callable[[Stage], dict[str, Any]]) -> None:
    result_path = stage.directory / "result.json"
    config_path = stage.directory / "config.yaml"
    done = None
    if stage.world.rank == 0 and result_path.exists():
        same = config_path.exists() and flatten(load_config(config_path)) == flatten(stage.config)
        evaluated = json.loads(result_path.read_text()).get("newest_checkpoint")
        done = stage.name in _BOUND_STAGES or (same and evaluated == _newest_checkpoint_name(stage))
    if stage.world.broadcast_object(done):
        stage.log.say(f"{stage.name}: already complete, see {result_path}")
        return
    if stage.world.rank == 0:
        stage.directory.mkdir(parents=True, exist_ok=True)
        config_path.write_text(yaml.safe_dump(stage.config.model_dump(mode="json"), sort_keys=False))
        section = stage.ds.classifier.model_dump()
        write_json(stage.directory / "ds_config.json", {**stage.ds.engine, "instance_classifier": section})
        write_json(stage.directory / "environment.json", _environment(stage.world))
    started = time.perf_counter()
    with stage.log.metrics_in(stage.directory):
        figures = function(stage)
    if stage.world.rank == 0:
        record = {
            "stage": stage.name,
            **figures,
            "newest_checkpoint": _newest_checkpoint_name(stage),
            "data": {"kind": stage.config.data.kind, "num_instances": len(stage.source), "digest": stage.source.digest},
            "seconds": round(time.perf_counter() - started, 3),
            **_environment(stage.world),
        }
        write_json(result_path, record)
    stage.world.barrier()


def _newest_checkpoint_name(stage: Stage) -> str | None:
    """What an evaluation was of: it is done again when training has gone on since."""
    return max((path.name for path in stage.checkpoints_of("pretrain").glob("step_*")), default=None)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(temporary, path)


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
