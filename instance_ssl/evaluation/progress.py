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
