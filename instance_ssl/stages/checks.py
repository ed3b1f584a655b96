"""What is refused before anything is written: mistakes in what was asked for, and ranks that were asked differently."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import psutil

from instance_ssl import engine
from instance_ssl.checkpoint_files import committed_directories
from instance_ssl.config import DataConfig, EvaluationConfig, ExperimentConfig, flatten, load_config
from instance_ssl.data.sources import ImageSource
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.guard import launchers_of
from instance_ssl.images import open_split
from instance_ssl.run_log import RunLog
from instance_ssl.stages.sharing import on_rank_0, share_images
from instance_ssl.weights import split_choice

# Keys that may change while a run goes on: they do not touch what was learned. All others are bound.
FREE_KEYS = (
    *("evaluation", "export", "log", "checkpoint", "safety"),
    *("data.num_workers", "data.augment_on", "data.limit_test", "data.root", "data.shards"),
    *("data.on_broken", "data.max_broken_share", "data.allow_lost"),
)
_SAID = 10
BOUND_STAGES = ("initialize_classifier", "pretrain")
# They read an encoder alone: neither the training's batch nor W has to fit the images or the ranks.
READING_STAGES = ("export", "evaluate_knn", "evaluate_linear", "evaluate_retrieval")


def check_hostfile() -> None:
    """Refuses a hostfile that is not there, with which DeepSpeed would train on this machine alone.

    Raises:
        UserError: naming it.
    """
    for launcher in launchers_of(psutil.Process()):
        arguments = launcher.cmdline()
        for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
            if argument in ("-H", "--hostfile") or argument.startswith("--hostfile="):
                name = argument.partition("=")[2] or following
                if not (Path(launcher.cwd()) / name).is_file():
                    raise UserError(
                        f"--hostfile {name} does not exist: DeepSpeed would train on this machine alone; give the "
                        "right path, or leave the flag out for one machine"
                    )


def check_ranks_agree(fields: dict[str, str], world: Group) -> None:
    """Refuses ranks that were started with different things, as a node with an old copy of the project is.

    Args:
        fields: by name, what must be equal on all ranks.

    Raises:
        UserError: naming the field and the rank.
    """
    by_rank = world.all_gather_objects(fields)
    for rank, theirs in enumerate(by_rank):
        for name, value in theirs.items():
            if value != by_rank[0][name]:
                there, here = _shorten(value), _shorten(by_rank[0][name])
                raise UserError(
                    f"rank {rank} has another {name} than rank 0 ({there}, not {here}): start all "
                    "ranks from the same files with the same flags"
                )


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def config_digest(config: ExperimentConfig) -> str:
    """SHA-256 of all keys that a run is bound to."""
    bound = {key: value for key, value in flatten(config).items() if not key.startswith(FREE_KEYS)}
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def open_images(
    data: DataConfig,
    split: Literal["train", "test"],
    world: Group,
    log: RunLog,
    arrange: Callable[[ImageSource], ImageSource] = lambda images: images,
) -> ImageSource:
    """The images of a split, opened by rank 0 and sent to all: every rank sees the same list.

    Args:
        log: is told that it takes long.
        arrange: what rank 0 does with them first.

    Raises:
        UserError: for what cannot be opened, or where another rank's disk does not hold the same files.
    """

    def open_all() -> ImageSource | UserError:
        try:
            return arrange(open_split(data, split))
        except UserError as error:
            return UserError(str(error))

    def say(seconds: float) -> None:
        log.on_progress()
        log.say(f"{split} images: rank 0 looks at every file or shard, {seconds:.0f} s so far")

    images = share_images(on_rank_0(open_all, world, say), world)
    for remark in images.remarks:
        log.say(f"{split} images: {remark}")
    problem = images.missing_here()
    problems = [f"rank {rank}: {text}" for rank, text in enumerate(world.all_gather_objects(problem)) if text]
    if problems:
        raise UserError(f"data.root: {problems[0]}; every node needs the same images at the same path")
    return images


def check_labels(config: ExperimentConfig) -> None:
    """Refuses to evaluate with images that have no labels."""
    kind = (config.evaluation.data or config.data).kind
    if kind in ("folder", "list"):
        raise UserError(
            f"data.kind {kind} has no labels to evaluate with: point evaluation.data at a labelled set (kind tree), "
            "or leave the evaluations out: runners/pipeline.py --stages initialize_classifier pretrain"
        )


def check_sources(evaluation: EvaluationConfig, world: Group) -> None:
    """Refuses a file or checkpoint to evaluate that is not there, on any rank, before anything is trained. Collective.

    Raises:
        UserError: naming the key and the path.
    """
    weights = None if evaluation.weights is None else split_choice(evaluation.weights)[0]
    given = {"evaluation.weights": weights, "evaluation.checkpoint": evaluation.checkpoint}
    absent = [f"{key} {path} does not exist" for key, path in given.items() if path is not None and not path.exists()]
    for rank, complaints in enumerate(world.all_gather_objects(absent)):
        if complaints:
            raise UserError(complaints[0] + (f" where rank {rank} runs" if rank else ""))


def check_run_to_export(config: ExperimentConfig, run_directory: Path, world: Group) -> None:
    """Refuses the default run directory where it has no encoder to export: --run-dir was forgotten. Collective."""
    stage = {"trained": "pretrain", "random": "initialize_classifier"}.get(config.export.source)
    if stage is None or (stage == "pretrain" and config.evaluation.checkpoint is not None):
        return
    absent = world.rank == 0 and not committed_directories(run_directory / stage / "checkpoints")
    if world.broadcast_object(absent):
        raise UserError(
            f"--run-dir is not given, and {run_directory}, its default for this --config, has no checkpoint of "
            f"{stage}: give the --run-dir of the training, or set evaluation.checkpoint, or export.source=weights with "
            "evaluation.weights"
        )


def what_is_evaluated(evaluation: EvaluationConfig, own_checkpoints: Path) -> str | None:
    """What an evaluation is of: it is done again when training has gone on since, or a file given has changed."""
    names = [path.name for path in committed_directories(own_checkpoints)[:1]]
    if evaluation.checkpoint is not None:
        others = committed_directories(evaluation.checkpoint / "pretrain/checkpoints")
        names.append(str(others[0] if others else evaluation.checkpoint))
    if evaluation.weights is not None:
        status = split_choice(evaluation.weights)[0].stat()
        names.append(f"{evaluation.weights} of {status.st_size} bytes and time {status.st_mtime_ns}")
    return ", ".join(names) or None


def open_evaluation(
    config: ExperimentConfig, source: ImageSource, world: Group, log: RunLog
) -> tuple[ImageSource, ImageSource]:
    """Opens what evaluation will read, so that its mistakes show before the training and not after it."""
    data = config.evaluation.data or config.data
    if data.image_size != config.data.image_size:
        raise UserError(
            f"evaluation.data.image_size {data.image_size} differs from data.image_size {config.data.image_size}, "
            "which the encoder is trained at: set both alike"
        )
    try:
        train = source if config.evaluation.data is None else open_images(data, "train", world, log)
        test = open_images(data, "test", world, log)
    except UserError as mistake:
        if config.evaluation.data is None:
            raise
        raise UserError(f"evaluation.data: {mistake}") from None
    if train.labels is None or test.labels is None:
        raise UserError(
            f"data.kind {data.kind}: these images have no labels to evaluate with (.cls files beside them in the "
            "tar): point evaluation.data at a labelled set"
        )
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
            f"optimization.global_batch_size {config.optimization.global_batch_size} exceeds the {num_images} images: "
            "a batch holds an image once at most; 64 to 512 suit a small set"
        )


def check_micro_batch(config: ExperimentConfig, micro_batch_size: int) -> None:
    """Refuses a micro-batch that the head's batch norm has no variance of."""
    if config.model.projection == "mlp_bn" and micro_batch_size * config.augmentation.num_views == 1:
        raise UserError("model.projection mlp_bn needs two views a micro-batch: raise train_micro_batch_size_per_gpu")


def check_unchanged(config: ExperimentConfig, run_directory: Path) -> None:
    """A run directory belongs to one experiment; what was learned under another is not mixed in."""
    for stage in BOUND_STAGES:
        path = run_directory / stage / "config.yaml"
        if not path.exists():
            continue
        then, now = flatten(load_config(path)), flatten(config)
        changed = [key for key, value in now.items() if then.get(key) != value and not key.startswith(FREE_KEYS)]
        if changed:
            key, others = changed[0], changed[1:]
            more = f" (and {', '.join(others)})" if others else ""
            raise UserError(
                f"{run_directory} holds a run with {key} = {then.get(key)}, not {now[key]}{more}; give another "
                f"--run-dir or the same value (only {', '.join(FREE_KEYS)} may change in a run)"
            )


def say_left_out(sources: Iterable[ImageSource], log: RunLog) -> None:
    """Says which images could not be read when the sources were opened: some by name, then how many."""
    for source in sources:
        for line in source.left_out[:_SAID]:
            log.say(f"left out, it cannot be read: {line}")
        if len(source.left_out) > _SAID:
            log.say(f"left out, they cannot be read: {len(source.left_out) - _SAID:,} more images")


def versions_in_use() -> str:
    """What must be alike on all nodes: the libraries, and this project's own code."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    libraries = ", ".join(f"{name} {version}" for name, version in engine.versions().items())
    return f"{libraries}, instance_ssl {digest.hexdigest()[:12]}"
