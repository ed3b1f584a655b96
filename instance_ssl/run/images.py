"""Opens the images that a section `data` of the configuration names, the same on all ranks."""

from collections.abc import Callable
from typing import Literal

from instance_ssl.config.data import DataConfig
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.data.datasets import kept_indices, open_source
from instance_ssl.data.decode import Rendering
from instance_ssl.data.folders import existing_root, find_layout, missing_here
from instance_ssl.data.held_out import split_by_class
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.data.list_changes import taken
from instance_ssl.data.unreadable_images import OnBroken
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.run.agreement import on_rank_0, rank_0_alone, together
from instance_ssl.run.automatic import Choice
from instance_ssl.run.log import RunLog


def open_split(data: DataConfig, split: Literal["train", "test"]) -> ImageSource:
    """Opens the training or the test images; a `UserError` names the key and the path at fault."""
    return open_source(
        data.kind,
        split,
        root=data.root,
        list_file=data.list_file,
        limit=data.limit_train if split == "train" else data.limit_test,
        shards=data.shards,
        on_broken=broken_policy(data),
        rendering=rendering_of(data),
    )


def kind_below(data: DataConfig) -> Choice:
    """Chooses `data.kind` by the folders below the root; a `UserError` says that it cannot be listed."""
    return Choice("data.kind", *find_layout(existing_root(data.root, "auto")))


def find_kind(data: DataConfig, world: Group, log: RunLog) -> Choice:
    """Chooses `data.kind` by the folders below the root, as rank 0 sees them. Collective."""

    def say(seconds: float) -> None:
        log.on_progress()
        log.say(f"rank 0 is looking for class folders, {seconds:.0f} s so far")

    found: Choice = world.broadcast_object(together(lambda: on_rank_0(lambda: kind_below(data), world, say), world))
    return found


def open_images(
    data: DataConfig,
    split: Literal["train", "test"],
    world: Group,
    log: RunLog,
    arrange: Callable[[ImageSource], ImageSource] = lambda images: images,
) -> ImageSource | None:
    """Opens a split on rank 0, for `agreement.share_images`; None on other ranks. Collective; writes nothing.

    Args:
        log: reports when it takes long.
        arrange: applied by rank 0 first.

    Raises:
        UserError: the images cannot be opened, or another rank's disk does not hold the same files.
    """

    def say(seconds: float) -> None:
        log.on_progress()
        log.say(f"{split} images: rank 0 is reading every file or shard, {seconds:.0f} s so far")

    images = together(lambda: on_rank_0(lambda: arrange(open_split(data, split)), world, say), world)
    for remark in () if images is None else images.remarks:
        log.say(f"{split} images: {remark}")
    problem = missing_here(world.broadcast_object(None if images is None else images.probes()))
    problems = [f"rank {rank}: {text}" for rank, text in enumerate(world.all_gather_objects(problem)) if text]
    if problems:
        raise UserError(f"data.root: {problems[0]}; every node needs the same images at the same path")
    return images


def open_evaluation(
    config: ExperimentConfig, source: ImageSource | None, world: Group, log: RunLog
) -> tuple[ImageSource | None, ImageSource | None]:
    """Opens the training and test images of evaluations, so that mistakes show before the training. Collective.

    Args:
        source: the images to train on; None on all ranks but 0, as in what is returned.

    Raises:
        UserError: naming the key.
    """
    data = config.evaluation.data or config.data
    try:
        train = source if config.evaluation.data is None else open_images(data, "train", world, log)
        if holds_out(config):
            return _held_out(config, train, world, log)
        test = open_images(data, "test", world, log)
    except UserError as mistake:
        if config.evaluation.data is None:
            raise
        raise UserError(f"evaluation.data: {mistake}") from None
    rank_0_alone(lambda: _check_labelled(data.kind, train, test), world)
    return train, test


def holds_out(config: ExperimentConfig) -> bool:
    """Whether evaluations test on a part of images that have no test part of their own, and train on the rest."""
    return (config.evaluation.data or config.data).kind == "class_folders"


def _held_out(
    config: ExperimentConfig, whole: ImageSource | None, world: Group, log: RunLog
) -> tuple[ImageSource | None, ImageSource | None]:
    """The images of class folders in two parts, on rank 0. Collective."""
    data = config.evaluation.data or config.data

    def split() -> tuple[ImageSource, ImageSource] | None:
        if whole is None:
            return None
        train, test = split_by_class(whole, config.seed)
        return train, taken(test, kept_indices(data.limit_test, "test", len(test)))

    parts = together(split, world)
    if parts is None:
        return None, None
    trained = "" if config.evaluation.data else "; pretraining sees all images, without their labels"
    log.say(
        f"evaluation: {len(parts[1]):,} images, a fifth of each class drawn with seed {config.seed}, are held out to "
        f"test on, and {len(parts[0]):,} compared with{trained}"
    )
    return parts


def _check_labelled(kind: str, train: ImageSource | None, test: ImageSource | None) -> None:
    if train is None or train.labels is None or test is None or test.labels is None:
        raise UserError(
            f"data.kind {kind}: these images have no labels to evaluate with (.cls files beside them in the tar): "
            "point evaluation.data at a labelled set"
        )


def check_evaluation(config: ExperimentConfig, num_images: int) -> None:
    """Refuses settings of evaluations that do not fit the encoder, or the images that they compare with."""
    size = (config.evaluation.data or config.data).image_size
    if size != config.data.image_size:
        raise UserError(
            f"evaluation.data.image_size {size} differs from data.image_size {config.data.image_size}, "
            "which the encoder is trained at: set both to the same"
        )
    neighbours = config.evaluation.knn.neighbours
    if max(neighbours) > num_images:
        fitting = ",".join(str(k) for k in dict.fromkeys(min(k, num_images) for k in neighbours))
        raise UserError(
            f"evaluation.knn.neighbours asks for {max(neighbours)} of {num_images} training images: "
            f"set evaluation.knn.neighbours=[{fitting}]"
        )


def broken_policy(data: DataConfig) -> OnBroken:
    """Returns how unreadable files are treated."""
    return OnBroken(data.on_broken == "skip", data.max_broken_share)


def rendering_of(data: DataConfig) -> Rendering:
    """Returns how orientation and transparency are treated."""
    return Rendering(upright=data.exif == "upright", on_white=data.alpha == "white")
