"""What is evaluated: pixels, the random network, a trained one or a weights file, as a function images → features."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from instance_ssl.checkpoint.state import ENCODER_FILES, Checkpoint, checkpoint_at, load_encoder, newest_checkpoint
from instance_ssl.checkpoint.weights import backbone_network, load_state, read_weights
from instance_ssl.config.data import DataConfig
from instance_ssl.config.evaluation import KnnConfig
from instance_ssl.data.augmentations import Transform, centre_view
from instance_ssl.data.folders import escape
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.data.loaders import Batch, image_loader
from instance_ssl.data.sampler import consecutive_batches
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError
from instance_ssl.evaluation.features import extract_features
from instance_ssl.evaluation.knn import knn_accuracy
from instance_ssl.models.encoder import Encoder
from instance_ssl.run.build import seeded_encoder
from instance_ssl.run.checks import absent_checkpoint
from instance_ssl.run.resumption import log_oddities
from instance_ssl.run.stage import Stage

TITLES = {"pixels": "raw pixels", "random": "random network", "trained": "trained", "weights": "weights file"}
_PROJECTED_ROWS = 16384
_NAMED = 5


@dataclass(frozen=True)
class Representation:
    """A frozen map from images (b, 3, S, S) to features (b, F).

    Attributes:
        source: pixels, random, trained or weights.
        features: the map.
        feature_dim: F.
        encoder: the network behind it, if any.
        epoch: epochs it was trained; None for pixels and weights.
        layer: what the features are, for result.json.
        origin: the checkpoint or file that the encoder is of, for result.json.
    """

    source: str
    features: Callable[[Tensor], Tensor]
    feature_dim: int
    encoder: Encoder | None
    epoch: int | None
    layer: str
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelledImages:
    """Train and test images with labels, and how their classes are counted."""

    train: ImageSource
    test: ImageSource
    train_labels: Tensor
    test_labels: Tensor
    num_classes: int

    @property
    def label_digest(self) -> str:
        """Of all labels; the images' own digests are of names and sizes."""
        labels = torch.cat([self.train_labels, self.test_labels]).cpu()
        return hashlib.sha256(labels.numpy().tobytes()).hexdigest()


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
    """The representation of one of `evaluation.sources`. Collective.

    Raises:
        UserError: when the stage that makes it has not been run, or the file or checkpoint given does not fit.
    """
    if source == "pixels":
        feature_dim = 3 * evaluation_data(stage).image_size ** 2
        return Representation(source, _pixels, feature_dim, None, None, "pixels, normalised by channel")
    return _frozen(stage, source, *_load(stage, source))


def represent_checkpoint(stage: Stage, source: str, checkpoint: Checkpoint) -> Representation:
    """The representation by a checkpoint's encoder. Collective.

    Raises:
        UserError: when it does not fit.
    """
    return _frozen(stage, source, *_load_checkpoint(stage, checkpoint))


def load_backbone(stage: Stage, source: str) -> tuple[Encoder, int | None]:
    """An encoder to be trained further, and the epochs it was trained: 0 when random, None when of a file. Collective.

    In training mode, unfrozen, on the stage's device. Its projection is the random one for `weights`.

    Args:
        source: `random` is the network of the experiment's seed as it is made, from scratch: no stage has to be run
            before, and batch norm's running statistics are 0 and 1. `trained` and `weights` as for `represent`.

    Raises:
        UserError: when training has not been run, or the file or checkpoint given does not fit.
        ValueError: for pixels, which have no encoder.
    """
    if source == "pixels":
        raise ValueError("pixels have no encoder")
    if source == "random":
        return seeded_encoder(stage.config).to(stage.world.device), 0
    encoder, epoch, _ = _load(stage, source)
    return encoder, epoch


def own_batches(stage: Stage, images: ImageSource, view: Transform) -> Iterable[Batch]:
    """This rank's contiguous part of the images, in batches; nothing dropped, nothing twice.

    An image that cannot be read is an error whatever `data.on_broken` says: figures are of all images or of none.
    """
    start, stop = Partition(len(images), stage.world.size).bounds(stage.world.rank)
    size = stage.config.evaluation.batch_size
    batches = consecutive_batches(start, stop, size)
    return image_loader(images, view, batches, evaluation_data(stage).num_workers)


def cached_features(stage: Stage, representation: Representation, images: ImageSource, label: str) -> Tensor:
    """Features (n, F) of this rank's contiguous part of the images, of the evaluation view."""
    batches = own_batches(stage, images, centre_view(evaluation_data(stage).image_size))
    with stage.log.progress(label, len(images), "images") as progress:

        def on_batch(count: int) -> None:
            progress.advance(count * stage.world.size)  # rank 0 speaks for all: the others are as far as it is
            stage.guard.check()

        features_nF, _ = extract_features(
            representation.features, batches, representation.feature_dim, stage.world.device, on_batch=on_batch
        )
    return features_nF


def embeddings_of(stage: Stage, representation: Representation, features_nF: Tensor) -> Tensor | None:
    """The projection's output (n, D), float32, of cached features; None where no projection belongs to them."""
    encoder = representation.encoder
    if encoder is None or representation.source == "weights":  # a file of weights has none
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


def vote(
    stage: Stage, images: LabelledImages, train_nF: Tensor, test_mF: Tensor, knn: KnnConfig, label: str
) -> dict[tuple[int, float], dict[str, float]]:
    """k-NN accuracies by (k, temperature) of this rank's features of the labelled images. Collective."""
    with search_progress(stage, label, len(images.test)) as on_chunk:
        return knn_accuracy(
            train_nF,
            labels_of_own_part(stage, images.train_labels),
            test_mF,
            labels_of_own_part(stage, images.test_labels),
            stage.world,
            neighbours=knn.neighbours,
            temperatures=knn.temperatures,
            num_classes=images.num_classes,
            on_chunk=on_chunk,
        )


def labels_of_own_part(stage: Stage, labels_N: Tensor) -> Tensor:
    """The labels of this rank's contiguous part."""
    start, stop = Partition(len(labels_N), stage.world.size).bounds(stage.world.rank)
    return labels_N[start:stop]


def _frozen(stage: Stage, source: str, encoder: Encoder, epoch: int | None, origin: dict[str, Any]) -> Representation:
    encoder.eval().requires_grad_(False)

    def features(images: Tensor) -> Tensor:
        with stage.autocast():
            return encoder.features(images)

    return Representation(source, features, encoder.feature_dim, encoder, epoch, "backbone output", origin)


def _load(stage: Stage, source: str) -> tuple[Encoder, int | None, dict[str, Any]]:
    """Encoder, epoch and origin of random (of the prior's pass), trained or weights."""
    if source == "weights":
        encoder, origin = _load_weights(stage)
        return encoder, None, origin
    return _load_checkpoint(stage, _checkpoint(stage, source))


def _load_checkpoint(stage: Stage, checkpoint: Checkpoint) -> tuple[Encoder, int | None, dict[str, Any]]:
    encoder = seeded_encoder(stage.config)
    stage.together(lambda: load_state(encoder, load_encoder(checkpoint)[0], str(checkpoint.directory)))
    position = checkpoint.position
    origin = {
        "checkpoint": str(checkpoint.directory),
        "step": position.step,
        "num_instances": position.num_instances,
        "data_digest": position.digests.get("images"),
    }
    return encoder.to(stage.world.device), position.epoch, origin


def _checkpoint(stage: Stage, source: str) -> Checkpoint:
    """The checkpoint that `random` or `trained` means."""
    made_by = {"random": "initialize_classifier", "trained": "pretrain"}[source]
    other = stage.config.evaluation.checkpoint
    if source == "trained" and other is not None:
        checkpoint = checkpoint_at(other, stage.world, ENCODER_FILES)
        stage.log.say(f"trained: {checkpoint.directory}, epoch {checkpoint.position.epoch}")
    else:
        newest = newest_checkpoint(stage.checkpoints_of(made_by), stage.world, ENCODER_FILES)
        if newest is None:
            raise UserError(absent_checkpoint(stage.run_directory, made_by))
        checkpoint = newest
    log_oddities(checkpoint, stage)
    return checkpoint


def _load_weights(stage: Stage) -> tuple[Encoder, dict[str, Any]]:
    """The encoder with the backbone of `evaluation.weights`, which every rank reads for itself, and the file's hash."""
    path = stage.config.evaluation.weights
    if path is None:
        raise UserError("source 'weights' needs a file: set evaluation.weights")
    weights = stage.together(lambda: read_weights(path))
    if len(set(stage.world.all_gather_objects(weights.sha256))) > 1:
        raise UserError(f"evaluation.weights {path} is not the same file on all nodes")
    encoder = seeded_encoder(stage.config)
    stage.together(lambda: load_state(backbone_network(encoder.backbone), weights.state, f"evaluation.weights {path}"))
    aside = f"; left aside: {escape(', '.join(weights.aside[:_NAMED]))}" if weights.aside else ""
    more = f" and {len(weights.aside) - _NAMED} more" if len(weights.aside) > _NAMED else ""
    prefix = f" ({escape(weights.prefix)}*)" if weights.prefix else ""
    stage.log.say(f"weights: {path}{prefix}, sha256 {weights.sha256[:12]}{aside}{more}")
    return encoder.to(stage.world.device), {"file": str(path), "sha256": weights.sha256, "prefix": weights.prefix}


def _pixels(images: Tensor) -> Tensor:
    """Pixels as the encoder sees them, normalised by channel: raw ones in [0, 1] compare little but brightness."""
    return images.flatten(1)
