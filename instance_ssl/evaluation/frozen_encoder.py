"""The representations that are evaluated: pixels, the random or trained network, or a file of weights."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from instance_ssl.checkpoint.state import ENCODER_FILES, Checkpoint, checkpoint_at, load_encoder, newest_checkpoint
from instance_ssl.checkpoint.weights import load_state
from instance_ssl.config.data import DataConfig
from instance_ssl.config.evaluation import KnnConfig
from instance_ssl.data.augmentations import centre_view
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.data.loaders import Batch, image_loader
from instance_ssl.data.sampler import LazyBatches, consecutive_batches
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError
from instance_ssl.evaluation.features import extract_features
from instance_ssl.evaluation.knn import knn_accuracy
from instance_ssl.models.encoder import Encoder
from instance_ssl.run.build import seeded_encoder
from instance_ssl.run.checks import absent_checkpoint
from instance_ssl.run.given_weights import load_file
from instance_ssl.run.resumption import log_oddities
from instance_ssl.run.stage import Stage

_TITLES = {"pixels": "raw pixels", "random": "random network", "trained": "trained", "weights": "weights file"}
_PROJECTED_ROWS = 16384


@dataclass(frozen=True)
class Representation:
    """A frozen map from images (b, 3, S, S) to features (b, F).

    Attributes:
        source: pixels, random, trained or weights.
        features: the map.
        feature_dim: F.
        encoder: its network, None for pixels.
        epoch: epochs that it was trained; None for pixels and weights.
        layer: names the features in result.json.
        origin: the encoder's checkpoint or file, for result.json.
    """

    source: str
    features: Callable[[Tensor], Tensor]
    feature_dim: int
    encoder: Encoder | None
    epoch: int | None
    layer: str
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """What the features are, for result.json."""
        return {"layer": self.layer, "epoch": self.epoch, "origin": self.origin}


@dataclass(frozen=True)
class LabelledImages:
    """Train and test images with their labels, 0 … num_classes - 1."""

    train: ImageSource
    test: ImageSource
    train_labels: Tensor
    test_labels: Tensor
    num_classes: int

    @property
    def label_digest(self) -> str:
        """SHA-256 of all labels; the images' digests cover their names and sizes."""
        labels = torch.cat([self.train_labels, self.test_labels]).cpu()
        return hashlib.sha256(labels.numpy().tobytes()).hexdigest()


def title_of(stage: Stage, source: str) -> str:
    """What one of `evaluation.sources` is called in logs and tables."""
    if source == "random" and stage.config.model.initial_weights is not None:
        return "initial weights"
    return _TITLES[source]


def open_labelled(stage: Stage) -> LabelledImages:
    """Returns the labelled images that `evaluation.data` (by default `data`) names."""
    assert stage.evaluation_sources is not None  # opened at the start for stages that need labels
    train, test = stage.evaluation_sources
    assert train.labels is not None  # kinds without labels were refused at the start
    assert test.labels is not None
    device = stage.world.device
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    return LabelledImages(train, test, train.labels.to(device), test.labels.to(device), num_classes)


def evaluation_data(stage: Stage) -> DataConfig:
    """The section of the configuration that evaluations read their images by."""
    return stage.config.evaluation.data or stage.config.data


def represent(stage: Stage, source: str) -> Representation:
    """Loads the representation of one of `evaluation.sources`. Collective.

    Raises:
        UserError: when the stage that makes it has not run, or the given file or checkpoint does not fit.
    """
    if source == "pixels":
        feature_dim = 3 * evaluation_data(stage).image_size ** 2
        # As the encoder sees them; raw ones in [0, 1] would compare mostly brightness.
        layer = "pixels, normalised by channel"
        return Representation(source, lambda images: images.flatten(1), feature_dim, None, None, layer)
    return _frozen(stage, source, *_load(stage, source))


def represent_checkpoint(stage: Stage, checkpoint: Checkpoint) -> Representation:
    """Loads the representation of a training's checkpoint. Collective.

    Raises:
        UserError: when it does not fit.
    """
    return _frozen(stage, "trained", *_load_checkpoint(stage, checkpoint))


def load_backbone(stage: Stage, source: str) -> tuple[Encoder, int | None]:
    """Loads an encoder to train further, and its epochs: 0 when random, None for a file of weights. Collective.

    It is in training mode, unfrozen, on the stage's device. The projection of `weights` is random.

    Args:
        source: `random` is the untrained network of the experiment's seed: it needs no earlier stage, and batch norm's
            running statistics are 0 and 1; with `model.initial_weights` it is what the training started from.
            `trained` and `weights` as for `represent`. Pixels have no encoder.

    Raises:
        UserError: when training has not run, or the given file or checkpoint does not fit.
    """
    if source == "random" and stage.config.model.initial_weights is None:
        return seeded_encoder(stage.config).to(stage.world.device), 0
    encoder, epoch, _ = _load(stage, source)
    return encoder, epoch


def own_batches(stage: Stage, images: ImageSource, ids_N: Tensor) -> Iterable[Batch]:
    """This rank's contiguous part of the ids, in batches, each image once, in the evaluation view.

    An unreadable image is an error whatever `data.on_broken` says: metrics cover all images or none.
    """
    data, own = evaluation_data(stage), own_part(stage, ids_N)
    pieces = consecutive_batches(0, len(own), stage.config.evaluation.batch_size)
    batches = LazyBatches(len(pieces), lambda number: own[pieces[number]].tolist())
    return image_loader(images, centre_view(data.image_size), batches, data.num_workers)


def cached_features(stage: Stage, representation: Representation, images: ImageSource, label: str) -> Tensor:
    """Features (n, F) of this rank's contiguous part of the images, in the evaluation view."""
    batches = own_batches(stage, images, torch.arange(len(images)))
    with stoppable_progress(stage, label, len(images), "images", in_step=False) as on_batch:
        width, device = representation.feature_dim, stage.world.device
        return extract_features(representation.features, batches, width, device, on_batch=on_batch)[0]


def embeddings_of(stage: Stage, representation: Representation, features_nF: Tensor) -> Tensor | None:
    """Projects cached features to (n, D), float32; None where the representation has no projection."""
    encoder = representation.encoder
    if encoder is None or representation.source == "weights":  # its projection is random
        return None
    with torch.inference_mode(), stage.autocast():
        blocks = [encoder.projection(block_bF).float() for block_bF in features_nF.split(_PROJECTED_ROWS)]
    return torch.cat(blocks)


@contextmanager
def stoppable_progress(
    stage: Stage, label: str, total: int, unit: str, *, initial: int = 0, in_step: bool = True
) -> Iterator[Callable[[int], None]]:
    """Shows progress; yields a function to call with each batch's size, which raises Stopped where the run is to stop.

    Args:
        in_step: the sizes are of all ranks, which call it together; else of this rank, and the others do as much.
    """
    with stage.log.progress(label, total, unit, initial) as progress:

        def advance(count: int) -> None:
            progress.advance(count if in_step else count * stage.world.size)
            if in_step:
                stage.check_together()
            else:
                stage.guard.check()

        yield advance


def vote(
    stage: Stage, images: LabelledImages, train_nF: Tensor, test_mF: Tensor, knn: KnnConfig, label: str
) -> dict[tuple[int, float], dict[str, float]]:
    """k-NN accuracies by (k, temperature) from this rank's features of the labelled images. Collective."""
    with stoppable_progress(stage, label, len(images.test), "queries") as on_chunk:
        return knn_accuracy(
            train_nF,
            own_part(stage, images.train_labels),
            test_mF,
            own_part(stage, images.test_labels),
            stage.world,
            neighbours=knn.neighbours,
            temperatures=knn.temperatures,
            num_classes=images.num_classes,
            on_chunk=on_chunk,
        )


def own_part(stage: Stage, rows_N: Tensor) -> Tensor:
    """This rank's contiguous part of a tensor's rows, one for each image."""
    return rows_N[slice(*Partition(len(rows_N), stage.world.size).bounds(stage.world.rank))]


def _frozen(stage: Stage, source: str, encoder: Encoder, epoch: int | None, origin: dict[str, Any]) -> Representation:
    encoder.eval().requires_grad_(False)

    def features(images: Tensor) -> Tensor:
        with stage.autocast():
            return encoder.features(images)

    return Representation(source, features, encoder.feature_dim, encoder, epoch, "backbone output", origin)


def _load(stage: Stage, source: str) -> tuple[Encoder, int | None, dict[str, Any]]:
    """Encoder, epoch and origin of a source; `random` is the network after the prior's pass."""
    return _load_weights(stage) if source == "weights" else _load_checkpoint(stage, _checkpoint(stage, source))


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
    """The checkpoint of the source `random` or `trained`."""
    made_by = {"random": "initialize_classifier", "trained": "pretrain"}[source]
    other = stage.config.evaluation.checkpoint
    checkpoint: Checkpoint | None
    if source == "trained" and other is not None:
        checkpoint = checkpoint_at(other, stage.world, ENCODER_FILES)
        stage.log.say(f"trained: {checkpoint.directory}, epoch {checkpoint.position.epoch}")
    else:
        checkpoint = newest_checkpoint(stage.checkpoints_of(made_by), stage.world, ENCODER_FILES)
    if checkpoint is None:
        raise UserError(absent_checkpoint(stage.run_directory, made_by))
    log_oddities(checkpoint, stage)
    return checkpoint


def _load_weights(stage: Stage) -> tuple[Encoder, None, dict[str, Any]]:
    """The encoder with the backbone of `evaluation.weights`."""
    path = stage.config.evaluation.weights
    if path is None:
        raise UserError("source 'weights' needs a file: set evaluation.weights")
    encoder = seeded_encoder(stage.config)
    origin = load_file(stage, encoder, path, "evaluation.weights")
    return encoder.to(stage.world.device), None, origin
