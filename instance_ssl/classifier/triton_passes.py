"""Both passes over the shard (see `softmax.py`) as fused Triton kernels for GPUs: the contract of `torch_passes`.

Not even a block of B x n exists: tiles of exp(s) stay in registers. Normalised rows exist as one chunk that fits the L2
cache, ∂J/∂w as the tile a program is working on. The only other workspace is the sums of the forward pass, (splits, B,
D) float32: two splits at B = 8192, and more for smaller batches, up to one tile of rows for every multiprocessor.

Rows and momentum may be float32 or bfloat16. Momentum is rounded to nearest, rows stochastically: a step of less than
half a unit in the last place would otherwise always be lost.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from instance_ssl.classifier import torch_passes
from instance_ssl.classifier.label_terms import entry_exp, gradient_terms
from instance_ssl.classifier.softmax import (
    RowUpdate,
    SmoothedLabels,
    SoftmaxOptions,
    SoftmaxSums,
    normalise_rows,
)

# A chunk of unit rows: a larger one would not stay in the L2 cache (50 MB on an H100, shared with all the rest).
_CHUNK_BYTES = 16 * 2**20

# The chunk's normalisation and the label entries are small beside the dense part, so not worth tuning.
_UNIT_ROWS_AT_ONCE = 32
_ENTRIES_AT_ONCE = 32

# Entries whose rows of W are gathered at once if the forward pass has not kept their exp(s).
_TERMS_AT_ONCE = 2**16

# float32 products as three TF32 products each, about float32's precision; plain float32 would miss the matrix units.
_PRECISION = "tf32x3"

# Cost of starting and ending a program of `dense_sums_kernel`, in tiles of classes: it reads and writes its sums.
_PROGRAM_OVERHEAD_TILES = 2

# Below it p - q can be smaller than what bfloat16 products lose of p ≈ 1.
_SATURATING_TEMPERATURE = 0.1


@dataclass(frozen=True)
class Tile:
    """Block shape of a kernel.

    Attributes:
        rows: rows of X at once, a power of two of at least 16.
        classes: classes at once, likewise.
        num_warps: warps of a program.
        num_stages: tiles in flight between memory and the matrix units.
    """

    rows: int
    classes: int
    num_warps: int
    num_stages: int


# Shapes for `softmax_sums` by type of the products and largest padded D; `update_rows` takes them with rows and classes
# exchanged. Chosen for sm_90: the compiler then spills no register in a dense loop (float32 at D = 256: a few), and two
# or three stages fit into shared memory. Not measured on a GPU yet.
_TILES = (
    (torch.bfloat16, 128, Tile(rows=128, classes=128, num_warps=8, num_stages=3)),
    (torch.bfloat16, 256, Tile(rows=64, classes=64, num_warps=8, num_stages=2)),
    (torch.bfloat16, 512, Tile(rows=32, classes=32, num_warps=8, num_stages=2)),
    (torch.bfloat16, 1024, Tile(rows=16, classes=32, num_warps=8, num_stages=2)),
    (torch.float32, 128, Tile(rows=32, classes=32, num_warps=8, num_stages=1)),
    (torch.float32, 256, Tile(rows=16, classes=32, num_warps=8, num_stages=1)),
)


def forward_tile(embedding_dim: int, matmul_dtype: torch.dtype) -> Tile:
    """Default shape for `softmax_sums`."""
    for dtype, largest_dim, tile in _TILES:
        if dtype == matmul_dtype and embedding_dim <= largest_dim:
            return tile
    raise ValueError(f"no Triton kernels for products in {matmul_dtype} at D = {embedding_dim}")


def update_tile(embedding_dim: int, matmul_dtype: torch.dtype) -> Tile:
    """Default shape for `update_rows`, where a program keeps classes and streams rows."""
    forward = forward_tile(embedding_dim, matmul_dtype)
    return replace(forward, rows=forward.classes, classes=forward.rows)


def available(device: torch.device, embedding_dim: int = 128, matmul_dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernels run on `device`: an NVIDIA GPU from sm_80 with Triton and a compiler, or its interpreter."""
    if importlib.util.find_spec("triton") is None:  # CPU-only builds of PyTorch come without it
        return False
    if not any(dtype == matmul_dtype and embedding_dim <= dim for dtype, dim, _ in _TILES):
        return False
    import triton

    if triton.knobs.runtime.interpret:
        return True
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        _ = triton.runtime.driver.active.utils  # compiled at its first use
    except Exception:  # no C compiler, or no headers of Python: Triton's own, RuntimeError, CalledProcessError
        return False
    return True


def softmax_sums(
    unit_x_BD: Tensor,
    weight_nD: Tensor,
    labels: SmoothedLabels,
    options: SoftmaxOptions,
    *,
    tile: Tile | None = None,
) -> SoftmaxSums:
    """First pass over the shard, see `softmax.Passes`; float32 embeddings, float32 or bfloat16 rows.

    Args:
        tile: block shape, for tests; None: `forward_tile`.
    """
    from instance_ssl.classifier import triton_kernels as programs

    num_rows, dim = unit_x_BD.shape
    tile = tile or forward_tile(dim, options.matmul_dtype)
    _check_rows(weight_nD)
    x_PD = _padded(unit_x_BD, tile.rows, options.matmul_dtype)
    row_entries, order_P = _entries_by_row(labels, num_rows)
    exp_P = unit_x_BD.new_empty(len(order_P), dtype=torch.float32)
    y_B = unit_x_BD.new_empty(num_rows)
    sparse_BD, dense_BD = unit_x_BD.new_empty(2, num_rows, x_PD.shape[1])
    with torch.cuda.device_of(weight_nD):  # Triton launches on the current device
        programs.sparse_sums_kernel[(num_rows,)](
            x_PD, weight_nD, row_entries, labels.classes[order_P], labels.values[order_P],
            y_B, exp_P, sparse_BD, dense_BD, _log2_scale(options),
            DIM=dim, PADDED_DIM=x_PD.shape[1], ENTRIES=_ENTRIES_AT_ONCE, MIXTURE=options.form == "mixture",
            PRECISION=_PRECISION,
        )  # fmt: skip
        labels = replace(labels, exp=torch.empty_like(exp_P).index_copy_(0, order_P, exp_P))
        apart_P, apart_exp_P = _strongest_entries(labels, x_PD.shape[0])
        z_SP, dense_SPD = _dense_sums(x_PD, weight_nD, apart_P, options, tile)
    z_B = z_SP.sum(dim=0)[:num_rows]
    dense_BD = (dense_BD + dense_SPD.sum(dim=0)[:num_rows])[:, :dim]
    if _keeps_apart(options):
        unit_BD, _ = normalise_rows(weight_nD[apart_P[:num_rows].clamp(min=0)].float())
        z_B = z_B + apart_exp_P[:num_rows]
        # What `sparse_sums_kernel` has put right of the products' rounding is that of this entry, too.
        rounded_BD = apart_exp_P[:num_rows, None].to(x_PD.dtype).float() * unit_BD.to(x_PD.dtype).float()
        dense_BD = dense_BD + rounded_BD
    return SoftmaxSums(z_B, y_B, dense_BD.contiguous(), sparse_BD[:, :dim].contiguous(), labels.exp)


def _dense_sums(
    x_PD: Tensor, weight_nD: Tensor, apart_P: Tensor, options: SoftmaxOptions, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Z (S, P) and A (S, P, D) of padded rows, in S parts to be summed.

    If `_keeps_apart`, the class `apart_P` (P,) of each row is not added.
    """
    from instance_ssl.classifier import triton_kernels as programs

    padded_rows, padded_dim = x_PD.shape
    num_classes, dim = weight_nD.shape
    chunk_rows = _chunk_rows(options, padded_dim, tile.classes)
    unit_w_mD = x_PD.new_empty(min(chunk_rows, _round_up(num_classes, tile.classes)), padded_dim)
    row_tiles = padded_rows // tile.rows
    splits = _splits(row_tiles, unit_w_mD.shape[0] // tile.classes, _program_slots(weight_nD.device, tile))
    z_SP = x_PD.new_zeros(splits, padded_rows, dtype=torch.float32)
    dense_SPD = z_SP.new_zeros(splits, padded_rows, padded_dim)
    for start in range(0, num_classes, chunk_rows):
        chunk_mD = weight_nD[start : start + chunk_rows]
        padded_classes = _round_up(chunk_mD.shape[0], tile.classes)
        programs.unit_rows_kernel[(_tiles(padded_classes, _UNIT_ROWS_AT_ONCE),)](
            chunk_mD, unit_w_mD, chunk_mD.shape[0], padded_classes,
            DIM=dim, PADDED_DIM=padded_dim, CLASSES=_UNIT_ROWS_AT_ONCE,
        )  # fmt: skip
        programs.dense_sums_kernel[(row_tiles, splits)](
            x_PD, unit_w_mD, z_SP, dense_SPD, apart_P - start, padded_rows, chunk_mD.shape[0],
            _tiles(padded_classes // tile.classes, splits) * tile.classes, _log2_scale(options),
            D=padded_dim, ROWS=tile.rows, CLASSES=tile.classes, PRECISION=_PRECISION,
            APART=_keeps_apart(options), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return z_SP, dense_SPD


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
    tile: Tile | None = None,
) -> None:
    """Second pass over the shard, see `softmax.Passes`; float32 embeddings, float32 or bfloat16 rows and momentum.

    The kernel never writes the gradient to memory. Replicas, which have to sum it, take the PyTorch pass.

    Args:
        tile: block shape, for tests; None: `update_tile`.
    """
    if sum_gradient_ is not None:
        arguments = unit_x_BD, z_B, y_B, labels, weight_nD, momentum_nD, options, update
        torch_passes.update_rows(*arguments, total_rows=total_rows, sum_gradient_=sum_gradient_)
        return
    from instance_ssl.classifier import triton_kernels as programs

    num_classes, dim = weight_nD.shape
    tile = tile or update_tile(dim, options.matmul_dtype)
    _check_rows(weight_nD)
    _check_rows(momentum_nD)
    x_PD = _padded(unit_x_BD, tile.rows, options.matmul_dtype)
    minus_log2_z_P = _padded_minus_log2(z_B, x_PD.shape[0])
    labels = replace(labels, exp=entry_exp(labels, weight_nD, unit_x_BD, options, _TERMS_AT_ONCE))
    term_P = gradient_terms(z_B, y_B, labels, options) / z_B[labels.rows]
    apart_P, _ = _strongest_entries(labels, x_PD.shape[0])
    num_tiles = _tiles(num_classes, tile.classes)
    edges = torch.arange(num_tiles + 1, device=weight_nD.device) * tile.classes
    tile_entries = torch.searchsorted(labels.classes, edges, out_int32=True)
    with torch.cuda.device_of(weight_nD):
        programs.update_kernel[(num_tiles,)](
            weight_nD, momentum_nD, x_PD, minus_log2_z_P, apart_P,
            labels.rows, labels.classes, term_P, tile_entries, num_classes, x_PD.shape[0],
            _log2_scale(options), 1 / (options.temperature * (total_rows or unit_x_BD.shape[0])),
            update.learning_rate, update.momentum, update.weight_decay, update.seed % 2**31,
            DIM=dim, PADDED_DIM=x_PD.shape[1], ROWS=tile.rows, CLASSES=tile.classes, ENTRIES=_ENTRIES_AT_ONCE,
            PRECISION=_PRECISION, APART=_keeps_apart(options), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def _check_rows(rows_nD: Tensor) -> None:
    """Raises ValueError for rows that the kernels cannot read: they know two dtypes and no strides."""
    if rows_nD.dtype not in (torch.float32, torch.bfloat16) or not rows_nD.is_contiguous():
        raise ValueError(f"rows and momentum must be contiguous float32 or bfloat16, not {rows_nD.dtype}")


def _padded(unit_x_BD: Tensor, row_multiple: int, dtype: torch.dtype) -> Tensor:
    """X in the type of the products, zero-padded to whole tiles and a power of two of at least 16 columns."""
    num_rows, dim = unit_x_BD.shape
    x_PD = unit_x_BD.new_zeros(_round_up(num_rows, row_multiple), max(16, 1 << (dim - 1).bit_length()), dtype=dtype)
    x_PD[:num_rows, :dim] = unit_x_BD
    return x_PD


def _log2_scale(options: SoftmaxOptions) -> float:
    """log2(e)/τ: exp(cos/τ) = exp2(cos · scale)."""
    return math.log2(math.e) / options.temperature


def _padded_minus_log2(sums_B: Tensor, padded_rows: int) -> Tensor:
    """-log2 of Z, with zeros for padding."""
    log2_P = sums_B.new_zeros(padded_rows, dtype=torch.float32)
    log2_P[: sums_B.shape[0]] = -sums_B.log2()
    return log2_P


def _keeps_apart(options: SoftmaxOptions) -> bool:
    """Whether each row's strongest entry is kept out of the dense sums (see `triton_kernels`)."""
    return options.matmul_dtype == torch.float32 or options.temperature < _SATURATING_TEMPERATURE


def _strongest_entries(labels: SmoothedLabels, padded_rows: int) -> tuple[Tensor, Tensor]:
    """Class (P,) and exp(s) (P,) of each row's entry of largest exp(s); -1 and 0 for a row without any."""
    assert labels.exp is not None
    exp_P = labels.exp.new_zeros(padded_rows).scatter_reduce_(0, labels.rows, labels.exp, "amax")
    classes = torch.where(labels.exp == exp_P[labels.rows], labels.classes, -1)
    return labels.rows.new_full((padded_rows,), -1).scatter_reduce_(0, labels.rows, classes, "amax"), exp_P


def _entries_by_row(labels: SmoothedLabels, num_rows: int) -> tuple[Tensor, Tensor]:
    """Where each row's entries begin (B + 1,), and the entries in that order (P,)."""
    rows, order_P = torch.sort(labels.rows, stable=True)
    row_entries = torch.searchsorted(rows, torch.arange(num_rows + 1, device=rows.device), out_int32=True)
    return row_entries, order_P


def _chunk_rows(options: SoftmaxOptions, padded_dim: int, tile_classes: int) -> int:
    """Classes normalised at once: as many whole tiles as fit `block_bytes`, at least one."""
    rows = min(options.block_bytes or _CHUNK_BYTES, _CHUNK_BYTES) // (padded_dim * options.matmul_dtype.itemsize)
    return max(1, rows // tile_classes) * tile_classes


def _program_slots(device: torch.device, tile: Tile) -> int:
    """Programs that run at once: eight warps of these register-hungry kernels fill a multiprocessor."""
    if device.type != "cuda":
        return 4  # the interpreter, where tests want more than one split
    return torch.cuda.get_device_properties(device).multi_processor_count * max(1, 8 // tile.num_warps)


def _splits(row_tiles: int, class_tiles: int, slots: int) -> int:
    """Splits of a chunk's classes that finish first: waves of programs x tiles of classes in each."""

    def duration(splits: int) -> int:
        return _tiles(row_tiles * splits, slots) * (_tiles(class_tiles, splits) + _PROGRAM_OVERHEAD_TILES)

    return min(range(1, min(class_tiles, slots) + 1), key=duration)


def _tiles(count: int, size: int) -> int:
    return -(-count // size)


def _round_up(count: int, multiple: int) -> int:
    return _tiles(count, multiple) * multiple
