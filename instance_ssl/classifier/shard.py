"""`ClassifierShard`: this rank's rows of W, their momentum, and their part of the paper's eight steps.

Gradient contract: J is the mean over the rows of the whole optimizer step (all ranks, all micro-batches). `forward`
returns the exact ∂J/∂x of local rows; the encoder's gradients are therefore *summed* over ranks, never averaged. `step`
applies the complete ∂J/∂w of local classes. No factor of the world size is hidden anywhere.

Layout: a `group` of G ranks holds W once, in shards; the T/G `replicas` of a shard hold the same rows. With one group,
the default, ∂J/∂w is already complete on its owner and never reduced. With several, ∂J/∂w is summed over the replicas
block by block, and all copies stay equal to the bit. G = 1 is the replicated classifier of the paper's Table 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from instance_ssl.classifier import torch_passes, triton_passes
from instance_ssl.classifier.hard_classes import find_hard_classes, search_bytes
from instance_ssl.classifier.sampling import ClassSampler, RowClock
from instance_ssl.classifier.softmax import (
    DeferredRows,
    Passes,
    RowUpdate,
    SmoothedLabels,
    SoftmaxOptions,
    normalise_rows,
    own_labels,
    project_gradient,
    row_losses,
    unit_feature_gradient,
)
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition


@dataclass(frozen=True)
class ShardOutput:
    """Result of one forward pass.

    Attributes:
        loss: this micro-batch's part of J, a scalar equal on all ranks; the parts of a step's micro-batches add up.
        log_z: mean of log Z over the micro-batch's rows, equal on all ranks.
        num_zero_features: rows of the micro-batch, over all ranks, without direction; their gradient is 0.
        feature_gradient_bD: (b, D) ∂J/∂x of local rows.
    """

    loss: Tensor
    log_z: Tensor
    num_zero_features: Tensor
    feature_gradient_bD: Tensor


@dataclass(frozen=True)
class _SampledRows:
    """The local rows that take part in this step, copied out of W: their ascending indices, and their contents."""

    places: Tensor
    weight: Tensor
    momentum: Tensor


class ClassifierShard:
    """Local rows [start, stop) of the N x D classifier, contiguous and uneven over the ranks of a group.

    The rows live outside the DeepSpeed engine, which would broadcast and average them.

    Args:
        num_instances: N, at least the size of the group.
        embedding_dim: D.
        group: ranks that hold W together, a shard each.
        replicas: all ranks that hold this shard, including this one; None: only this one.
        options: temperature, loss form, block memory, precision, kernels.
        smoothing_factor: α of Eq. 2; 0 is Eq. 1.
        momentum: μ of SGD.
        weight_decay: λ of SGD.
        learning_rate_multiplier: factor on the rate given to `step`.
        row_dtype: float32, or bfloat16 with stochastic rounding of every update.
        momentum_dtype: float32 or bfloat16.
        sampler: chooses the classes of each step; None: all N. Excludes smoothing.
        seed: of the stochastic rounding.

    Raises:
        ValueError: for fewer classes than ranks, or a sampler together with smoothing.
    """

    def __init__(
        self,
        num_instances: int,
        embedding_dim: int,
        group: Group,
        options: SoftmaxOptions,
        *,
        replicas: Group | None = None,
        smoothing_factor: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        learning_rate_multiplier: float = 1.0,
        row_dtype: torch.dtype = torch.float32,
        momentum_dtype: torch.dtype = torch.float32,
        sampler: ClassSampler | None = None,
        seed: int = 0,
    ) -> None:
        if num_instances < group.size:
            raise ValueError(f"{num_instances} classes cannot be divided over {group.size} ranks")
        if sampler is not None and smoothing_factor > 0:
            raise ValueError("sampled classes cannot be combined with smoothing")
        self.group = group
        self.replicas = replicas
        self.options = options
        self.smoothing_factor = smoothing_factor
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.learning_rate_multiplier = learning_rate_multiplier
        self.sampler = sampler
        self.seed = seed
        self.partition = Partition(num_instances, group.size)
        self.start, self.stop = self.partition.bounds(group.rank)
        self.weight = torch.zeros(self.stop - self.start, embedding_dim, dtype=row_dtype, device=group.device)
        self.momentum_buffer = torch.zeros_like(self.weight, dtype=momentum_dtype)
        self.hard_classes: Tensor | None = None
        self.steps_taken = 0
        self._compute_dtype = torch.promote_types(row_dtype, torch.float32)
        self._clock = None if sampler is None else RowClock(self.weight, self.momentum_buffer)
        self._sampled: _SampledRows | None = None
        self._pending: list[DeferredRows] = []
        self._copies: dict[str, Tensor | None] = {}

    @property
    def num_replicas(self) -> int:
        """Copies of W in the world."""
        return 1 if self.replicas is None else self.replicas.size

    @property
    def world_size(self) -> int:
        """Ranks of all groups."""
        return self.group.size * self.num_replicas

    @torch.no_grad()
    def begin_step(self, positives: Tensor) -> None:
        """Draws the step's classes; call before the first micro-batch's `forward`. Does nothing without sampling.

        Args:
            positives: instance ids of the whole global batch, over all ranks and micro-batches, int64 on the CPU.
        """
        if self.sampler is None or self._clock is None:
            return
        drawn = self.sampler.draw(positives, self.steps_taken)
        places = (drawn[(drawn >= self.start) & (drawn < self.stop)] - self.start).to(self.weight.device)
        self._clock.settle(places, self._rounding_seed)
        self._sampled = _SampledRows(places, self.weight[places], self.momentum_buffer[places])

    @torch.no_grad()
    def forward(
        self, x_bD: Tensor, instance_id_b: Tensor, *, total_rows: int, row_counts: Sequence[int] | None = None
    ) -> ShardOutput:
        """Loss and ∂J/∂x of a micro-batch (steps 2 to 7 of the paper); the weight gradient is deferred to `step`.

        Args:
            x_bD: (b, D) embeddings of local rows; b may differ between ranks if `row_counts` is given.
            instance_id_b: (b,) int64; ids may repeat, as with several views.
            total_rows: rows of the whole optimizer step over all ranks and micro-batches, the B of the mean.
            row_counts: b of every rank of the group; None when all are equal.
        """
        output, rows = self.evaluate(x_bD, instance_id_b, total_rows=total_rows, row_counts=row_counts)
        self.defer(rows)
        return output

    @torch.no_grad()
    def evaluate(
        self,
        x_bD: Tensor,
        instance_id_b: Tensor,
        *,
        total_rows: int,
        row_counts: Sequence[int] | None = None,
        all_classes: bool = False,
    ) -> tuple[ShardOutput, DeferredRows]:
        """What `forward` computes, and what `defer` takes; changes nothing.

        Args:
            all_classes: with sampling, the softmax over all N in place of the step's; call `settle` before.
        """
        sampled = None if all_classes else self._sampled
        unit_x_bD, inverse_b1 = normalise_rows(x_bD.to(self._compute_dtype))
        unit_x_BD = self.group.all_gather_rows(unit_x_bD, row_counts)
        labels_B = self.group.all_gather_rows(instance_id_b, row_counts)
        labels = self._own_labels(labels_B, sampled)
        weight = self.weight if sampled is None else sampled.weight
        sums = self._passes.softmax_sums(unit_x_BD, weight, labels, self.options)
        z_B, y_B = self.group.all_reduce_sum_(torch.stack([sums.z_B, sums.y_B]))
        gradient_BD = unit_feature_gradient(sums, z_B, y_B, self.options, total_rows)
        gradient_bD = self.group.reduce_scatter_rows(gradient_BD, row_counts)
        loss = row_losses(z_B, y_B, self.options.form).sum()
        num_zero_features = (torch.linalg.vector_norm(unit_x_BD, dim=1) == 0).sum()
        figures = self._sum_over_replicas(torch.stack([loss, z_B.log().mean(), num_zero_features.to(loss.dtype)]))
        output = ShardOutput(
            loss=figures[0] / total_rows,
            log_z=figures[1] / self.num_replicas,
            num_zero_features=figures[2],
            feature_gradient_bD=project_gradient(gradient_bD, unit_x_bD, inverse_b1).to(x_bD.dtype),
        )
        return output, DeferredRows(unit_x_BD, z_B, y_B, replace(labels, exp=sums.entry_exp_P), total_rows)

    def defer(self, rows: DeferredRows) -> None:
        """Keeps the weight gradient of a micro-batch for `step`."""
        self._pending.append(rows)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One SGD step of local rows for all micro-batches since the last step; call only if their loss is finite.

        ∂J/∂w of the whole step is computed here in one pass over W. That costs the same arithmetic as micro-batch by
        micro-batch, reads W once, and leaves W untouched by a bad micro-batch, for the memory of B x D embeddings.
        """
        rate = learning_rate * self.learning_rate_multiplier
        update = RowUpdate(rate, self.momentum, self.weight_decay, self._rounding_seed)
        pending, self._pending = self._pending, []
        sampled, self._sampled = self._sampled, None
        weight, momentum = self.weight, self.momentum_buffer
        if sampled is not None:
            weight, momentum = sampled.weight, sampled.momentum
        sum_over_ = None if self.replicas is None else self.replicas.all_reduce_sum_
        self._passes.update_rows(
            torch.cat([p.unit_x_BD for p in pending]),
            torch.cat([p.z_B for p in pending]),
            torch.cat([p.y_B for p in pending]),
            SmoothedLabels.concatenate([p.labels for p in pending], [len(p.z_B) for p in pending]),
            weight,
            momentum,
            self.options,
            update,
            total_rows=pending[0].total_rows,
            sum_gradient_=sum_over_,
        )
        if sampled is not None and self._clock is not None:
            self.weight[sampled.places], self.momentum_buffer[sampled.places] = weight, momentum
            self._clock.advance(sampled.places, update)
        self.steps_taken += 1

    def discard(self) -> None:
        """In place of `step`: forgets the micro-batches since the last step and changes neither W nor its momentum."""
        self._pending = []
        self._sampled = None
        self.steps_taken += 1

    @torch.no_grad()
    def settle(self) -> None:
        """Brings rows that were not sampled up to date; call before reading all of W. Does nothing without sampling."""
        if self._clock is not None:
            self._clock.settle_all(self._rounding_seed)

    @torch.no_grad()
    def refresh_hard_classes(
        self,
        num_hard_classes: int,
        on_block: Callable[[int, int], None] | None = None,
        on_not_finite: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Searches the K hardest classes of every local class; K = 0 turns smoothing off."""
        if num_hard_classes == 0 or self.smoothing_factor == 0:
            self.hard_classes = None
            return
        self.settle()
        self.hard_classes = find_hard_classes(
            self.weight,
            num_hard_classes,
            self.partition,
            self.group,
            block_bytes=search_bytes(self.options.block_bytes, self.weight.device),
            on_block=on_block,
            on_not_finite=on_not_finite,
        )

    @torch.no_grad()
    def assign(self, x_BD: Tensor, instance_id_B: Tensor) -> None:
        """Writes w_i ← x_i for the gathered rows that this rank owns; (B, D) and (B,) int64."""
        own_B = self._owns(instance_id_B)
        self.weight[instance_id_B[own_B] - self.start] = x_BD[own_B].to(self.weight.dtype)

    def own_state(self) -> dict[str, Tensor | None]:
        """Local rows and their state, copied to the CPU, for `restore_rows`.

        Each call reuses the memory of the last one, because touching new memory takes longer than copying: a result is
        valid until the next call.
        """
        clock = None if self._clock is None else self._clock.seen_n
        values = {
            "weight": self.weight,
            "momentum": self.momentum_buffer,
            "hard_classes": self.hard_classes,
            "steps_seen": clock,
        }
        for name, value in values.items():
            kept = self._copies.get(name)
            if value is None or kept is None or kept.shape != value.shape:
                self._copies[name] = None if value is None else value.to("cpu", copy=True)
            else:
                kept.copy_(value)
        return dict(self._copies)

    def restore_rows(self, own: slice | Tensor, theirs: slice | Tensor, state: Mapping[str, Tensor | None]) -> None:
        """Fills local rows from any shard's `own_state`.

        Args:
            own: counted from the first local row, a slice or (k,) int64 on the CPU.
            theirs: the row of `state` that each of them takes.
        """
        weight, momentum, hard, seen = (state[name] for name in ("weight", "momentum", "hard_classes", "steps_seen"))
        assert weight is not None
        assert momentum is not None
        self.weight[own] = weight[theirs].to(self.weight)
        self.momentum_buffer[own] = momentum[theirs].to(self.momentum_buffer)
        if hard is not None:
            if self.hard_classes is None:
                shape = len(self.weight), hard.shape[1]
                self.hard_classes = torch.empty(shape, dtype=hard.dtype, device=self.weight.device)
            self.hard_classes[own] = hard[theirs].to(self.weight.device)
        if seen is not None and self._clock is not None:
            self._clock.seen_n[own] = seen[theirs].to(self.weight.device)

    def sampling_state(self) -> dict[str, Tensor]:
        """State of sampling beside the rows, equal on all ranks; empty without sampling."""
        if self.sampler is None or self._clock is None:
            return {}
        return {"recent_classes": self.sampler.recent_classes.clone(), "clock_maps": self._clock.maps.clone()}

    def restore_sampling(self, state: dict[str, Tensor]) -> None:
        """Restores a `sampling_state`."""
        if self.sampler is not None and self._clock is not None:
            self.sampler.recent_classes = state["recent_classes"].clone()
            self._clock.maps = state["clock_maps"].clone()

    @torch.no_grad()
    def measure(self, x_bD: Tensor, instance_id_b: Tensor) -> tuple[float, float]:
        """Instance accuracy (top-1 against all N classes, a fraction) and mean positive cosine of a batch.

        Args:
            x_bD: (b, D) embeddings, b equal on all ranks.
            instance_id_b: (b,) int64.
        """
        self.settle()
        labels_B = self.group.all_gather_rows(instance_id_b)
        unit_x_BD = self.group.all_gather_rows(normalise_rows(x_bD.to(self._compute_dtype))[0])
        own_best_B, own_class_B = torch_passes.best_classes(unit_x_BD, self.weight, self.options)
        best_B = self.group.all_reduce_max_(own_best_B.clone())
        nowhere = self.partition.total
        class_B = torch.where(own_best_B == best_B, own_class_B + self.start, nowhere)
        self.group.all_reduce_min_(class_B)  # of equal cosines on different ranks, the lower id
        own_B = self._owns(labels_B)
        unit_w, _ = normalise_rows(self.weight[labels_B[own_B] - self.start].to(self._compute_dtype))
        positive = self.group.all_reduce_sum_((unit_x_BD[own_B] * unit_w).sum())
        correct = (class_B == labels_B).to(positive.dtype).mean()
        figures = self._sum_over_replicas(torch.stack([correct, positive / labels_B.shape[0]])) / self.num_replicas
        return figures[0].item(), figures[1].item()

    @property
    def _passes(self) -> Passes:
        return torch_passes if self.options.kernels == "torch" else triton_passes

    @property
    def _rounding_seed(self) -> int:
        """Equal on the replicas of a shard, different for each step and shard."""
        return ((self.seed * 1_000_003 + self.steps_taken) * 1_000_003 + self.group.rank) % 2**64

    def _sum_over_replicas(self, figures: Tensor) -> Tensor:
        return figures if self.replicas is None else self.replicas.all_reduce_sum_(figures)

    def _owns(self, instance_id_B: Tensor) -> Tensor:
        """(B,) bool: whether this rank holds the row of each instance."""
        return (instance_id_B >= self.start) & (instance_id_B < self.stop)

    def _own_labels(self, labels_B: Tensor, sampled: _SampledRows | None) -> SmoothedLabels:
        """The entries of y among the rows that the softmax runs over."""
        if sampled is None:
            hard_BK = self._hard_classes_of(labels_B)
            return own_labels(labels_B, hard_BK, self.smoothing_factor, self.start, self.stop, self._compute_dtype)
        labels = own_labels(labels_B, None, 0.0, self.start, self.stop, self._compute_dtype)
        return replace(labels, classes=torch.searchsorted(sampled.places, labels.classes))

    def _hard_classes_of(self, labels_B: Tensor) -> Tensor | None:
        """(B, K) hardest classes of each row's instance: each owner fills in its rows, an all-reduce combines them."""
        if self.hard_classes is None:
            return None
        # Indexing with a mask would make the host wait for the GPU's count.
        places_B = (labels_B - self.start).clamp(0, len(self.hard_classes) - 1)
        return self.group.all_reduce_sum_(self.hard_classes[places_B] * self._owns(labels_B)[:, None])
