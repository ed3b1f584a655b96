"""What a `ClassifierShard` holds between the first micro-batch of a step and the step itself."""

from dataclasses import dataclass

from torch import Tensor

from instance_ssl.classifier.softmax import SmoothedLabels


@dataclass(frozen=True)
class PendingRows:
    """What the second pass needs of a micro-batch whose weight gradient is still owed."""

    unit_x_BD: Tensor
    z_B: Tensor
    y_B: Tensor
    labels: SmoothedLabels
    total_rows: int


@dataclass(frozen=True)
class SampledRows:
    """The own rows that take part in this step, copied out of W: their places in it, ascending, and their contents."""

    places: Tensor
    weight: Tensor
    momentum: Tensor
