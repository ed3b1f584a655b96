"""A training whose data set has grown: rows for the images that have come, from their features.

Row i of a new image is the direction of its embedding, by the encoder as it is, of the evaluation view, with the mean
norm of the old rows, so that a step moves it as far as it moves them. Its momentum is 0.
"""

import torch
from torch import Tensor, nn

from instance_ssl.classifier.prior import initialize_from_features
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import normalise_rows
from instance_ssl.data.augmentations import centre_view
from instance_ssl.run.build import own_parts
from instance_ssl.run.excluded_images import LeftOut, readable_batches
from instance_ssl.run.stage import Stage


class _ScaledRows:
    """Takes embeddings as rows of a shard, all of one norm."""

    def __init__(self, shard: ClassifierShard, norm: float) -> None:
        self._shard, self._norm = shard, norm

    def assign(self, x_BD: Tensor, instance_id_B: Tensor) -> None:
        """Writes those of (B, D) that the shard owns."""
        self._shard.assign(normalise_rows(x_BD.float())[0] * self._norm, instance_id_B)


def add_rows(
    stage: Stage, shard: ClassifierShard, encoder: nn.Module, first: int, left_out: LeftOut, step: int
) -> None:
    """Fills the rows of images `first` … N - 1. Collective. The encoder is on the stage's device then.

    Args:
        left_out: told of those that cannot be read, as found when `step` steps were done.

    Raises:
        RankError: when one cannot be read and `data.on_broken` is `error`.
    """
    num_new = len(stage.source) - first
    stage.log.say(
        f"{num_new} images have come to the {first} that there were: they are classes {first} to "
        f"{first + num_new - 1}, and their rows are made of their features"
    )
    rows = _ScaledRows(shard, _mean_norm(shard, first))
    with stage.log.progress("new rows", num_new, "images") as progress, stage.autocast():

        def on_batch(count: int) -> None:
            progress.advance(count)
            stage.check_together()

        size = stage.config.classifier.initialization_batch_size
        ids = torch.arange(first, len(stage.source))
        parts = own_parts(ids[~torch.isin(ids, left_out.ids)], size, stage.world)
        view = centre_view(stage.config.data.image_size)
        batches = readable_batches(stage, parts, left_out, view)
        initialize_from_features(
            rows, encoder.to(stage.world.device), batches, "frozen", stage.world, on_batch=on_batch
        )
    if left_out.anyone_has_news():
        left_out.share(step)


def _mean_norm(shard: ClassifierShard, first: int) -> float:
    """Of the rows before `first` that are not left out, the same on all ranks."""
    norms = torch.linalg.vector_norm(shard.weight[: max(0, first - shard.start)], dim=1, dtype=torch.float64)
    total, count = shard.group.all_reduce_sum_(torch.stack([norms.sum(), (norms > 0).sum()]))
    return (total / count).item()
