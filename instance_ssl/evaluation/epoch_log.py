"""What a training of an evaluation tells after each epoch, and how it ends where there is nothing to tell."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from instance_ssl.errors import UserError


class DivergedError(UserError):
    """The loss is no longer a number, on all ranks alike."""


@dataclass(frozen=True)
class Progress:
    """What is told at the end of an epoch.

    Attributes:
        epochs: finished so far.
        train_loss: mean of the last, nats.
        state: all that going on from here needs: tensors and plain values, equal on all ranks.
    """

    epochs: int
    train_loss: float
    state: Callable[[], dict[str, Any]]


def train_epochs(
    train_epoch: Callable[[int], float],
    epochs: int,
    *,
    capture: Callable[[], dict[str, Any]],
    restore: Callable[[dict[str, Any]], None],
    state: dict[str, Any] | None,
    on_epoch: Callable[[Progress], None] | None,
) -> float:
    """Trains the epochs that are not behind `state`; the mean loss of the last, nats.

    Args:
        train_epoch: trains epoch 0 … epochs - 1 and gives its mean loss.
        capture, restore: what is trained and its optimizer, as tensors and plain values.
        state: of an earlier training's `Progress`, to go on from.
        on_epoch: told at the end of every epoch.
    """
    epochs_done, train_loss = 0, math.nan
    if state is not None:
        restore(state)
        epochs_done, train_loss = state["epochs"], state["train_loss"]

    def state_now() -> dict[str, Any]:
        return {**capture(), "epochs": epochs_done, "train_loss": train_loss}

    for epoch in range(epochs_done, epochs):
        train_loss = train_epoch(epoch)
        epochs_done = epoch + 1
        if on_epoch is not None:
            on_epoch(Progress(epochs_done, train_loss, state_now))
    return train_loss


def mean_loss(totals: Tensor, training: str, remedy: str) -> float:
    """The mean loss of an epoch's images, from their summed loss and their number, (2,).

    Raises:
        DivergedError: naming the training, with what to do, when it is no number.
        ValueError: when there are no images.
    """
    loss_sum, images = totals.tolist()
    if images == 0:
        raise ValueError("no training images")
    if not math.isfinite(loss_sum):
        raise DivergedError(f"{training}: the loss became {loss_sum}; {remedy}")
    return loss_sum / images
