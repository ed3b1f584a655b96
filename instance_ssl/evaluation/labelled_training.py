"""What the stages share that train whole networks on labels."""

import contextlib
import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from instance_ssl.data.augmentations import centre_view, probe_view
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.data.loaders import Batch, PartLoader, image_loader
from instance_ssl.data.sampler import LazyBatches, consecutive_batches, epoch_order
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError
from instance_ssl.evaluation.cached_training import train_or_find
from instance_ssl.evaluation.epoch_log import Progress
from instance_ssl.evaluation.features import state_digest
from instance_ssl.evaluation.fine_tuning import TrainingOptions, fine_tune, recipe
from instance_ssl.evaluation.frozen_encoder import LabelledImages, evaluation_data
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
        labels: classes of all images of the source, by id.
    """

    images: ImageSource
    ids: Tensor
    labels: Tensor

    def describe(self) -> list[str]:
        """What tells it from other subsets, in few words."""
        rows = torch.stack([self.ids, self.labels.cpu()[self.ids]])
        return [self.images.digest, hashlib.sha256(rows.numpy().tobytes()).hexdigest()]


@dataclass(frozen=True)
class Training:
    """One training and its test.

    Attributes:
        title: for the console; `tag` for TensorBoard.
        encoder: whose backbone it begins with, and leaves as it is.
        train, test: the images.
        num_classes: C.
    """

    title: str
    tag: str
    encoder: Encoder
    options: TrainingOptions
    train: Subset
    test: Subset
    num_classes: int

    def decisive(self, stage: Stage) -> dict[str, Any]:
        """All that decides what comes of it, but for the number of ranks."""
        return {
            "backbone": state_digest(self.encoder.backbone),
            "options": recipe(self.options),
            "train": self.train.describe(),
            "test": self.test.describe(),
            "num_classes": self.num_classes,
            "image_size": evaluation_data(stage).image_size,
            "batch_size": stage.config.evaluation.batch_size,  # a larger part is normalised piece by piece
            "seed": stage.config.seed,
            "precision": str(stage.ds.autocast_dtype),
        }


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


def train_once(stage: Stage, training: Training, workload: Workload) -> dict[str, Any]:
    """Trains and tests, or finds that it has been done. Collective.

    Args:
        workload: what it is part of.

    Returns:
        What `fine_tune` returns, with "train_images".

    Raises:
        DivergedError: when the loss is no longer a number.
    """
    with workload.training(training.options.steps):
        return train_or_find(
            stage,
            training.title,
            training.decisive(stage),
            lambda state, offer: _train(stage, training, workload, state, offer),
        )


def _train(
    stage: Stage,
    training: Training,
    workload: Workload,
    state: dict[str, Any] | None,
    offer: Callable[[Progress], None],
) -> dict[str, Any]:
    options, train, test = training.options, training.train, training.test
    steps_per_epoch = math.ceil(len(train.ids) / options.global_batch_size)
    steps_done = 0 if state is None else min(state["epochs"] * steps_per_epoch, options.steps)
    workload.advance(steps_done, done_before=True)
    with stage.log.progress(training.title, options.steps, "steps", initial=steps_done) as progress:
        loader = PartLoader(
            train.images,
            probe_view(evaluation_data(stage).image_size),
            evaluation_data(stage).num_workers,
            seed=stage.config.seed,
            max_batch_size=stage.config.evaluation.batch_size,
        )

        def train_parts(epoch: int) -> Iterator[Iterable[Batch]]:
            first = epoch * steps_per_epoch
            order = train.ids[epoch_order(len(train.ids), stage.config.seed, epoch)]
            parts = own_parts(order, options.global_batch_size, stage.world)[: options.steps - first]
            for part in loader.epoch(epoch, parts):
                stage.check_together()
                yield part
                progress.advance()
                workload.advance()

        def on_epoch(done: Progress) -> None:
            stage.log.metrics(done.epochs, {f"{training.tag}/train_loss": done.train_loss})
            offer(done)

        figures = fine_tune(
            copy.deepcopy(training.encoder.backbone),
            train_parts,
            lambda: _own_test_batches(stage, test),
            stage.world,
            options,
            feature_dim=training.encoder.feature_dim,
            num_classes=training.num_classes,
            labels=train.labels,
            test_labels=test.labels,
            steps_per_epoch=steps_per_epoch,
            seed=stage.config.seed,
            autocast=lambda: _autocast(stage),
            state=state,
            on_epoch=on_epoch,
        )
    return {"train_images": len(train.ids), **figures}


def _own_test_batches(stage: Stage, test: Subset) -> Iterator[Batch]:
    """This rank's contiguous part of the subset, in batches; nothing dropped, nothing twice."""
    data = evaluation_data(stage)
    own = test.ids[slice(*Partition(len(test.ids), stage.world.size).bounds(stage.world.rank))]
    pieces = consecutive_batches(0, len(own), stage.config.evaluation.batch_size)
    batches = LazyBatches(len(pieces), lambda number: own[pieces[number]].tolist())
    for batch in image_loader(test.images, centre_view(data.image_size), batches, data.num_workers):
        stage.guard.check()
        yield batch


def _autocast(stage: Stage) -> contextlib.AbstractContextManager[object]:
    """The JSON's precision; float32 for float16, whose gradients would need loss scaling."""
    return contextlib.nullcontext() if stage.ds.autocast_dtype == torch.float16 else stage.autocast()
