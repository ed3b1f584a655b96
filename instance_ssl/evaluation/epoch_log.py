"""Epochs of the trainings that evaluations run: their batches, their progress, and how they diverge."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from instance_ssl.errors import UserError

Batches = Iterable[tuple[Tensor, Tensor]]


class DivergedError(UserError):
    """The loss is not finite, on all ranks alike."""


@dataclass(frozen=True)
class LabelledBatches:
    """Training and test images with labels, as this rank meets them.

    Attributes:
        train_parts: for an epoch 0, 1, … this rank's part of each global batch that is trained on, itself as many
            (images, ids) as it likes, which make one step; parts may be uneven or empty.
        test_batches: this rank's (images, ids) of the test set, as many as it likes.
        labels, test_labels: classes 0 … C - 1 of all training and of all test images, by id.
        num_classes: C.
        steps_per_epoch: global batches of a whole epoch, the same on all ranks.
    """

    train_parts: Callable[[int], Iterable[Batches]]
    test_batches: Callable[[], Batches]
    labels: Tensor
    test_labels: Tensor
    num_classes: int
    steps_per_epoch: int


@dataclass(frozen=True)
class Progress:
    """Where a training is at the end of an epoch.

    Attributes:
        epochs: finished so far.
        train_loss: mean of the last epoch, nats.
        state: captures what resuming from here needs: tensors and plain values, equal on all ranks.
    """

    epochs: int
    train_loss: float
    state: Callable[[], dict[str, Any]]


def train_epochs(
    train_epoch: Callable[[int], float],
    epochs: int,
    optimizer: Optimizer,
    name: str,
    capture: Callable[[], Any],
    restore: Callable[[Any], object],
    *,
    state: dict[str, Any] | None,
    on_epoch: Callable[[Progress], None],
) -> float:
    """Trains the epochs that `state` does not cover and returns the mean loss of the last, nats.

    Args:
        train_epoch: trains epoch 0 … epochs - 1 and returns its mean loss.
        name: of the model in the state.
        capture, restore: return and take the model as tensors and plain values.
        state: of an earlier training's `Progress`, to resume from.
        on_epoch: called at the end of every epoch.
    """
    epochs_done, train_loss = 0, math.nan
    if state is not None:
        restore(state[name])
        optimizer.load_state_dict(state["optimizer"])
        epochs_done, train_loss = state["epochs"], state["train_loss"]

    def state_now() -> dict[str, Any]:
        model = {name: capture(), "optimizer": optimizer.state_dict()}
        return {**model, "epochs": epochs_done, "train_loss": train_loss}

    for epoch in range(epochs_done, epochs):
        train_loss = train_epoch(epoch)
        epochs_done = epoch + 1
        on_epoch(Progress(epochs_done, train_loss, state_now))
    return train_loss


def mean_loss(totals: Tensor, training: str, remedy: str) -> float:
    """Returns the mean loss of an epoch's images from `totals`, (2,): their summed loss and their number.

    Raises:
        DivergedError: when it is not finite; names the training and the remedy.
        ValueError: when there are no images.
    """
    loss_sum, images = totals.tolist()
    if images == 0:
        raise ValueError("no training images")
    if not math.isfinite(loss_sum):
        raise DivergedError(f"{training}: the loss became {loss_sum}; {remedy}")
    return loss_sum / images
