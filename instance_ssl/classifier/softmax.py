"""Cosine softmax over a shard of the classes (Eq. 1 and Eq. 3): the maths, and what its two passes share.

For row i of the global batch with label t(i), embedding x_i and class weights w_j:

    s_ij = cos(w_j, x_i) / τ        Z_i = Σ_j exp(s_ij)        Y_i = Σ_j y_ij exp(s_ij)
    mixture (Eq. 3):       J = mean_i (log Z_i - log Y_i)                  q_ij = y_ij exp(s_ij) / Y_i
    cross_entropy:         J = mean_i (log Z_i - Σ_j y_ij s_ij)            q_ij = y_ij
    ∂J/∂s_ij = (exp(s_ij)/Z_i - q_ij) / B

y has K+1 entries a row (Eq. 2), so Y and q are sparse; Z is dense. Two passes over the shard:

1. `softmax_sums`: Z, Y and the numerators A_i = Σ_j exp(s_ij) ŵ_j, C_i = Σ_j y_ij exp(s_ij) ŵ_j of this shard. Once
   Z and Y are summed over the ranks, ∂J/∂x̂_i = (A_i/Z_i - C_i/Y_i)/(τB): the gradient of the features needs no
   second look at the weights (it is attention with queries x̂ and keys = values = ŵ).
2. `update_rows`: recomputes exp(s) block by block, forms that block's ∂J/∂w and applies it at once to the block's
   momentum and rows. No ∂W exists.

`torch_passes.py` has both passes in PyTorch for every device, `triton_passes.py` as Triton kernels for CUDA.

No maximum is subtracted. |s| ≤ 1/τ, so for τ ≥ 0.03 exp(s) lies in [3e-15, 3e14], and 30 million of them sum to at
most 1e22: float32 holds all of it at full relative precision. A smaller τ is refused (`MIN_TEMPERATURE`).

A row shorter than `NORM_EPSILON` has no direction: its cosines are 0, and so is its gradient, which would be divided by
the row's norm. Code without such a gradient, like the search for hard classes, uses `directions`, where only 0 has
none.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from instance_ssl.config.choices import Kernels, LossForm

NORM_EPSILON = 1e-12


@dataclass(frozen=True)
class SoftmaxOptions:
    """Options of both passes.

    Attributes:
        temperature: τ ≥ `MIN_TEMPERATURE`.
        form: `mixture` is Eq. 3 (with one-hot labels Eq. 1), `cross_entropy` the usual smoothed form.
        matmul_dtype: precision of the matrix products: float32, bfloat16, or float64 with float64 rows.
        block_bytes: memory for all buffers of a block of classes; None: chosen by the cache.
        kernels: implementation of the two passes.
    """

    temperature: float
    form: LossForm
    matmul_dtype: torch.dtype
    block_bytes: int | None = None
    kernels: Kernels = "torch"


@dataclass(frozen=True)
class RowUpdate:
    """One step of PyTorch's SGD: buf ← μ buf + (∂J/∂w + λ w);  w ← w - η buf.

    Attributes:
        learning_rate: η.
        momentum: μ.
        weight_decay: λ.
        seed: of the stochastic rounding of bfloat16 rows.
    """

    learning_rate: float
    momentum: float
    weight_decay: float
    seed: int = 0


@dataclass(frozen=True)
class SmoothedLabels:
    """The nonzero entries y_ij of Eq. 2 that fall into this shard, sorted by class.

    Attributes:
        rows: (P,) int64, row i of the global batch.
        classes: (P,) int64, class j counted from the shard's first row, ascending.
        values: (P,) y_ij.
        exp: (P,) exp(s_ij) from the first pass, for the second; None: not computed yet.
    """

    rows: Tensor
    classes: Tensor
    values: Tensor
    exp: Tensor | None = None

    @staticmethod
    def concatenate(parts: Sequence["SmoothedLabels"], row_counts: Sequence[int]) -> "SmoothedLabels":
        """The labels of several batches as those of one, rows in the same order."""
        if len(parts) == 1:
            return parts[0]
        firsts = [0, *itertools.accumulate(row_counts)]
        rows = torch.cat([part.rows + first for part, first in zip(parts, firsts, strict=False)])
        classes, order = torch.sort(torch.cat([part.classes for part in parts]), stable=True)
        found = [part.exp for part in parts if part.exp is not None]
        exp = torch.cat(found)[order] if len(found) == len(parts) else None
        return SmoothedLabels(rows[order], classes, torch.cat([part.values for part in parts])[order], exp)


@dataclass(frozen=True)
class SoftmaxSums:
    """What one shard contributes to the softmax of B rows.

    Attributes:
        z_B: Σ exp(s_ij) over local classes.
        y_B: Σ y_ij exp(s_ij) over local classes (cross_entropy: Σ y_ij s_ij).
        dense_BD: A_i = Σ exp(s_ij) ŵ_j.
        sparse_BD: C_i = Σ y_ij exp(s_ij) ŵ_j (cross_entropy: Σ y_ij ŵ_j).
        entry_exp_P: exp(s_ij) of the entries of y, in their order; None if they were not kept.
    """

    z_B: Tensor
    y_B: Tensor
    dense_BD: Tensor
    sparse_BD: Tensor
    entry_exp_P: Tensor | None = None


@dataclass(frozen=True)
class DeferredRows:
    """What the second pass needs of a micro-batch.

    Attributes:
        unit_x_BD: normalised embeddings of the micro-batch, of all ranks.
        z_B: Z summed over all shards.
        y_B: Y summed over all shards.
        labels: the entries of y in this shard.
        total_rows: rows that J is the mean over.
    """

    unit_x_BD: Tensor
    z_B: Tensor
    y_B: Tensor
    labels: SmoothedLabels
    total_rows: int

    def scaled(self, factor: float, form: LossForm) -> "DeferredRows":
        """Those of `factor` > 0 times the loss: ∂J/∂s consists of exp(s)/Z and y exp(s)/Y (cross_entropy: y)."""
        if form == "mixture":
            return replace(self, z_B=self.z_B / factor, y_B=self.y_B / factor)
        labels = replace(self.labels, values=self.labels.values * factor)
        return replace(self, z_B=self.z_B / factor, labels=labels)


class Passes(Protocol):
    """The two passes over a shard. `torch_passes` and `triton_passes` are modules of this type."""

    def softmax_sums(
        self, unit_x_BD: Tensor, weight_nD: Tensor, labels: SmoothedLabels, options: SoftmaxOptions
    ) -> SoftmaxSums:
        """First pass: this shard's part of Z and Y and of the numerators of ∂J/∂x̂.

        Args:
            unit_x_BD: (B, D) normalised embeddings of the global batch.
            weight_nD: (n, D) local rows of W, not normalised.
            labels: the entries of y in this shard.
        """

    def update_rows(
        self,
        unit_x_BD: Tensor,
        z_B: Tensor,
        y_B: Tensor,
        labels: SmoothedLabels,
        weight_nD: Tensor,
        momentum_nD: Tensor,
        options: SoftmaxOptions,
        update: RowUpdate,
        *,
        total_rows: int | None = None,
        sum_gradient_: Callable[[Tensor], object] | None = None,
    ) -> None:
        """Second pass: ∂J/∂w and the SGD step of every row, in place.

        Args:
            unit_x_BD: (B, D) normalised embeddings of the whole optimizer step (all micro-batches).
            z_B: (B,) Z summed over all shards.
            y_B: (B,) Y summed over all shards.
            labels: the entries of y in this shard.
            weight_nD: (n, D) local rows, updated.
            momentum_nD: (n, D) their momentum, updated.
            total_rows: rows that J is the mean over; None: B.
            sum_gradient_: sums a block's gradient over the replicas of this shard, in place; None: one replica.
        """


def own_labels(
    labels_B: Tensor, hard_BK: Tensor | None, smoothing_factor: float, start: int, stop: int, dtype: torch.dtype
) -> SmoothedLabels:
    """Eq. 2, restricted to classes start … stop - 1.

    Args:
        labels_B: (B,) instance id of every row of the global batch.
        hard_BK: (B, K) hardest classes of each row's instance, or None for one-hot labels (Eq. 1). A class has
            fewer, and -1 in the other places, where rows of W are not finite: those that it has share α, and without
            any the label is one-hot.
        smoothing_factor: α in [0, 1).
    """
    classes_BL = labels_B[:, None]
    values_BL = torch.full_like(classes_BL, 1.0, dtype=dtype)
    if hard_BK is not None and smoothing_factor > 0:
        classes_BL = torch.cat([classes_BL, hard_BK.to(labels_B.dtype)], dim=1)
        num_hard_B = (hard_BK >= 0).sum(dim=1).double()
        values_BL = (smoothing_factor / num_hard_B).to(dtype)[:, None].repeat(1, classes_BL.shape[1])
        values_BL[:, 0] = 1 - smoothing_factor * (num_hard_B > 0).double()
    rows, columns = torch.nonzero((classes_BL >= start) & (classes_BL < stop), as_tuple=True)
    classes, order = torch.sort(classes_BL[rows, columns] - start, stable=True)
    return SmoothedLabels(rows[order], classes, values_BL[rows, columns][order])


def inverse_norms(rows_mD: Tensor, out: Tensor | None = None) -> Tensor:
    """1/‖w‖ of each row, (m, 1); 0 for a row without direction or with an infinity.

    The squares of a row longer than 1.8e19 overflow float32, so its norm is summed in float64. On a CPU the other rows
    keep their bits. On a GPU all rows are summed in float64, because the host would have to wait to tell them apart.
    """
    norms_m1 = torch.linalg.vector_norm(rows_mD, dim=1, keepdim=True, out=out)
    if rows_mD.device.type == "cpu" and float(norms_m1.sum()) < torch.inf:
        return _reciprocal(norms_m1, out)
    wide_m1 = torch.linalg.vector_norm(rows_mD, dim=1, keepdim=True, dtype=torch.float64)
    if rows_mD.device.type == "cpu":
        wide_m1 = torch.where(norms_m1.isinf(), wide_m1.reciprocal(), _reciprocal(norms_m1, out).double())
        return norms_m1.copy_(wide_m1)
    return norms_m1.copy_(_reciprocal(wide_m1, wide_m1))


def _reciprocal(norms_m1: Tensor, out: Tensor | None) -> Tensor:
    without_direction_m1 = norms_m1 <= NORM_EPSILON
    return torch.reciprocal(norms_m1, out=out).masked_fill_(without_direction_m1, 0)


def normalise_rows(rows_mD: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows (m, D) and inverse norms (m, 1), both 0 for a row without direction."""
    inverse_m1 = inverse_norms(rows_mD)
    return rows_mD * inverse_m1, inverse_m1


def finite_rows(rows_mD: Tensor) -> Tensor:
    """(m,) bool: whether all numbers of a row are finite."""
    is_finite_m = torch.linalg.vector_norm(rows_mD, dim=1).isfinite()
    if not bool(is_finite_m.all()):  # or its norm has overflowed
        is_finite_m |= rows_mD.isfinite().all(dim=1)
    return is_finite_m


def scaled_rows(rows_mD: Tensor) -> Tensor:
    """Finite rows (m, D), float32, scaled by powers of two where squares would overflow or underflow.

    The scaling changes no bit of their directions.
    """
    rows_mD = rows_mD.float()
    norms_m = torch.linalg.vector_norm(rows_mD, dim=1)
    if bool(((norms_m > 1e-9) & (norms_m < 1e15)).all()):
        return rows_mD
    peaks_m1 = torch.linalg.vector_norm(rows_mD, ord=torch.inf, dim=1, keepdim=True)
    return torch.ldexp(rows_mD, -torch.frexp(peaks_m1).exponent.clamp_(-126, 126))


def directions(rows_mD: Tensor) -> Tensor:
    """Unit rows (m, D), float32, of finite rows of any length; 0 for a row of zeros.

    For code that divides no gradient by ‖w‖.
    """
    return normalise_rows(scaled_rows(rows_mD))[0]


def project_gradient(gradient_mD: Tensor, unit_mD: Tensor, inverse_norms_m1: Tensor) -> Tensor:
    """Gradient with respect to v from the one with respect to v/‖v‖: (I - v̂v̂ᵀ)/‖v‖ · g, row by row."""
    along = (gradient_mD * unit_mD).sum(dim=1, keepdim=True)
    return (gradient_mD - along * unit_mD) * inverse_norms_m1


def row_losses(z_B: Tensor, y_B: Tensor, form: LossForm) -> Tensor:
    """J_i of every row, from Z and Y summed over all shards."""
    return z_B.log() - (y_B.log() if form == "mixture" else y_B)


def unit_feature_gradient(
    sums: SoftmaxSums, z_B: Tensor, y_B: Tensor, options: SoftmaxOptions, total_rows: int
) -> Tensor:
    """This shard's part of ∂J/∂x̂ (B, D); the sum over shards is exact.

    Args:
        z_B: Z of all shards.
        y_B: Y of all shards.
        total_rows: rows that J is the mean over: those of the whole optimizer step.
    """
    sparse_BD = sums.sparse_BD / y_B[:, None] if options.form == "mixture" else sums.sparse_BD
    return (sums.dense_BD / z_B[:, None] - sparse_BD) / (options.temperature * total_rows)


def round_stochastically_(values: Tensor, bits: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds float32 values to one of their two bfloat16 neighbours, in place, so that the expectation is exact.

    A step of SGD is far below half a unit in bfloat16's last place. Rounding to nearest would always lose it; this
    keeps it on average. Random low bits are added, then the low half of the float32 is cut off.

    Args:
        bits: int32 buffer of the same shape.
    """
    as_bits = values.view(torch.int32)
    as_bits.add_(bits.random_(0, 1 << 16, generator=generator)).bitwise_and_(-(1 << 16))
    return values
