"""Cosine softmax over a shard of the classes (Eq. 1 and Eq. 3), streamed over blocks of classes.

The maths, for row i of the global batch with label t(i), embedding x_i and class weights w_j:

    s_ij = cos(w_j, x_i) / τ        Z_i = Σ_j exp(s_ij)        Y_i = Σ_j y_ij exp(s_ij)
    mixture (Eq. 3):       J = mean_i (log Z_i - log Y_i)                  q_ij = y_ij exp(s_ij) / Y_i
    cross_entropy:         J = mean_i (log Z_i - Σ_j y_ij s_ij)            q_ij = y_ij
    ∂J/∂s_ij = (exp(s_ij)/Z_i - q_ij) / B

y has K+1 entries a row (Eq. 2), so Y and q are sparse; Z is dense. Two passes over the shard:

1. `softmax_sums`: Z, Y and the numerators A_i = Σ_j exp(s_ij) ŵ_j, C_i = Σ_j y_ij exp(s_ij) ŵ_j of this shard. Once
   Z and Y are summed over the ranks, ∂J/∂x̂_i = (A_i/Z_i - C_i/Y_i)/(τB): the gradient of the features needs no
   second look at the weights (it is attention with queries x̂ and keys = values = ŵ).
2. `update_rows`: recomputes each block's exp(s), forms that block's ∂J/∂w and applies it at once to the block's
   momentum and rows. No ∂W exists.

No tensor of B x n (rows x own classes) exists either: one block buffer is reused.

No maximum is subtracted. |s| ≤ 1/τ, so for τ ≥ 0.03 exp(s) lies in [3e-15, 3e14], and 30 million of them sum to at
most 1e22: float32 holds all of it at full relative precision. A smaller τ is refused (`MIN_TEMPERATURE`).

Precision: within a block, the matrix products and exp(s) are in `matmul_dtype`, bfloat16 rounding included; sums over
blocks, Z and Y are accumulated in the rows' precision (float32; float64 in the tests).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossForm = Literal["mixture", "cross_entropy"]

MIN_TEMPERATURE = 0.03
NORM_EPSILON = 1e-12

# Entries of the sparse part handled at once; bounds its (entries, D) workspace at 32 MiB for D = 128.
_ENTRIES_AT_ONCE = 65_536

# Longer blocks were no faster and leave the cache.
_MAX_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class SoftmaxOptions:
    """What both passes need to know.

    Attributes:
        temperature: τ ≥ `MIN_TEMPERATURE`.
        form: `mixture` is Eq. 3 (with one-hot labels Eq. 1), `cross_entropy` the usual smoothed form.
        block_bytes: memory for the one block buffer.
        matmul_dtype: precision of the matrix products: float32, bfloat16, or float64 with float64 rows.
    """

    temperature: float
    form: LossForm
    block_bytes: int
    matmul_dtype: torch.dtype

    def block_rows(self, num_rows: int) -> int:
        """Classes in one block when the batch has `num_rows` rows."""
        return max(1, min(_MAX_BLOCK_ROWS, self.block_bytes // (max(1, num_rows) * self.matmul_dtype.itemsize)))


@dataclass(frozen=True)
class SmoothedLabels:
    """The nonzero entries y_ij of Eq. 2 that fall into this shard, sorted by class.

    Attributes:
        rows: (P,) int64, row i of the global batch.
        classes: (P,) int64, class j counted from the shard's first row, ascending.
        values: (P,) y_ij.
    """

    rows: Tensor
    classes: Tensor
    values: Tensor

    def entries_per_block(self, num_classes: int, block_rows: int) -> list[int]:
        """Number of entries in each block of classes."""
        edges = torch.arange(block_rows, num_classes + block_rows, block_rows, device=self.classes.device)
        ends = torch.searchsorted(self.classes, edges.clamp_(max=num_classes))
        return torch.diff(ends, prepend=ends.new_zeros(1)).tolist()


@dataclass(frozen=True)
class SoftmaxSums:
    """What one shard contributes to the softmax of B rows.

    Attributes:
        z_B: Σ exp(s_ij) over own classes.
        y_B: Σ y_ij exp(s_ij) over own classes (cross_entropy: Σ y_ij s_ij).
        dense_BD: A_i = Σ exp(s_ij) ŵ_j.
        sparse_BD: C_i = Σ y_ij exp(s_ij) ŵ_j (cross_entropy: Σ y_ij ŵ_j).
    """

    z_B: Tensor
    y_B: Tensor
    dense_BD: Tensor
    sparse_BD: Tensor


@dataclass(frozen=True)
class RowUpdate:
    """One SGD step of the rows: buf ← μ buf + (∂J/∂w + λ w);  w ← w - η buf.

    Attributes:
        learning_rate: η.
        momentum: μ.
        weight_decay: λ.
        seed: of the stochastic rounding of bfloat16 rows; another one every step.
    """

    learning_rate: float
    momentum: float
    weight_decay: float
    seed: int


def own_labels(
    labels_B: Tensor, hard_BK: Tensor | None, smoothing_factor: float, start: int, stop: int, dtype: torch.dtype
) -> SmoothedLabels:
    """Eq. 2, restricted to classes start … stop - 1.

    Args:
        labels_B: (B,) instance id of every row of the global batch.
        hard_BK: (B, K) hardest classes of each row's instance, or None for one-hot labels (Eq. 1).
        smoothing_factor: α in [0, 1).
    """
    classes_BL = labels_B[:, None]
    values_BL = torch.full_like(classes_BL, 1.0, dtype=dtype)
    if hard_BK is not None and smoothing_factor > 0:
        num_hard_classes = hard_BK.shape[1]
        classes_BL = torch.cat([classes_BL, hard_BK.to(labels_B.dtype)], dim=1)
        values_BL = torch.full_like(classes_BL, smoothing_factor / num_hard_classes, dtype=dtype)
        values_BL[:, 0] = 1 - smoothing_factor
    rows, columns = torch.nonzero((classes_BL >= start) & (classes_BL < stop), as_tuple=True)
    classes, order = torch.sort(classes_BL[rows, columns] - start, stable=True)
    return SmoothedLabels(rows[order], classes, values_BL[rows, columns][order])


def normalise_rows(rows_mD: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows (m, D) and their norms (m, 1), the norms bounded below so that a zero row stays zero."""
    norms = torch.linalg.vector_norm(rows_mD, dim=1, keepdim=True).clamp_(min=NORM_EPSILON)
    return rows_mD / norms, norms


def project_gradient(gradient_mD: Tensor, unit_mD: Tensor, norms_m1: Tensor) -> Tensor:
    """Gradient with respect to v from the one with respect to v/‖v‖: (I - v̂v̂ᵀ)/‖v‖ · g, row by row."""
    along = (gradient_mD * unit_mD).sum(dim=1, keepdim=True)
    return (gradient_mD - along * unit_mD) / norms_m1


def softmax_sums(
    unit_x_BD: Tensor,
    weight_nD: Tensor,
    labels: SmoothedLabels,
    options: SoftmaxOptions,
) -> SoftmaxSums:
    """First pass over the shard: its part of Z and Y and of the numerators of ∂J/∂x̂.

    Args:
        unit_x_BD: (B, D) normalised embeddings of the global batch.
        weight_nD: (n, D) own rows of W, not normalised.
        labels: the entries of y in this shard.
    """
    z_B = unit_x_BD.new_zeros(unit_x_BD.shape[0])
    y_B = torch.zeros_like(z_B)
    dense_BD = torch.zeros_like(unit_x_BD)
    sparse_BD = torch.zeros_like(unit_x_BD)
    for block in _blocks(unit_x_BD, weight_nD, labels, options):
        exp_Bm, unit_w_mD = block.exp_Bm, block.unit_w_mD
        z_B += exp_Bm.sum(dim=1, dtype=z_B.dtype)
        dense_BD += exp_Bm @ unit_w_mD.to(options.matmul_dtype)
        for part in block.entry_slices():
            rows, columns, values = labels.rows[part], labels.classes[part] - block.start, labels.values[part]
            exp_entries = exp_Bm[rows, columns].to(z_B.dtype)
            weights = values * exp_entries if options.form == "mixture" else values
            y_B.index_add_(0, rows, weights if options.form == "mixture" else values * exp_entries.log())
            sparse_BD.index_add_(0, rows, weights[:, None] * unit_w_mD[columns])
    return SoftmaxSums(z_B, y_B, dense_BD, sparse_BD)


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


def update_rows(
    unit_x_BD: Tensor,
    z_B: Tensor,
    y_B: Tensor,
    labels: SmoothedLabels,
    weight_nD: Tensor,
    momentum_nD: Tensor,
    options: SoftmaxOptions,
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Second pass: each block's ∂J/∂w goes straight into its momentum, then its rows move. In place.

    PyTorch's SGD: buf ← μ buf + (∂J/∂w + λ w);  w ← w - η buf.

    Args:
        unit_x_BD: (B, D) normalised embeddings of the whole optimizer step (all micro-batches).
        z_B: Z of all shards.
        y_B: Y of all shards.
        weight_nD: (n, D) own rows, updated.
        momentum_nD: (n, D) their momentum, updated.
    """
    scale = options.temperature * unit_x_BD.shape[0]
    scaled_x_BD = (unit_x_BD / (z_B[:, None] * scale)).to(options.matmul_dtype)
    for block in _blocks(unit_x_BD, weight_nD, labels, options):
        for part in block.entry_slices():
            rows, columns, values = labels.rows[part], labels.classes[part] - block.start, labels.values[part]
            exp_entries = block.exp_Bm[rows, columns].to(z_B.dtype)
            z_q = values * z_B[rows] * (exp_entries / y_B[rows] if options.form == "mixture" else 1)
            # Z_i (p_ij - q_ij), where the dense block holds Z_i p_ij: one matrix product then serves both parts.
            # The entries of a row are distinct classes, so no place is written twice.
            block.exp_Bm[rows, columns] = (exp_entries - z_q).to(options.matmul_dtype)
        gradient_mD = (block.exp_Bm.T @ scaled_x_BD).to(weight_nD.dtype)
        gradient_mD = project_gradient(gradient_mD, block.unit_w_mD, block.norms_m1)
        own = slice(block.start, block.stop)
        gradient_mD.add_(weight_nD[own], alpha=weight_decay)
        momentum_nD[own].mul_(momentum).add_(gradient_mD)
        weight_nD[own].add_(momentum_nD[own], alpha=-learning_rate)


def best_classes(unit_x_BD: Tensor, weight_nD: Tensor, options: SoftmaxOptions) -> tuple[Tensor, Tensor]:
    """Highest cosine of each row over own classes (B,) and its class counted from the shard's first row (B,).

    Always in the rows' own precision: bfloat16 cannot tell two neighbours near cosine 1 apart.
    """
    best_B = unit_x_BD.new_full((unit_x_BD.shape[0],), -torch.inf)
    class_B = torch.zeros_like(best_B, dtype=torch.int64)
    block_rows = options.block_rows(unit_x_BD.shape[0])
    for start in range(0, weight_nD.shape[0], block_rows):
        unit_w_mD, _ = normalise_rows(weight_nD[start : start + block_rows])
        value_B, index_B = (unit_x_BD @ unit_w_mD.T).max(dim=1)
        better_B = value_B > best_B
        best_B = torch.where(better_B, value_B, best_B)
        class_B = torch.where(better_B, index_B + start, class_B)
    return best_B, class_B


@dataclass(frozen=True)
class _Block:
    """Classes start … stop - 1 of the shard, the exp(s) of all rows for them, and where their labels lie."""

    start: int
    stop: int
    unit_w_mD: Tensor
    norms_m1: Tensor
    exp_Bm: Tensor
    first_entry: int
    last_entry: int

    def entry_slices(self) -> Iterator[slice]:
        """The block's label entries, a bounded number at a time."""
        for first in range(self.first_entry, self.last_entry, _ENTRIES_AT_ONCE):
            yield slice(first, min(first + _ENTRIES_AT_ONCE, self.last_entry))


def _blocks(
    unit_x_BD: Tensor,
    weight_nD: Tensor,
    labels: SmoothedLabels,
    options: SoftmaxOptions,
) -> Iterator[_Block]:
    """Blocks of classes in order, all in one reused buffer; a block is valid until the next one is asked for."""
    num_rows, num_classes = unit_x_BD.shape[0], weight_nD.shape[0]
    block_rows = options.block_rows(num_rows)
    matmul_x_BD = (unit_x_BD / options.temperature).to(options.matmul_dtype)
    buffer = matmul_x_BD.new_empty(num_rows * min(block_rows, num_classes))
    first_entry = 0
    for index, num_entries in enumerate(labels.entries_per_block(num_classes, block_rows)):
        start, stop = index * block_rows, min((index + 1) * block_rows, num_classes)
        unit_w_mD, norms_m1 = normalise_rows(weight_nD[start:stop])
        exp_Bm = buffer[: num_rows * (stop - start)].view(num_rows, stop - start)
        torch.mm(matmul_x_BD, unit_w_mD.to(options.matmul_dtype).T, out=exp_Bm)
        exp_Bm.exp_()
        yield _Block(start, stop, unit_w_mD, norms_m1, exp_Bm, first_entry, first_entry + num_entries)
        first_entry += num_entries
