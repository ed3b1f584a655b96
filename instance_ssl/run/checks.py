"""What is refused before anything is written: mistakes in what was asked for, and ranks that were asked differently."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import psutil

from instance_ssl.checkpoint.directory import MANIFEST, committed_directories, newest_sound_directory
from instance_ssl.checkpoint.weights import split_choice
from instance_ssl.config.deepspeed import micro_batch_advice
from instance_ssl.config.experiment import DataConfig, EvaluationConfig, ExperimentConfig
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError, shorten, tried
from instance_ssl.run.agreement import on_rank_0, rank_0_alone, share_images
from instance_ssl.run.identity import BOUND_STAGES
from instance_ssl.run.images import open_split
from instance_ssl.run.log import RunLog
from instance_ssl.run.watchdog import launchers_of
from instance_ssl.training import engine

_SAID = 10
# Stages that begin with a checkpoint whatever `evaluation.sources` says.
_READERS = {
    "pretrain": ["initialize_classifier"],
    "update_images": ["initialize_classifier"],
    "evaluate_checkpoints": ["pretrain"],
}
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
                there, here = shorten(value), shorten(by_rank[0][name])
                raise UserError(
                    f"rank {rank} has another {name} than rank 0 ({there}, not {here}): start all "
                    "ranks from the same files with the same flags"
                )


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
    absent = [
        f"{key} {tried(path)} does not exist" for key, path in given.items() if path is not None and not path.exists()
    ]
    other = evaluation.checkpoint
    if (
        other
        and not absent
        and not ((other / MANIFEST).exists() or committed_directories(other / "pretrain/checkpoints"))
    ):
        absent.append(
            f"evaluation.checkpoint {tried(other)} is no checkpoint: give a directory step_… or a run directory"
        )
    for rank, complaints in enumerate(world.all_gather_objects(absent)):
        if complaints:
            raise UserError(complaints[0] + (f" where rank {rank} runs" if rank else ""))


def check_made_before(config: ExperimentConfig, run_directory: Path, stages: Sequence[str], world: Group) -> None:
    """Refuses stages that begin with a checkpoint that is not there and that none before them makes. Collective.

    Asked before any image is looked at. A stage that has a result is let through: it may be complete.

    Raises:
        UserError: naming the stage to run first.
    """

    def check() -> None:
        for place, stage in enumerate(stages):
            for maker in _checkpoints_read(config, stage):
                made = run_directory / maker / "checkpoints", run_directory / stage / "checkpoints"
                done = (run_directory / stage / "result.json").exists() and stage not in BOUND_STAGES
                if not (done or maker in stages[:place] or any(committed_directories(each) for each in made)):
                    raise UserError(absent_checkpoint(run_directory, maker))

    rank_0_alone(check, world)


def absent_checkpoint(run_directory: Path, maker: str) -> str:
    """That a run directory lacks the checkpoint of a stage, and how to come by one."""
    what = {"initialize_classifier": "initialised classifier", "pretrain": "trained encoder"}[maker]
    return (
        f"{run_directory} has no {what}: run runners/{maker}.py first with the same --config and --run-dir, or "
        "runners/pipeline.py for all stages, or give the --run-dir of the run that is meant"
    )


def _checkpoints_read(config: ExperimentConfig, stage: str) -> list[str]:
    """The stages whose checkpoints a stage begins with; what trains whole networks makes its random one itself."""
    if stage in _READERS:
        return _READERS[stage]
    sources = (config.export.source,) if stage == "export" else config.evaluation.sources
    of = {"trained": "pretrain"} if config.evaluation.checkpoint is None else {}
    if stage in ("evaluate_knn", "evaluate_linear", "evaluate_retrieval", "export"):
        of["random"] = "initialize_classifier"
    elif stage not in ("evaluate_fine_tune", "evaluate_semi_supervised", "evaluate_detection"):
        return []
    return [of[source] for source in sources if source in of]


def check_run_to_export(config: ExperimentConfig, run_directory: Path, world: Group) -> None:
    """Refuses the default run directory where it has no encoder to export: --run-dir was forgotten. Collective."""

    def check() -> None:
        for maker in _checkpoints_read(config, "export"):
            if not committed_directories(run_directory / maker / "checkpoints"):
                raise UserError(
                    f"--run-dir is not given, and {run_directory}, its default for this --config, has no checkpoint of "
                    f"{maker}: give the --run-dir of the training, or set evaluation.checkpoint, or "
                    "export.source=weights with evaluation.weights"
                )

    rank_0_alone(check, world)


def what_is_evaluated(evaluation: EvaluationConfig, own_checkpoints: Path) -> str | None:
    """What an evaluation is of: it is done again when training has gone on since, or a file given has changed."""
    newest = newest_sound_directory(own_checkpoints)
    names = [] if newest is None else [newest.name]
    if evaluation.checkpoint is not None:
        newest = newest_sound_directory(evaluation.checkpoint / "pretrain/checkpoints")
        names.append(str(newest or evaluation.checkpoint))
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
        fitting = ",".join(str(k) for k in dict.fromkeys(min(k, len(train)) for k in config.evaluation.knn.neighbours))
        raise UserError(
            f"evaluation.knn.neighbours asks for {largest} of {len(train)} training images: "
            f"set evaluation.knn.neighbours=[{fitting}]"
        )
    return train, test


def check_size(config: ExperimentConfig, num_images: int, micro_batch_size: int, world_size: int, path: Path) -> None:
    """Refuses what this many images are too few for, naming settings that fit them.

    Args:
        path: the DeepSpeed JSON, whose micro-batch may have to shrink too.
    """
    if num_images < max(2, world_size):
        raise UserError(
            f"{num_images} images cannot be divided over {world_size} ranks: each needs a class of its own, and a "
            "class another one; start fewer ranks or give more images"
        )
    hard, batch = config.classifier.num_hard_classes, config.optimization.global_batch_size
    wrong, overrides, micro_batch = [], [], micro_batch_size
    if batch > num_images:
        wrong.append(
            f"optimization.global_batch_size {batch} exceeds the {num_images} images: a batch holds an image once at "
            "most"
        )
        batch, micro_batch = _batch_that_fits(num_images, micro_batch_size, world_size)
        overrides.append(f"optimization.global_batch_size={batch}")
    if hard >= num_images:
        wrong.append(
            f"classifier.num_hard_classes {hard} must be below the number of images {num_images}: a class has only "
            f"{num_images - 1} others"
        )
        overrides.append(f"classifier.num_hard_classes={max(1, num_images // 10)}")
    if wrong:
        smaller = "" if micro_batch == micro_batch_size else f" and {micro_batch_advice(micro_batch, path)}"
        raise UserError(f"{'; '.join(wrong)}; this fits: --set {' '.join(overrides)}{smaller}")


def _batch_that_fits(num_images: int, micro_batch_size: int, world_size: int) -> tuple[int, int]:
    """Global batch and micro-batch for a small set: two steps an epoch or more, and no more than 512 images each."""
    half = num_images // 2
    if micro_batch_size * world_size > half:
        micro_batch_size = 2 ** (max(1, half // world_size).bit_length() - 1)
    at_once = micro_batch_size * world_size
    return at_once * max(1, min(512, half) // at_once), micro_batch_size


def check_micro_batch(config: ExperimentConfig, micro_batch_size: int) -> None:
    """Refuses a micro-batch that the head's batch norm has no variance of."""
    if config.model.projection == "mlp_bn" and micro_batch_size * config.augmentation.num_views == 1:
        raise UserError("model.projection mlp_bn needs two views a micro-batch: raise train_micro_batch_size_per_gpu")


def say_left_out(sources: Iterable[ImageSource], log: RunLog) -> None:
    """Logs which images are excluded because they cannot be read: some by name, then how many."""
    for source in sources:
        for line in source.left_out[:_SAID]:
            log.say(f"excluded, it cannot be read: {line}")
        if len(source.left_out) > _SAID:
            log.say(f"excluded, they cannot be read: {len(source.left_out) - _SAID:,} more images")


def versions_in_use() -> str:
    """What must be alike on all nodes: the libraries, and this project's own code."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    libraries = ", ".join(f"{name} {version}" for name, version in engine.versions().items())
    return f"{libraries}, instance_ssl {digest.hexdigest()[:12]}"
