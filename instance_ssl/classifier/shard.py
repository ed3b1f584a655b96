"""`ClassifierShard`: this rank's rows of W, their momentum, and their part of the eight steps.

Gradient contract: J is the mean over the rows of the whole optimizer step (all ranks, all micro-batches). `forward`
returns the exact ∂J/∂x of this rank's own rows; the encoder's gradients are therefore *summed* over ranks, never
averaged. `step` applies the complete ∂J/∂w of this rank's own classes; it is never reduced. No factor of the world
size is hidden anywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instance_ssl.classifier.cosine_softmax import (
    SoftmaxOptions,
    best_classes,
    normalise_rows,
    own_labels,
    project_gradient,
    row_losses,
    softmax_sums,
    unit_feature_gradient,
    update_rows,
)
from instance_ssl.classifier.hard_classes import find_hard_classes
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition


@dataclass(frozen=True)
class ShardOutput:
    """Result of one forward pass.

    Attributes:
        loss: this micro-batch's part of J, a scalar equal on all ranks; the parts of a step's micro-batches add up.
        log_z: mean of log Z over the micro-batch's rows.
        feature_gradient_bD: ∂J/∂x of this rank's own rows.
    """

    loss: Tensor
    log_z: Tensor
    feature_gradient_bD: Tensor


@dataclass(frozen=True)
class _PendingRows:
    """What the second pass needs of a micro-batch whose weight gradient is still owed."""

    unit_x_BD: Tensor
    z_B: Tensor
    y_B: Tensor
    labels_B: Tensor
    hard_BK: Tensor | None


class ClassifierShard:
    """Own rows [start, stop) of the N x D classifier, contiguous and uneven over the ranks of a group.

    The rows live outside the DeepSpeed engine, which would broadcast and average them.

    Args:
        num_instances: N, at least the number of ranks.
        embedding_dim: D.
        group: ranks that share W.
        options: temperature, loss form, block memory, precision.
        smoothing_factor: α of Eq. 2; 0 is Eq. 1.
        momentum: μ of SGD.
        weight_decay: λ of SGD.
        dtype: of rows and momentum.
    """

    def __init__(
        self,
        num_instances: int,
        embedding_dim: int,
        group: Group,
        options: SoftmaxOptions,
        *,
        smoothing_factor: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_instances < group.size:
            raise ValueError(f"{num_instances} classes cannot be divided over {group.size} ranks")
        self.group = group
        self.options = options
        self.smoothing_factor = smoothing_factor
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.partition = Partition(num_instances, group.size)
        self.start, self.stop = self.partition.bounds(group.rank)
        self.weight = torch.zeros(self.stop - self.start, embedding_dim, dtype=dtype, device=group.device)
        self.momentum_buffer = torch.zeros_like(self.weight)
        self.hard_classes: Tensor | None = None
        self._pending: list[_PendingRows] = []

    @torch.no_grad()
    def forward(
        self, x_bD: Tensor, instance_id_b: Tensor, *, total_rows: int, row_counts: Sequence[int] | None = None
    ) -> ShardOutput:
        """Loss and ∂J/∂x of a micro-batch (steps 2 to 7 of the paper's eight); owes the weights their gradient.

        Args:
            x_bD: (b, D) embeddings of own rows; b may differ between ranks when `row_counts` says so.
            instance_id_b: (b,) int64; ids may repeat, as they do with several views.
            total_rows: rows of the whole optimizer step over all ranks and micro-batches, the B of the mean.
            row_counts: b of every rank; None when all are equal.
        """
        x_BD = self.group.all_gather_rows(x_bD.to(self.weight.dtype), row_counts)
        labels_B = self.group.all_gather_rows(instance_id_b, row_counts)
        hard_BK = self._hard_classes_of(labels_B)
        unit_x_BD, _ = normalise_rows(x_BD)
        labels = own_labels(labels_B, hard_BK, self.smoothing_factor, self.start, self.stop, x_BD.dtype)
        sums = softmax_sums(unit_x_BD, self.weight, labels, self.options)
        z_B, y_B = self.group.all_reduce_sum_(torch.stack([sums.z_B, sums.y_B]))
        gradient_BD = unit_feature_gradient(sums, z_B, y_B, self.options, total_rows)
        gradient_bD = self.group.reduce_scatter_rows(gradient_BD, row_counts)
        unit_x_bD, norms_b1 = normalise_rows(x_bD.to(self.weight.dtype))
        self._pending.append(_PendingRows(unit_x_BD, z_B, y_B, labels_B, hard_BK))
        return ShardOutput(
            loss=row_losses(z_B, y_B, self.options.form).sum() / total_rows,
            log_z=z_B.log().mean(),
            feature_gradient_bD=project_gradient(gradient_bD, unit_x_bD, norms_b1).to(x_bD.dtype),
        )

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One SGD step of own rows for all rows seen since the last one; call it only when their loss is finite.

        The whole step's ∂J/∂w is computed here, in one pass over W, rather than micro-batch by micro-batch: it costs
        the same arithmetic, reads W once, and until now nothing has been touched that a bad micro-batch could spoil.
        What it keeps for that is B x D embeddings.
        """
        pending, self._pending = self._pending, []
        hard = [p.hard_BK for p in pending if p.hard_BK is not None]
        hard_BK = torch.cat(hard) if hard else None
        labels_B = torch.cat([p.labels_B for p in pending])
        update_rows(
            torch.cat([p.unit_x_BD for p in pending]),
            torch.cat([p.z_B for p in pending]),
            torch.cat([p.y_B for p in pending]),
            own_labels(labels_B, hard_BK, self.smoothing_factor, self.start, self.stop, self.weight.dtype),
            self.weight,
            self.momentum_buffer,
            self.options,
            learning_rate=learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def discard(self) -> None:
        """Forgets the rows seen since the last step: W and its momentum stay as they are."""
        self._pending = []

    @torch.no_grad()
    def refresh_hard_classes(self, num_hard_classes: int, on_block: Callable[[int, int], None] | None = None) -> None:
        """Finds the K hardest classes of every own class anew; K = 0 turns smoothing off."""
        if num_hard_classes == 0 or self.smoothing_factor == 0:
            self.hard_classes = None
            return
        self.hard_classes = find_hard_classes(
            self.weight,
            num_hard_classes,
            self.partition,
            self.group,
            block_bytes=self.options.block_bytes,
            on_block=on_block,
        )

    @torch.no_grad()
    def assign(self, x_BD: Tensor, instance_id_B: Tensor) -> None:
        """Writes w_i ← x_i for those of the gathered rows that this rank owns."""
        own_B = self._owns(instance_id_B)
        self.weight[instance_id_B[own_B] - self.start] = x_BD[own_B].to(self.weight.dtype)

    @torch.no_grad()
    def measure(self, x_bD: Tensor, instance_id_b: Tensor) -> tuple[float, float]:
        """Instance accuracy (top-1 against all N classes, a fraction) and mean positive cosine of a batch.

        Args:
            x_bD: (b, D) embeddings, equally many on all ranks.
            instance_id_b: (b,) int64.
        """
        labels_B = self.group.all_gather_rows(instance_id_b)
        unit_x_BD, _ = normalise_rows(self.group.all_gather_rows(x_bD.to(self.weight.dtype)))
        own_best_B, own_class_B = best_classes(unit_x_BD, self.weight, self.options)
        best_B = self.group.all_reduce_max_(own_best_B.clone())
        nowhere = self.partition.total
        class_B = torch.where(own_best_B == best_B, own_class_B + self.start, nowhere)
        self.group.all_reduce_min_(class_B)  # of equal cosines on different ranks, the lower id
        own_B = self._owns(labels_B)
        unit_w, _ = normalise_rows(self.weight[labels_B[own_B] - self.start])
        positive = self.group.all_reduce_sum_((unit_x_BD[own_B] * unit_w).sum())
        correct = (class_B == labels_B).to(positive.dtype).mean()
        return correct.item(), positive.item() / labels_B.shape[0]

    def _owns(self, instance_id_B: Tensor) -> Tensor:
        """(B,) bool: whether this rank holds the row of each instance."""
        return (instance_id_B >= self.start) & (instance_id_B < self.stop)

    def _hard_classes_of(self, labels_B: Tensor) -> Tensor | None:
        """(B, K) hardest classes of each row's instance: each owner fills in its own, the sum brings them together."""
        if self.hard_classes is None:
            return None
        own_B = self._owns(labels_B)
        hard_BK = self.hard_classes.new_zeros(labels_B.shape[0], self.hard_classes.shape[1])
        hard_BK[own_B] = self.hard_classes[labels_B[own_B] - self.start]
        return self.group.all_reduce_sum_(hard_BK)
