"""What is evaluated: raw pixels, the random network or the trained one, as a function from images to features."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from instance_ssl import faults
from instance_ssl.checkpoint import ENCODER_FILES, Checkpoint, load_encoder, newest_checkpoint
from instance_ssl.config import DataConfig
from instance_ssl.data.augmentations import Transform, centre_view
from instance_ssl.data.datasets import ImageSource
from instance_ssl.data.loaders import Batch, image_loader
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError
from instance_ssl.evaluation.features import extract_features
from instance_ssl.models.encoder import Encoder
from instance_ssl.stages.build import seeded_encoder
from instance_ssl.stages.context import Stage
from instance_ssl.stages.session import say_what_was_passed_over

_PROJECTED_ROWS = 16384
TITLES = {"pixels": "raw pixels", "random": "random network", "trained": "trained"}


@dataclass(frozen=True)
class Representation:
    """A frozen map from images (b, 3, S, S) to features (b, F).

    Attributes:
        source: pixels, random or trained.
        features: the map.
        feature_dim: F.
        encoder: the network behind it, if any.
        epoch: epochs it was trained, None for pixels.
        layer: what the features are, for result.json.
    """

    source: str
    features: Callable[[Tensor], Tensor]
    feature_dim: int
    encoder: Encoder | None
    epoch: int | None
    layer: str


@dataclass(frozen=True)
class LabelledImages:
    """Train and test images with labels, and how their classes are counted."""

    train: ImageSource
    test: ImageSource
    train_labels: Tensor
    test_labels: Tensor
    num_classes: int


def open_labelled(stage: Stage) -> LabelledImages:
    """The labelled images that `evaluation.data` (or else `data`) names."""
    assert stage.evaluation_sources is not None  # opened at the start for stages that need labels
    train, test = stage.evaluation_sources
    assert train.labels is not None  # kinds without labels were refused at the start
    assert test.labels is not None
    device = stage.world.device
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    return LabelledImages(train, test, train.labels.to(device), test.labels.to(device), num_classes)


def evaluation_data(stage: Stage) -> DataConfig:
    """The data section that evaluation reads."""
    return stage.config.evaluation.data or stage.config.data


def represent(stage: Stage, source: str) -> Representation:
    """The representation of one of `evaluation.sources`.

    Raises:
        UserError: when the stage that makes it has not been run.
    """
    if source == "pixels":
        feature_dim = 3 * evaluation_data(stage).image_size ** 2
        return Representation(source, _pixels, feature_dim, None, None, "pixels, normalised by channel")
    made_by = {"random": "initialize_classifier", "trained": "pretrain"}[source]
    checkpoint = newest_checkpoint(stage.checkpoints_of(made_by), stage.world, ENCODER_FILES)
    if checkpoint is None:
        raise UserError(f"{stage.run_directory} has no {TITLES[source]} encoder: run runners/{made_by}.py first")
    say_what_was_passed_over(stage, checkpoint)
    return represent_checkpoint(stage, source, checkpoint)


def represent_checkpoint(stage: Stage, source: str, checkpoint: Checkpoint) -> Representation:
    """The representation by a checkpoint's encoder."""
    encoder = _load_frozen(stage, checkpoint)

    def features(images: Tensor) -> Tensor:
        with stage.autocast():
            return encoder.features(images)

    return Representation(source, features, encoder.feature_dim, encoder, checkpoint.position.epoch, "backbone output")


def own_batches(stage: Stage, images: ImageSource, view: Transform) -> Iterable[Batch]:
    """This rank's contiguous part of the images, in batches; nothing dropped, nothing twice."""
    start, stop = Partition(len(images), stage.world.size).bounds(stage.world.rank)
    size = stage.config.evaluation.batch_size
    batches = [range(first, min(first + size, stop)) for first in range(start, stop, size)]
    return image_loader(images, view, batches, evaluation_data(stage).num_workers)


def cached_features(stage: Stage, representation: Representation, images: ImageSource, label: str) -> Tensor:
    """Features (n, F) of this rank's contiguous part of the images, of the evaluation view."""
    batches = own_batches(stage, images, centre_view(evaluation_data(stage).image_size))
    with stage.log.progress(label, len(images), "images") as progress:

        def on_batch(count: int) -> None:
            faults.reach("evaluate", stage.world.rank)
            progress.advance(count * stage.world.size)  # rank 0 speaks for all: the others are as far as it is
            stage.guard.check()

        features_nF, _ = extract_features(
            representation.features, batches, representation.feature_dim, stage.world.device, on_batch=on_batch
        )
    return features_nF


def embeddings_of(stage: Stage, representation: Representation, features_nF: Tensor) -> Tensor | None:
    """The projection's output (n, D), float32, of cached features; None where there is no projection."""
    encoder = representation.encoder
    if encoder is None:
        return None
    with torch.inference_mode(), stage.autocast():
        blocks = [encoder.projection(block_bF).float() for block_bF in features_nF.split(_PROJECTED_ROWS)]
    return torch.cat(blocks)


@contextmanager
def search_progress(stage: Stage, label: str, num_queries: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of a search by all ranks together; what it yields is told of each chunk of queries. Collective."""
    with stage.log.progress(label, num_queries, "queries") as progress:

        def on_chunk(count: int) -> None:
            progress.advance(count)
            stage.check_together()

        yield on_chunk


def labels_of_own_part(stage: Stage, labels_N: Tensor) -> Tensor:
    """The labels of this rank's contiguous part."""
    start, stop = Partition(len(labels_N), stage.world.size).bounds(stage.world.rank)
    return labels_N[start:stop]


def _load_frozen(stage: Stage, checkpoint: Checkpoint) -> Encoder:
    encoder = seeded_encoder(stage.config)
    encoder.load_state_dict(stage.together(lambda: load_encoder(checkpoint))[0])
    return encoder.to(stage.world.device).eval().requires_grad_(False)


def _pixels(images: Tensor) -> Tensor:
    """Pixels as the encoder sees them, normalised by channel: raw ones in [0, 1] compare little but brightness."""
    return images.flatten(1)
