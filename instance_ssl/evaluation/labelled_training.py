"""What the evaluations share that train on labelled images: the linear layer by SGD, and whole networks."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from instance_ssl.data.augmentations import probe_view
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.data.loaders import Batch, PartLoader
from instance_ssl.data.sampler import epoch_order
from instance_ssl.errors import UserError
from instance_ssl.evaluation.cached_training import train_or_find
from instance_ssl.evaluation.epoch_log import LabelledBatches, Progress
from instance_ssl.evaluation.features import state_digest
from instance_ssl.evaluation.fine_tuning import TrainingOptions, fine_tune
from instance_ssl.evaluation.frozen_encoder import LabelledImages, evaluation_data, own_batches
from instance_ssl.evaluation.workload import Workload
from instance_ssl.models.encoder import Encoder
from instance_ssl.run.build import own_parts
from instance_ssl.run.stage import Stage

LAYERS = "all layers, and a linear classifier on the backbone output"


@dataclass(frozen=True)
class Subset:
    """Some of the images of a source.

    Attributes:
        ids: which, (n,) int64 on the CPU.
        labels: classes 0 … num_classes - 1 of all images of the source, by id.
    """

    images: ImageSource
    ids: Tensor
    labels: Tensor
    num_classes: int

    def describe(self) -> list[str]:
        """Digests of the source and of the ids with their labels."""
        rows = torch.stack([self.ids, self.labels.cpu()[self.ids]])
        return [self.images.digest, hashlib.sha256(rows.numpy().tobytes()).hexdigest()]


@dataclass(frozen=True)
class Training:
    """One training and its test.

    Attributes:
        title: for the console.
        loss_tag: of the train loss in the metrics.
        global_batch_size: images of a step; an epoch's last step takes what is left.
        steps: global batches in all; the last epoch may be cut short.
    """

    title: str
    loss_tag: str
    train: Subset
    test: Subset
    global_batch_size: int
    steps: int


def whole_sets(images: LabelledImages) -> tuple[Subset, Subset]:
    """All training and all test images."""
    return (
        Subset(images.train, torch.arange(len(images.train)), images.train_labels, images.num_classes),
        Subset(images.test, torch.arange(len(images.test)), images.test_labels, images.num_classes),
    )


def tunable_sources(stage: Stage) -> list[str]:
    """Those of `evaluation.sources` that have a network.

    Raises:
        UserError: when there is none.
    """
    sources: list[str] = [source for source in stage.config.evaluation.sources if source != "pixels"]
    if not sources:
        raise UserError("evaluation.sources names pixels alone, which have no network to train: add trained or random")
    return sources


def describe_images(stage: Stage, images: LabelledImages) -> dict[str, Any]:
    """Which labelled images, for result.json."""
    digests = {"train_digest": images.train.digest, "test_digest": images.test.digest}
    return {"kind": evaluation_data(stage).kind, "num_classes": images.num_classes, **digests}


def fine_tune_once(
    stage: Stage, workload: Workload, encoder: Encoder, options: TrainingOptions, title: str, tag: str, *sets: Subset
) -> dict[str, Any]:
    """Fine-tunes a copy of the encoder's backbone and tests it, or finds that this has been done. Collective.

    Args:
        workload: what it is part of.
        title: for the console.
        tag: of the metrics.
        sets: the training images, and the test images.

    Returns:
        What `fine_tune` returns, with "train_images".

    Raises:
        DivergedError: when the loss is not finite.
    """
    train, test = sets
    decisive = {
        "backbone": state_digest(encoder.backbone),
        "options": asdict(options),
        "train": train.describe(),
        "test": test.describe(),
        "num_classes": train.num_classes,
        "image_size": evaluation_data(stage).image_size,
        "batch_size": stage.config.evaluation.batch_size,  # a larger part is normalised piece by piece
        "seed": stage.config.seed,
        "precision": str(stage.ds.autocast_dtype),
    }

    def fit(data: LabelledBatches, **resume: Any) -> dict[str, Any]:
        # Float32 for float16, whose gradients would need loss scaling.
        autocast = nullcontext if stage.ds.autocast_dtype == torch.float16 else stage.autocast
        resume |= {"feature_dim": encoder.feature_dim, "seed": stage.config.seed, "autocast": autocast}
        figures = fine_tune(copy.deepcopy(encoder.backbone), data, stage.world, options, **resume)
        return {"train_images": len(train.ids), **figures}

    training = Training(title, f"{tag}/train_loss", train, test, options.global_batch_size, options.steps)
    return train_once(stage, training, decisive, fit, workload)


def train_once(
    stage: Stage, training: Training, decisive: dict[str, Any], fit: Callable[..., dict[str, Any]], workload: Workload
) -> dict[str, Any]:
    """Trains and tests, or finds that this has been done; resumes a training that was stopped. Collective.

    Args:
        decisive: all that decides the outcome, except the number of ranks.
        fit: returns the metrics from `LabelledBatches`, `state` and `on_epoch` (see `fine_tune`).
        workload: what it is part of.

    Raises:
        DivergedError: when the loss is not finite.
    """
    steps_per_epoch = math.ceil(len(training.train.ids) / training.global_batch_size)

    def train(state: dict[str, Any] | None, offer: Callable[[Progress], None]) -> dict[str, Any]:
        steps_done = 0 if state is None else min(state["epochs"] * steps_per_epoch, training.steps)
        workload.advance(steps_done, done_before=True)
        with stage.log.progress(training.title, training.steps, "steps", initial=steps_done) as progress:

            def on_step() -> None:
                progress.advance()
                workload.advance()

            def on_epoch(done: Progress) -> None:
                stage.log.metrics(done.epochs, {training.loss_tag: done.train_loss})
                offer(done)

            return fit(_batches(stage, training, steps_per_epoch, on_step), state=state, on_epoch=on_epoch)

    with workload.training(training.steps):
        return train_or_find(stage, training.title, decisive, train)


def _batches(stage: Stage, training: Training, steps_per_epoch: int, on_step: Callable[[], None]) -> LabelledBatches:
    data, train, test = evaluation_data(stage), training.train, training.test
    settings = {"seed": stage.config.seed, "max_batch_size": stage.config.evaluation.batch_size}
    loader = PartLoader(train.images, probe_view(data.image_size), data.num_workers, **settings)

    def train_parts(epoch: int) -> Iterator[Iterable[Batch]]:
        first = epoch * steps_per_epoch
        order = train.ids[epoch_order(len(train.ids), stage.config.seed, epoch)]
        parts = own_parts(order, training.global_batch_size, stage.world)[: training.steps - first]
        for part in loader.epoch(epoch, parts):
            stage.check_together()
            yield part
            on_step()

    def test_batches() -> Iterator[Batch]:
        for batch in own_batches(stage, test.images, test.ids):
            stage.guard.check()
            yield batch

    labels = train.labels, test.labels
    return LabelledBatches(train_parts, test_batches, *labels, train.num_classes, steps_per_epoch)
