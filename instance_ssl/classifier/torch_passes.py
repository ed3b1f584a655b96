"""Both passes over the shard (see `softmax.py`) in PyTorch, block by block of classes.

The readable reference for the Triton kernels, and the implementation for CPUs. Every buffer is allocated before the
loop over blocks and reused in it; the loop allocates only the indices of the entries of y that fall into the block. No
tensor of B x n (rows x local classes) exists.

Most of the time goes into the four matrix products; the rest makes as few passes over a block as possible:

- exp(s) is 2^(s/ln 2), the factor in the embeddings that the products take: torch's `exp2` is three times as fast as
  its `exp` in float32, which it hands to MKL.
- The entries of y are computed apart from the dense products, for many blocks at once, before the loop
  (`label_terms.py`). In the loop their logits become -inf, which adds nothing to any sum.

Precision: the matrix products read and write `matmul_dtype`. The first pass widens bfloat16 logits before exp, so that
Z is a float32 sum of float32 terms; the entries of y, sums over blocks, Y, the gradient's projection and the update are
in the embeddings' precision (float32; float64 in the tests).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from instance_ssl.classifier.label_terms import entry_exp, entry_sums, gradient_terms
from instance_ssl.classifier.matmul_rates import cache_bytes, fast_float32_products
from instance_ssl.classifier.softmax import (
    RowUpdate,
    SmoothedLabels,
    SoftmaxOptions,
    SoftmaxSums,
    inverse_norms,
    round_stochastically_,
)

# A block chosen by the cache: shorter ones spend their time between operations and in small products, longer ones leave
# the cache. Ten second-level caches of a core were as fast as any size with one thread and with two
# (runners/results/classifier_cpu_202611.md).
_CACHES_A_BLOCK = 10
_FEWEST_CLASSES, _MOST_CLASSES = 256, 8192


def block_classes(options: SoftmaxOptions, num_rows: int, embedding_dim: int) -> int:
    """Classes in a block for a batch of `num_rows`: as many as fit the memory budget, or else the cache."""
    size = block_bytes(options, 1, num_rows, embedding_dim)
    if options.block_bytes is not None:
        return max(1, options.block_bytes // size)
    return min(_MOST_CLASSES, max(_FEWEST_CLASSES, _CACHES_A_BLOCK * cache_bytes() // size))


def block_bytes(options: SoftmaxOptions, num_classes: int, num_rows: int, embedding_dim: int) -> int:
    """Bytes of the buffers of a block in the larger of the two passes, for float32 embeddings and rows."""
    shape = (num_classes, num_rows, embedding_dim)
    return max(sums_block_bytes(options, *shape), update_block_bytes(options, *shape))


def sums_block_bytes(options: SoftmaxOptions, num_classes: int, num_rows: int, embedding_dim: int) -> int:
    """Bytes of the buffers of a block in `softmax_sums`."""
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
    """Bytes of the buffers of a block in `update_rows`."""
    wide, narrow = _widths(options)
    # Narrow rows need a float32 copy and random bits, narrow momentum a copy.
    copies = (8 if row_dtype.itemsize < 4 else 0) + (4 if momentum_dtype.itemsize < 4 else 0)
    row = num_rows * (narrow or wide) + embedding_dim * (2 * wide + 2 * narrow + copies)
    return num_classes * (row + 2 * wide + 1)


def _widths(options: SoftmaxOptions) -> tuple[int, int]:
    """Bytes of a number in the embeddings' precision, and in `matmul_dtype` if that is a narrower one, else 0."""
    size = options.matmul_dtype.itemsize
    return max(4, size), 0 if size >= 4 else size


def softmax_sums(
    unit_x_BD: Tensor,
    weight_nD: Tensor,
    labels: SmoothedLabels,
    options: SoftmaxOptions,
) -> SoftmaxSums:
    """First pass over the shard, see `softmax.Passes`."""
    num_rows = unit_x_BD.shape[0]
    logit_x_BD = _logit_embeddings(unit_x_BD, options)
    block = _UnitBlock(weight_nD, unit_x_BD, options)
    sums = entry_sums(labels, weight_nD, unit_x_BD, options, block_classes(options, *unit_x_BD.shape))
    wide = unit_x_BD.new_empty(num_rows * block.length)
    narrow = _narrow(wide, options)
    sum_B, product_BD = torch.empty_like(sums.z_B), torch.empty_like(logit_x_BD)
    with fast_float32_products(options.matmul_dtype):
        for (start, stop), (first, last) in zip(block.bounds(), _entry_bounds(labels, block), strict=True):
            unit_mD = block.load(start, stop)
            shape = (num_rows, stop - start)
            logit_Bm = _shaped(narrow, shape)
            exp_Bm = logit_Bm if narrow is wide else _shaped(wide, shape)
            torch.mm(logit_x_BD, unit_mD.T, out=logit_Bm)
            places_p = labels.classes[first:last].sub(start).add_(labels.rows[first:last], alpha=stop - start)
            logit_Bm.view(-1).index_fill_(0, places_p, -torch.inf)
            _cast(logit_Bm, exp_Bm).exp2_()
            sums.z_B.add_(torch.sum(exp_Bm, dim=1, out=sum_B))
            sums.dense_BD.add_(torch.mm(_cast(exp_Bm, logit_Bm), unit_mD, out=product_BD))
    return sums


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
    """Second pass over the shard, see `softmax.Passes`: each block's ∂J/∂w goes straight into its momentum."""
    num_rows = unit_x_BD.shape[0]
    at_once = block_classes(options, *unit_x_BD.shape)
    labels = replace(labels, exp=entry_exp(labels, weight_nD, unit_x_BD, options, at_once))
    term_P = gradient_terms(z_B, y_B, labels, options).to(options.matmul_dtype)
    logit_x_DB = _logit_embeddings(unit_x_BD, options).T.contiguous()
    scale = options.temperature * (num_rows if total_rows is None else total_rows)
    scaled_x_BD = (unit_x_BD / (z_B[:, None] * scale)).to(options.matmul_dtype)
    block = _UnitBlock(weight_nD, unit_x_BD, options)
    buffer = logit_x_DB.new_empty(block.length * num_rows)
    wide = unit_x_BD.new_empty(block.length * unit_x_BD.shape[1])
    narrow = _narrow(wide, options)
    rows = _UpdatedRows(weight_nD, momentum_nD, block.length, update)
    with fast_float32_products(options.matmul_dtype):
        for (start, stop), (first, last) in zip(block.bounds(), _entry_bounds(labels, block), strict=True):
            exp_mB = _shaped(buffer, (stop - start, num_rows))
            torch.mm(block.load(start, stop), logit_x_DB, out=exp_mB).exp2_()
            places_p = labels.classes[first:last].sub(start).mul_(num_rows).add_(labels.rows[first:last])
            exp_mB.view(-1).index_copy_(0, places_p, term_P[first:last])
            shape = torch.Size((stop - start, unit_x_BD.shape[1]))
            gradient_mD = _cast(torch.mm(exp_mB, scaled_x_BD, out=_shaped(narrow, shape)), _shaped(wide, shape))
            if sum_gradient_ is not None:
                sum_gradient_(gradient_mD)
            rows.step(start, stop, gradient_mD, block)


def best_classes(unit_x_BD: Tensor, weight_nD: Tensor, options: SoftmaxOptions) -> tuple[Tensor, Tensor]:
    """Highest cosine of each row over local classes (B,) and its class, counted from the shard's first row (B,).

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
            torch.mm(unit_x_BD, block.load(start, stop).T, out=cosine_Bm)
            value_B, index_B = cosine_Bm.max(dim=1)
            better_B = value_B > best_B
            best_B = torch.where(better_B, value_B, best_B)
            class_B = torch.where(better_B, index_B + start, class_B)
    return best_B, class_B


class _UnitBlock:
    """The normalised rows of the current block of classes, in buffers that each `load` refills."""

    def __init__(self, weight_nD: Tensor, unit_x_BD: Tensor, options: SoftmaxOptions) -> None:
        num_classes, embedding_dim = weight_nD.shape
        self.length = min(block_classes(options, *unit_x_BD.shape), num_classes)
        self._weight_nD = weight_nD
        self._unit = unit_x_BD.new_empty(self.length, embedding_dim)
        self._matmul = _narrow(self._unit, options)
        self._inverse_norms = unit_x_BD.new_empty(self.length, 1)
        self._along = torch.empty_like(self._inverse_norms)
        self._size = 0

    def bounds(self) -> Iterator[tuple[int, int]]:
        """First class of each block, and the class after its last."""
        for start in range(0, self._weight_nD.shape[0], self.length):
            yield start, min(start + self.length, self._weight_nD.shape[0])

    def load(self, start: int, stop: int) -> Tensor:
        """Unit rows of classes start … stop - 1 in matmul_dtype (m, D), 0 where a row has no direction."""
        self._size = stop - start
        rows_mD = _cast(self._weight_nD[start:stop], self.unit_mD)
        inverse_norms(rows_mD, out=self.inverse_norms_m1)
        torch.mul(rows_mD, self.inverse_norms_m1, out=self.unit_mD)
        return _cast(self.unit_mD, self._matmul[: self._size])

    @property
    def unit_mD(self) -> Tensor:
        """The loaded unit rows in the embeddings' precision."""
        return self._unit[: self._size]

    @property
    def inverse_norms_m1(self) -> Tensor:
        """1/‖w‖ of the loaded rows, 0 where a row has no direction."""
        return self._inverse_norms[: self._size]

    def along(self, rows_mD: Tensor, gradient_mD: Tensor) -> Tensor:
        """ŵᵀg of each row, (m, 1). Overwrites the unit rows."""
        products_mD = torch.mul(rows_mD, gradient_mD, out=self.unit_mD)
        return torch.sum(products_mD, dim=1, keepdim=True, out=self._along[: self._size]).mul_(self.inverse_norms_m1)


class _UpdatedRows:
    """SGD of the current block of rows: float32 arithmetic, whatever the dtypes of rows and momentum."""

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
        """Moves rows start … stop - 1, which `block` holds, by ∂J/∂ŵ (m, D), and overwrites that.

        (I - ŵŵᵀ)/‖w‖ g + λ w is computed as g/‖w‖ + c w with c = λ - ŵᵀg/‖w‖²: two passes over the block, not four.
        """
        update, size = self._update, stop - start
        stored_rows, stored_momentum = self._weight_nD[start:stop], self._momentum_nD[start:stop]
        rows = stored_rows if self._rows is None else self._rows[:size].copy_(stored_rows)
        momentum = stored_momentum if self._momentum is None else self._momentum[:size].copy_(stored_momentum)
        inverse_m1, factor_m1 = block.inverse_norms_m1, block.along(rows, gradient_mD)
        factor_m1.mul_(inverse_m1).mul_(inverse_m1).neg_().add_(update.weight_decay)
        gradient_mD.mul_(inverse_m1).addcmul_(rows, factor_m1)
        torch.add(gradient_mD, momentum, alpha=update.momentum, out=momentum)
        rows.add_(momentum, alpha=-update.learning_rate)
        if self._momentum is not None:
            stored_momentum.copy_(momentum)
        if self._bits is not None:
            stored_rows.copy_(round_stochastically_(rows, self._bits[:size], self._generator))


def _logit_embeddings(unit_x_BD: Tensor, options: SoftmaxOptions) -> Tensor:
    """Embeddings scaled so that their product with unit rows is s / ln 2, in matmul_dtype."""
    return (unit_x_BD / (options.temperature * math.log(2))).to(options.matmul_dtype)


def _entry_bounds(labels: SmoothedLabels, block: _UnitBlock) -> Iterator[tuple[int, int]]:
    """First entry of y in each block of classes, and the one after its last: entries ascend by class."""
    stops = torch.tensor([stop for _, stop in block.bounds()], device=labels.classes.device)
    ends = torch.searchsorted(labels.classes, stops).tolist()
    return zip([0, *ends[:-1]], ends, strict=True)


def _narrow(wide: Tensor, options: SoftmaxOptions) -> Tensor:
    """A buffer like `wide` in matmul_dtype; `wide` itself if it has that dtype."""
    return wide if wide.dtype == options.matmul_dtype else torch.empty_like(wide, dtype=options.matmul_dtype)


def _cast(source: Tensor, out: Tensor) -> Tensor:
    """`source` in the dtype of `out`: itself if it has that dtype, otherwise copied into `out`."""
    return source if source.dtype == out.dtype else out.copy_(source)


def _shaped(buffer: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The beginning of a flat buffer as a tensor of that shape."""
    return buffer[: math.prod(shape)].view(shape)
