"""Both passes over the shard (see `cosine_softmax.py`) in PyTorch, one block of classes after another.

The readable reference of the Triton kernels, and what runs on CPUs. Every buffer is made before the loop over blocks
and reused in it: no tensor of B x n (rows x own classes) exists, and the loop allocates nothing.

Precision: the matrix products take and give `matmul_dtype`. The first pass widens bfloat16 logits before exp, so that
Z is a float32 sum of float32 terms; sums over blocks, Y, the gradient's projection and the update are in the
embeddings' precision (float32; float64 in the tests).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

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

# Entries of y handled at once; their two (entries, D) buffers are 4 MiB each for D = 128.
ENTRIES_AT_ONCE = 8192

# A block chosen by the cache: a shorter one spends its time between operations and in small products, a longer one
# leaves the cache. Twice the second level was the fastest of 1/4 to 8 times (runners/benchmark_classifier.py).
_CACHES_A_BLOCK = 2
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
    # A and C share the terms of y's entries, which nearly cancel where a row knows its class. In bfloat16 the dense
    # product would round them: they are then added to A here, and left out there.
    is_narrow = options.matmul_dtype.itemsize < unit_x_BD.dtype.itemsize
    exp_P = torch.empty_like(labels.values)
    for part, logits_p, unit_w_pD in _entries(unit_x_BD, weight_nD, labels, options):
        rows_p, values_p = labels.rows[part], labels.values[part]
        torch.exp(logits_p, out=exp_P[part])
        weights_p = values_p * exp_P[part] if options.form == "mixture" else values_p
        y_B.index_add_(0, rows_p, weights_p if options.form == "mixture" else values_p * logits_p)
        if is_narrow:
            dense_BD.index_add_(0, rows_p, unit_w_pD * exp_P[part, None])
        sparse_BD.index_add_(0, rows_p, unit_w_pD.mul_(weights_p[:, None]))

    logit_x_BD = (unit_x_BD / options.temperature).to(options.matmul_dtype)
    block = _UnitBlock(weight_nD, unit_x_BD, options)
    entries = _entry_slices(labels, weight_nD.shape[0], block.length)
    wide = unit_x_BD.new_empty(num_rows * block.length)
    narrow = _narrow(wide, options)
    sum_B, product_BD = torch.empty_like(z_B), torch.empty_like(logit_x_BD)
    with fast_float32_products(options.matmul_dtype):
        for (start, stop), own in zip(block.bounds(), entries, strict=True):
            unit_mD = block.load(start, stop)
            shape = (num_rows, stop - start)
            exp_Bm, logit_Bm = _shaped(wide, shape), _shaped(narrow, shape)
            torch.mm(logit_x_BD, unit_mD.T, out=logit_Bm)
            torch.exp(_cast(logit_Bm, exp_Bm), out=exp_Bm)
            # Z holds the very terms that Y holds: their errors cancel in log Z - log Y.
            places_p = labels.rows[own] * (stop - start) + labels.classes[own] - start
            exp_Bm.view(-1).index_copy_(0, places_p, exp_P[own])
            z_B.add_(torch.sum(exp_Bm, dim=1, out=sum_B))
            _cast(exp_Bm, logit_Bm)
            if is_narrow:
                logit_Bm.view(-1).index_fill_(0, places_p, 0)
            dense_BD.add_(torch.mm(logit_Bm, unit_mD, out=product_BD))
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
    # Where the blocks' (m, B) products hold the entries of y, and Z_i (p_ij - q_ij) to put there in place of Z_i p_ij.
    places_P = (labels.classes % block.length) * num_rows + labels.rows
    terms_P = _label_terms(unit_x_BD, z_B, y_B, labels, weight_nD, options).to(options.matmul_dtype)
    entries = _entry_slices(labels, weight_nD.shape[0], block.length)
    with fast_float32_products(options.matmul_dtype):
        for (start, stop), own in zip(block.bounds(), entries, strict=True):
            unit_mD = block.load(start, stop)
            exp_mB = _shaped(exp_buffer, (stop - start, num_rows))
            torch.mm(unit_mD, logit_x_BD.T, out=exp_mB).exp_()
            exp_mB.view(-1).index_copy_(0, places_P[own], terms_P[own])
            product_mD = torch.mm(exp_mB, scaled_x_BD, out=_shaped(narrow, unit_mD.shape))
            gradient_mD = _cast(product_mD, _shaped(wide, unit_mD.shape))
            if sum_gradient_ is not None:
                sum_gradient_(gradient_mD)
            block.project_(gradient_mD)
            rows.step(start, stop, gradient_mD)


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
        unit_mD, inverse_m1 = self._unit[:size], self._inverse_norms[:size]
        rows_mD = _cast(self._weight_nD[start:stop], unit_mD)
        torch.linalg.vector_norm(rows_mD, dim=1, keepdim=True, out=inverse_m1)
        torch.le(inverse_m1, NORM_EPSILON, out=self._without_direction[:size])
        inverse_m1.reciprocal_().masked_fill_(self._without_direction[:size], 0)
        torch.mul(rows_mD, inverse_m1, out=unit_mD)
        return _cast(unit_mD, self._matmul[:size])

    def project_(self, gradient_mD: Tensor) -> None:
        """From ∂J/∂ŵ to ∂J/∂w of the loaded rows, in place: (I - ŵŵᵀ)/‖w‖ · g."""
        unit_mD, inverse_m1 = self._unit[: self._size], self._inverse_norms[: self._size]
        along_m1 = self._along[: self._size]
        torch.bmm(gradient_mD[:, None], unit_mD[:, :, None], out=along_m1[:, :, None])
        gradient_mD.addcmul_(unit_mD, along_m1, value=-1).mul_(inverse_m1)


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

    def step(self, start: int, stop: int, gradient_mD: Tensor) -> None:
        """Moves rows start … stop - 1 by their gradient."""
        update, size = self._update, stop - start
        stored_rows, stored_momentum = self._weight_nD[start:stop], self._momentum_nD[start:stop]
        rows = stored_rows if self._rows is None else self._rows[:size].copy_(stored_rows)
        momentum = stored_momentum if self._momentum is None else self._momentum[:size].copy_(stored_momentum)
        momentum.mul_(update.momentum).add_(gradient_mD).add_(rows, alpha=update.weight_decay)
        rows.add_(momentum, alpha=-update.learning_rate)
        if self._momentum is not None:
            stored_momentum.copy_(momentum)
        if self._bits is not None:
            stored_rows.copy_(round_stochastically_(rows, self._bits[:size], self._generator))


def _label_terms(
    unit_x_BD: Tensor, z_B: Tensor, y_B: Tensor, labels: SmoothedLabels, weight_nD: Tensor, options: SoftmaxOptions
) -> Tensor:
    """Z_i (p_ij - q_ij) of every entry of y in this shard, (P,)."""
    terms_P = torch.empty_like(labels.values)
    for part, logits_p, _ in _entries(unit_x_BD, weight_nD, labels, options):
        rows_p, exp_p = labels.rows[part], logits_p.exp_()
        zq_p = labels.values[part] * z_B[rows_p]
        terms_P[part] = exp_p - zq_p * (exp_p / y_B[rows_p] if options.form == "mixture" else 1)
    return terms_P


def _entries(
    unit_x_BD: Tensor, weight_nD: Tensor, labels: SmoothedLabels, options: SoftmaxOptions
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The entries of y, some at a time: which, their logits (p,) and their classes' unit rows (p, D)."""
    count, embedding_dim = labels.rows.shape[0], unit_x_BD.shape[1]
    length = min(count, ENTRIES_AT_ONCE)
    stored = weight_nD.new_empty(length, embedding_dim)
    unit_w, x = unit_x_BD.new_empty(2, length, embedding_dim)
    for first in range(0, count, ENTRIES_AT_ONCE):
        part = slice(first, min(first + ENTRIES_AT_ONCE, count))
        size = part.stop - part.start
        rows_pD = torch.index_select(weight_nD, 0, labels.classes[part], out=stored[:size])
        rows_pD = _cast(rows_pD, unit_w[:size])
        norms_p1 = torch.linalg.vector_norm(rows_pD, dim=1, keepdim=True)
        inverse_p1 = norms_p1.reciprocal().masked_fill_(norms_p1 <= NORM_EPSILON, 0)
        unit_w_pD = torch.mul(rows_pD, inverse_p1, out=unit_w[:size])
        x_pD = torch.index_select(unit_x_BD, 0, labels.rows[part], out=x[:size])
        yield part, x_pD.mul_(unit_w_pD).sum(dim=1) / options.temperature, unit_w_pD


def _entry_slices(labels: SmoothedLabels, num_classes: int, length: int) -> list[slice]:
    """The entries of y in each block of classes."""
    edges = torch.arange(0, num_classes + length, length, device=labels.classes.device)
    places = torch.searchsorted(labels.classes, edges.clamp_(max=num_classes)).tolist()
    return [slice(first, last) for first, last in itertools.pairwise(places)]


def _narrow(wide: Tensor, options: SoftmaxOptions) -> Tensor:
    """A buffer like `wide` in matmul_dtype; `wide` itself where that is its dtype."""
    return wide if wide.dtype == options.matmul_dtype else torch.empty_like(wide, dtype=options.matmul_dtype)


def _cast(source: Tensor, out: Tensor) -> Tensor:
    """`source` in the dtype of `out`: copied there, or itself where nothing need be done."""
    return source if source.dtype == out.dtype else out.copy_(source)


def _shaped(buffer: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The beginning of a flat buffer as a tensor of that shape."""
    return buffer[: math.prod(shape)].view(shape)
