"""What a training of an evaluation tells after each epoch, and how it ends where there is nothing to tell."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
