"""What the stages share that train whole networks on labels: one training, done once, that goes on where it stopped.

Each training has a name that is the digest of all that decides its outcome. Below D/<stage>/trainings, its figures lie
in <name>.json once it has ended, and its state in <name>.pt until then; what the same command, or one with further
fractions or grid points, finds there is not done again.
"""

import contextlib
import copy
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instance_ssl import faults
from instance_ssl.checkpoint_files import read_tensors, write_file
from instance_ssl.data.augmentations import centre_view, probe_view
from instance_ssl.data.datasets import ImageSource
from instance_ssl.data.loaders import Batch, PartLoader, epoch_order, image_loader
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError
from instance_ssl.evaluation.features import state_digest
from instance_ssl.evaluation.fine_tuning import DivergedError, Progress, TrainingOptions, fine_tune, recipe
from instance_ssl.models.encoder import Encoder
from instance_ssl.run_directory import write_json
from instance_ssl.stages.build import own_parts
from instance_ssl.stages.context import Stage
from instance_ssl.stages.representation import LabelledImages, evaluation_data

# A state is written at the end of an epoch, but no more than this share of the time is spent on it.
_SAVING_SHARE = 0.05
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

    def name(self, stage: Stage) -> str:
        """The digest of all that decides what comes of it, but for the number of ranks."""
        decisive = {
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
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


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


def train_once(stage: Stage, training: Training) -> dict[str, Any]:
    """Trains and tests, or finds that it has been done. Collective.

    Returns:
        What `fine_tune` returns, with "train_images".

    Raises:
        DivergedError: when the loss is no longer a number.
    """
    directory = stage.directory / "trainings"
    name = stage.world.broadcast_object(training.name(stage))
    figures_path, state_path = directory / f"{name}.json", directory / f"{name}.pt"
    found = _read_figures(figures_path) if stage.world.rank == 0 else None
    if (found := stage.world.broadcast_object(found)) is not None:
        stage.log.say(f"{training.title}: done before")
        if "diverged" in found:
            raise DivergedError(found["diverged"])
        return found
    directory.mkdir(parents=True, exist_ok=True)
    has_state = stage.world.broadcast_object(state_path.exists())
    state = stage.together(lambda: read_tensors(state_path)) if has_state else None
    if state is not None:
        stage.log.say(f"{training.title}: going on after {state['epochs']} epochs")
    figures: dict[str, Any] = {"train_images": len(training.train.ids)}
    try:
        figures |= _train(stage, training, state, state_path)
    except DivergedError as error:  # on all ranks, and so it would another time
        figures["diverged"] = str(error)
        raise
    finally:
        if stage.world.rank == 0 and len(figures) > 1:
            write_json(figures_path, figures)
            state_path.unlink(missing_ok=True)
    return figures


def _train(stage: Stage, training: Training, state: dict[str, Any] | None, state_path: Path) -> dict[str, float]:
    options, train, test = training.options, training.train, training.test
    steps_per_epoch = math.ceil(len(train.ids) / options.global_batch_size)
    steps_done = 0 if state is None else min(state["epochs"] * steps_per_epoch, options.steps)
    saver = _Saver(stage, state_path)
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
            for step, part in enumerate(loader.epoch(epoch, parts), start=first):
                faults.reach("fine_tune", stage.world.rank, step)
                stage.check_together()
                yield part
                progress.advance()

        def on_epoch(done: Progress) -> None:
            stage.log.metrics(done.epochs, {f"{training.tag}/train_loss": done.train_loss})
            saver.offer(done)

        return fine_tune(
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


class _Saver:
    """Writes states, whole or not at all, and not so often that it would show."""

    def __init__(self, stage: Stage, path: Path) -> None:
        self._stage, self._path = stage, path
        self._not_before = 0.0

    def offer(self, done: Progress) -> None:
        """A state that may be written."""
        began = time.monotonic()
        if self._stage.world.rank != 0 or began < self._not_before:
            return
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        try:
            write_file(temporary, done.state())
            temporary.replace(self._path)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            reason = " ".join(str(error).split())
            self._stage.log.say(f"warning: {self._path} is not written ({reason}); a stop now would lose the epochs")
        now = time.monotonic()
        self._not_before = now + (now - began) / _SAVING_SHARE


def _own_test_batches(stage: Stage, test: Subset) -> Iterator[Batch]:
    """This rank's contiguous part of the subset, in batches; nothing dropped, nothing twice."""
    data = evaluation_data(stage)
    own = test.ids[slice(*Partition(len(test.ids), stage.world.size).bounds(stage.world.rank))]
    batches = [piece.tolist() for piece in own.split(stage.config.evaluation.batch_size) if len(piece)]
    for batch in image_loader(test.images, centre_view(data.image_size), batches, data.num_workers):
        stage.guard.check()
        yield batch


def _autocast(stage: Stage) -> contextlib.AbstractContextManager[object]:
    """The JSON's precision; float32 for float16, whose gradients would need loss scaling."""
    return contextlib.nullcontext() if stage.ds.autocast_dtype == torch.float16 else stage.autocast()


def _read_figures(path: Path) -> dict[str, Any] | None:
    """Figures of a training that has ended; a damaged file is as good as none."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
