"""Both passes over the shard (see `cosine_softmax.py`) in PyTorch, one block of classes after another.

The readable reference of the Triton kernels, and what runs on CPUs. Every buffer is made before the loop over blocks
and reused in it: no tensor of B x n (rows x own classes) exists, and the loop allocates nothing but the few numbers of
the entries of y that fall into the block.

Precision: the matrix products take and give `matmul_dtype`. The first pass widens bfloat16 logits before exp, so that
Z is a float32 sum of float32 terms; sums over blocks, Y, the gradient's projection and the update are in the
embeddings' precision (float32; float64 in the tests).
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from instance_ssl.classifier.cosine_softmax import (
    NORM_EPSILON,
    RowUpdate,
    SmoothedLabels,
    SoftmaxOptions,
    SoftmaxSums,
)
from instance_ssl.classifier.matmul import cache_bytes, fast_float32_products
from instance_ssl.classifier.rounding import round_stochastically_

# A block chosen by the cache: a shorter one spends its time between operations and in small products, a longer one
# leaves the cache. Ten of a core's second-level caches were as fast as any size with one thread and with two
# (runners/results/classifier_cpu_202611.md).
_CACHES_A_BLOCK = 10
_FEWEST_CLASSES, _MOST_CLASSES = 256, 8192


def block_classes(options: SoftmaxOptions, num_rows: int, embedding_dim: int) -> int:
    """Classes in one block when the batch has `num_rows` rows: what fits the memory budget, or else the cache."""
    size = block_bytes(options, 1, num_rows, embedding_dim)
    if options.block_bytes is not None:
        return max(1, options.block_bytes // size)
    return min(_MOST_CLASSES, max(_FEWEST_CLASSES, _CACHES_A_BLOCK * cache_bytes() // size))


def block_bytes(options: SoftmaxOptions, num_classes: int, num_rows: int, embedding_dim: int) -> int:
    """Memory of the buffers of a block, the larger of the two passes, for float32 embeddings and rows."""
    shape = (num_classes, num_rows, embedding_dim)
    return max(sums_block_bytes(options, *shape), update_block_bytes(options, *shape))


def sums_block_bytes(options: SoftmaxOptions, num_classes: int, num_rows: int, embedding_dim: int) -> int:
    """The same of `softmax_sums` alone."""
    wide, narrow = _widths(options)
    return num_classes * ((num_rows + embedding_dim) * (wide + narrow) + 2 * wide + 1)


def update_block_bytes(
    options: SoftmaxOptions,
    num_classes: int,
    num_rows: int,
    embedding_dim: int,
    *,
    row_dtype: torch.dtype = torch.float32,
    momentum_dtype: torch.dtype = torch.float32,
) -> int:
    """The same of `update_rows` alone."""
    wide, narrow = _widths(options)
    # Narrow rows are updated in a float32 copy and rounded by random bits, narrow momentum in a copy.
    copies = (8 if row_dtype.itemsize < 4 else 0) + (4 if momentum_dtype.itemsize < 4 else 0)
    row = num_rows * (narrow or wide) + embedding_dim * (2 * wide + 2 * narrow + copies)
    return num_classes * (row + 2 * wide + 1)


def _widths(options: SoftmaxOptions) -> tuple[int, int]:
    """Bytes of a number of the embeddings' precision, and of one in `matmul_dtype` where that is another one."""
    size = options.matmul_dtype.itemsize
    return max(4, size), 0 if size >= 4 else size


def softmax_sums(unit_x_BD: Tensor, weight_nD: Tensor, labels: SmoothedLabels, options: SoftmaxOptions) -> SoftmaxSums:
    """First pass over the shard: its part of Z and Y and of the numerators of ∂J/∂x̂.

    Args:
        unit_x_BD: (B, D) normalised embeddings of the global batch.
        weight_nD: (n, D) own rows of W, not normalised.
        labels: the entries of y in this shard.
    """
    num_rows = unit_x_BD.shape[0]
    z_B, y_B = unit_x_BD.new_zeros(2, num_rows)
    dense_BD, sparse_BD = unit_x_BD.new_zeros(2, *unit_x_BD.shape)
    logit_x_BD = (unit_x_BD / options.temperature).to(options.matmul_dtype)
    block = _UnitBlock(weight_nD, unit_x_BD, options)
    wide = unit_x_BD.new_empty(num_rows * block.length)
    narrow = _narrow(wide, options)
    sum_B, product_BD = torch.empty_like(z_B), torch.empty_like(logit_x_BD)
    with fast_float32_products(options.matmul_dtype):
        for (start, stop), entries in zip(block.bounds(), _label_blocks(labels, block, num_rows), strict=True):
            matmul_w_mD = block.load(start, stop)
            shape = (num_rows, stop - start)
            exp_Bm, logit_Bm = _shaped(wide, shape), _shaped(narrow, shape)
            torch.mm(logit_x_BD, matmul_w_mD.T, out=logit_Bm)
            torch.exp(_cast(logit_Bm, exp_Bm), out=exp_Bm)
            logit_p = entries.products(unit_x_BD, block.unit_mD) / options.temperature
            exp_p, places_p = logit_p.exp(), entries.rows * shape[1] + entries.columns
            # Z holds the very terms that Y holds: their errors cancel in log Z - log Y.
            exp_Bm.view(-1).index_copy_(0, places_p, exp_p)
            z_B.add_(torch.sum(exp_Bm, dim=1, out=sum_B))
            _cast(exp_Bm, logit_Bm)
            if logit_Bm.dtype != exp_Bm.dtype:
                # So do A and C, which nearly cancel where a row knows its class: their common terms are not rounded.
                logit_Bm.view(-1).index_fill_(0, places_p, 0)
                dense_BD.add_(entries.matrix(exp_p) @ block.unit_mD)
            dense_BD.add_(torch.mm(logit_Bm, matmul_w_mD, out=product_BD))
            weight_p = entries.values * exp_p if options.form == "mixture" else entries.values
            y_B.index_add_(0, entries.rows, weight_p if options.form == "mixture" else weight_p * logit_p)
            sparse_BD.add_(entries.matrix(weight_p) @ block.unit_mD)
    return SoftmaxSums(z_B, y_B, dense_BD, sparse_BD)


def update_rows(
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
    """Second pass: each block's ∂J/∂w goes straight into its momentum, then its rows move. In place.

    Args:
        unit_x_BD: (B, D) normalised embeddings of the whole optimizer step (all micro-batches).
        z_B: Z of all shards.
        y_B: Y of all shards.
        weight_nD: (n, D) own rows, updated.
        momentum_nD: (n, D) their momentum, updated.
        total_rows: rows that J is the mean over; None: B.
        sum_gradient_: adds up a block's gradient over the replicas of this shard, in place; None: there is one.
    """
    num_rows = unit_x_BD.shape[0]
    logit_x_BD = (unit_x_BD / options.temperature).to(options.matmul_dtype)
    scale = options.temperature * (num_rows if total_rows is None else total_rows)
    scaled_x_BD = (unit_x_BD / (z_B[:, None] * scale)).to(options.matmul_dtype)
    block = _UnitBlock(weight_nD, unit_x_BD, options)
    exp_buffer = logit_x_BD.new_empty(block.length * num_rows)
    wide = unit_x_BD.new_empty(block.length * unit_x_BD.shape[1])
    narrow = _narrow(wide, options)
    rows = _UpdatedRows(weight_nD, momentum_nD, block.length, update)
    with fast_float32_products(options.matmul_dtype):
        for (start, stop), entries in zip(block.bounds(), _label_blocks(labels, block, num_rows), strict=True):
            matmul_w_mD = block.load(start, stop)
            exp_mB = _shaped(exp_buffer, (stop - start, num_rows))
            torch.mm(matmul_w_mD, logit_x_BD.T, out=exp_mB).exp_()
            # Z_i (p_ij - q_ij) in place of Z_i p_ij: one product then serves the dense and the sparse part.
            exp_p = (entries.products(unit_x_BD, block.unit_mD) / options.temperature).exp_()
            zq_p = entries.values * z_B[entries.rows]
            term_p = exp_p - zq_p * (exp_p / y_B[entries.rows] if options.form == "mixture" else 1)
            exp_mB.view(-1).index_copy_(0, entries.columns * num_rows + entries.rows, term_p.to(exp_mB.dtype))
            shape = matmul_w_mD.shape
            gradient_mD = _cast(torch.mm(exp_mB, scaled_x_BD, out=_shaped(narrow, shape)), _shaped(wide, shape))
            if sum_gradient_ is not None:
                sum_gradient_(gradient_mD)
            rows.step(start, stop, gradient_mD, block)


def best_classes(unit_x_BD: Tensor, weight_nD: Tensor, options: SoftmaxOptions) -> tuple[Tensor, Tensor]:
    """Highest cosine of each row over own classes (B,) and its class counted from the shard's first row (B,).

    Always in the embeddings' own precision: bfloat16 cannot tell two neighbours near cosine 1 apart.
    """
    options = replace(options, matmul_dtype=unit_x_BD.dtype)
    best_B = unit_x_BD.new_full((unit_x_BD.shape[0],), -torch.inf)
    class_B = torch.zeros_like(best_B, dtype=torch.int64)
    block = _UnitBlock(weight_nD, unit_x_BD, options)
    buffer = unit_x_BD.new_empty(len(best_B) * block.length)
    with fast_float32_products(options.matmul_dtype):
        for start, stop in block.bounds():
            cosine_Bm = _shaped(buffer, (len(best_B), stop - start))
            value_B, index_B = torch.mm(unit_x_BD, block.load(start, stop).T, out=cosine_Bm).max(dim=1)
            better_B = value_B > best_B
            best_B = torch.where(better_B, value_B, best_B)
            class_B = torch.where(better_B, index_B + start, class_B)
    return best_B, class_B


class _UnitBlock:
    """The normalised rows of one block of classes after another, in buffers that are filled anew by each `load`."""

    def __init__(self, weight_nD: Tensor, unit_x_BD: Tensor, options: SoftmaxOptions) -> None:
        num_classes, embedding_dim = weight_nD.shape
        self.length = min(block_classes(options, *unit_x_BD.shape), num_classes)
        self._weight_nD = weight_nD
        self._unit = unit_x_BD.new_empty(self.length, embedding_dim)
        self._matmul = _narrow(self._unit, options)
        self._inverse_norms = unit_x_BD.new_empty(self.length, 1)
        self._along = torch.empty_like(self._inverse_norms)
        self._without_direction = torch.empty_like(self._inverse_norms, dtype=torch.bool)
        self._size = 0

    def bounds(self) -> Iterator[tuple[int, int]]:
        """First class of each block, and the class after its last."""
        for start in range(0, self._weight_nD.shape[0], self.length):
            yield start, min(start + self.length, self._weight_nD.shape[0])

    def load(self, start: int, stop: int) -> Tensor:
        """Unit rows of classes start … stop - 1 in matmul_dtype (m, D), 0 where a row has no direction."""
        size = self._size = stop - start
        rows_mD = _cast(self._weight_nD[start:stop], self.unit_mD)
        torch.linalg.vector_norm(rows_mD, dim=1, keepdim=True, out=self.inverse_norms_m1)
        torch.le(self.inverse_norms_m1, NORM_EPSILON, out=self._without_direction[:size])
        self.inverse_norms_m1.reciprocal_().masked_fill_(self._without_direction[:size], 0)
        torch.mul(rows_mD, self.inverse_norms_m1, out=self.unit_mD)
        return _cast(self.unit_mD, self._matmul[:size])

    @property
    def unit_mD(self) -> Tensor:
        """The loaded unit rows in the embeddings' precision."""
        return self._unit[: self._size]

    @property
    def inverse_norms_m1(self) -> Tensor:
        """1/‖w‖ of the loaded rows, 0 where a row has no direction."""
        return self._inverse_norms[: self._size]

    def along(self, gradient_mD: Tensor) -> Tensor:
        """ŵᵀg of each loaded row, (m, 1)."""
        along_m1 = self._along[: self._size]
        torch.bmm(gradient_mD[:, None], self.unit_mD[:, :, None], out=along_m1[:, :, None])
        return along_m1


class _UpdatedRows:
    """SGD of one block of rows after another: float32 arithmetic, whatever the rows and momentum are stored in."""

    def __init__(self, weight_nD: Tensor, momentum_nD: Tensor, length: int, update: RowUpdate) -> None:
        self._weight_nD, self._momentum_nD, self._update = weight_nD, momentum_nD, update
        shape = (length, weight_nD.shape[1])
        wide = torch.promote_types(weight_nD.dtype, torch.float32)
        self._rows = self._bits = self._momentum = None
        if weight_nD.dtype != wide:
            self._rows = weight_nD.new_empty(shape, dtype=wide)
            self._bits = weight_nD.new_empty(shape, dtype=torch.int32)
            self._generator = torch.Generator(weight_nD.device).manual_seed(update.seed)
        if momentum_nD.dtype != wide:
            self._momentum = momentum_nD.new_empty(shape, dtype=wide)

    def step(self, start: int, stop: int, gradient_mD: Tensor, block: _UnitBlock) -> None:
        """Moves rows start … stop - 1, which `block` holds, by ∂J/∂ŵ (m, D), which is overwritten.

        (I - ŵŵᵀ)/‖w‖ g + λ w is put together as g/‖w‖ + c w with c = λ - ŵᵀg/‖w‖²: two passes over the block, not four.
        """
        update, size = self._update, stop - start
        stored_rows, stored_momentum = self._weight_nD[start:stop], self._momentum_nD[start:stop]
        rows = stored_rows if self._rows is None else self._rows[:size].copy_(stored_rows)
        momentum = stored_momentum if self._momentum is None else self._momentum[:size].copy_(stored_momentum)
        inverse_m1, factor_m1 = block.inverse_norms_m1, block.along(gradient_mD)
        factor_m1.mul_(inverse_m1).mul_(inverse_m1).neg_().add_(update.weight_decay)
        gradient_mD.mul_(inverse_m1).addcmul_(rows, factor_m1)
        torch.add(gradient_mD, momentum, alpha=update.momentum, out=momentum)
        rows.add_(momentum, alpha=-update.learning_rate)
        if self._momentum is not None:
            stored_momentum.copy_(momentum)
        if self._bits is not None:
            stored_rows.copy_(round_stochastically_(rows, self._bits[:size], self._generator))


@dataclass(frozen=True)
class _BlockLabels:
    """The entries of y in one block of classes, ascending by row of the batch.

    Attributes:
        rows: (p,) int64.
        columns: (p,) int64, class counted from the block's first.
        values: (p,) y_ij.
        row_starts: (B + 1,) where each row's entries begin.
        num_classes: m, classes in the block.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    row_starts: Tensor
    num_classes: int

    def matrix(self, values_p: Tensor) -> Tensor:
        """A sparse (B, m) with these values at the entries."""
        size = (len(self.row_starts) - 1, self.num_classes)
        with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_csr_tensor(self.row_starts, self.columns, values_p, size, check_invariants=False)

    def products(self, x_BD: Tensor, unit_mD: Tensor) -> Tensor:
        """x_i · ŵ_j of every entry, (p,): the product of two dense matrices only where the sparse one has entries."""
        return torch.sparse.sampled_addmm(self.matrix(self.values), x_BD, unit_mD.T, beta=0.0).values()


def _label_blocks(labels: SmoothedLabels, block: _UnitBlock, num_rows: int) -> Iterator[_BlockLabels]:
    """The entries of y in each block of classes, in order."""
    bounds = list(block.bounds())
    block_P = labels.classes // block.length
    order = _argsort(block_P * num_rows + labels.rows)
    ends = torch.bincount(block_P, minlength=len(bounds)).cumsum(0).tolist()
    rows_P, classes_P, values_P = labels.rows[order], labels.classes[order], labels.values[order]
    all_rows = torch.arange(num_rows + 1, device=rows_P.device)
    for (start, stop), first, last in zip(bounds, [0, *ends[:-1]], ends, strict=True):
        rows_p = rows_P[first:last]
        row_starts = torch.searchsorted(rows_p, all_rows)
        yield _BlockLabels(rows_p, classes_P[first:last] - start, values_P[first:last], row_starts, stop - start)


def _argsort(keys_P: Tensor) -> Tensor:
    """Ascending order; on a CPU by NumPy, whose vectorised sort is four times as fast as torch's."""
    return torch.from_numpy(keys_P.numpy().argsort()) if keys_P.device.type == "cpu" else keys_P.argsort()


def _narrow(wide: Tensor, options: SoftmaxOptions) -> Tensor:
    """A buffer like `wide` in matmul_dtype; `wide` itself where that is its dtype."""
    return wide if wide.dtype == options.matmul_dtype else torch.empty_like(wide, dtype=options.matmul_dtype)


def _cast(source: Tensor, out: Tensor) -> Tensor:
    """`source` in the dtype of `out`: copied there, or itself where nothing need be done."""
    return source if source.dtype == out.dtype else out.copy_(source)


def _shaped(buffer: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The beginning of a flat buffer as a tensor of that shape."""
    return buffer[: math.prod(shape)].view(shape)
