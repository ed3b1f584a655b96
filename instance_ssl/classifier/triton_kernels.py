"""The kernels that `triton_passes` launches; maths and notation are those of `softmax`.

Both passes are flash attention (Dao et al. 2022, "FlashAttention", Algorithm 1) without its running maximum, which
bounded logits do not need: a tile of exp(s) lives in registers only. Forward: queries x̂, keys = values = ŵ. Update:
queries ŵ, keys = values = x̂; the gradient of a tile of classes ends in the registers of the program that owns the
tile, so it goes into momentum and rows right there.

Conventions. Tiles are written M (rows of X), C (classes), E (label entries), D (padded embedding). Operands of matrix
products come zero-padded to whole tiles and to a power of two of at least 16 columns, so the inner loops need no
masks: whatever exp(s) is for a padding row, it multiplies zeros. exp(s) is exp2(dot · log2(e)/τ), scaled in float32
after the product, where rounding has already happened. Offsets into W are 64-bit: n · D passes 2³¹ at 17 million.

Precision. Z sums exp(s) in float32, before it is rounded for the second product, and over many classes the roundings in
A = Σ exp(s) ŵ average out. They do not if one class has most of the mass, always a labelled one: there p - q is the
small difference of two large numbers. So p - q is computed outside from the same exp(s) as Y
(`label_terms.gradient_terms`), and the programs for the entries put it in the place of what the dense part has added
for them, exactly as it was rounded there. That is not enough if p - q is smaller than the rounding of a float32 sum
that contains p ≈ 1: APART keeps each row's strongest entry out of the dense part altogether, in Z, A and ∂W. bfloat16
products at a τ that keeps p away from 1 lose more elsewhere and skip the comparison.

This module needs triton; `triton_passes` imports it when a kernel is about to run.
"""

import triton
import triton.language as tl

from instance_ssl.classifier.softmax import NORM_EPSILON

_NORM_EPSILON = tl.constexpr(NORM_EPSILON)
_SHRINK = tl.constexpr(2.0**-80)

# Philox4x32 with 7 rounds passes BigCrush (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
_PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def _normalise(rows_CD: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Unit rows and inverse norms (C, 1), both 0 for a row without direction, as `softmax.normalise_rows`.

    Rows whose squares could overflow are scaled by 2⁻⁸⁰ first; the others by 1, which changes nothing.
    """
    scale_C1 = tl.where(tl.max(tl.abs(rows_CD), axis=1) > 1e15, _SHRINK, 1.0)[:, None]
    rows_CD = rows_CD * scale_C1
    norms_C1 = tl.sqrt(tl.sum(rows_CD * rows_CD, axis=1))[:, None]
    inverse_C1 = tl.where(norms_C1 > _NORM_EPSILON, 1.0 / tl.maximum(norms_C1, _NORM_EPSILON), 0.0)
    return rows_CD * inverse_C1, inverse_C1 * scale_C1


@triton.jit
def _round_stochastically(value: tl.tensor, seed: tl.tensor, index: tl.tensor) -> tl.tensor:
    """float32 → bfloat16, up or down with probabilities that make the expectation exact.

    bfloat16 is the upper half of a float32: uniform bits added to the lower half carry with just that probability.
    """
    random = tl.randint(seed, index, n_rounds=_PHILOX_ROUNDS).to(tl.uint32) & 0xFFFF
    bits = (value.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def unit_rows_kernel(
    weight_ptr: tl.tensor,  # (num_classes, DIM)
    unit_ptr: tl.tensor,  # (whole tiles, PADDED_DIM), the type of the matrix products
    num_classes: int,
    padded_classes: int,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    CLASSES: tl.constexpr,
) -> None:
    """Unit rows of a chunk of W; zeros beyond its end. One program per CLASSES rows."""
    classes_C = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    dims_D = tl.arange(0, PADDED_DIM)
    inside_CD = (classes_C[:, None] < num_classes) & (dims_D[None, :] < DIM)
    rows_CD = tl.load(weight_ptr + classes_C[:, None] * DIM + dims_D[None, :], mask=inside_CD, other=0.0)
    unit_CD, _ = _normalise(rows_CD.to(tl.float32))
    unit_ptrs_CD = unit_ptr + classes_C[:, None] * PADDED_DIM + dims_D[None, :]
    tl.store(unit_ptrs_CD, unit_CD.to(unit_ptr.dtype.element_ty), mask=classes_C[:, None] < padded_classes)


@triton.jit
def dense_sums_kernel(
    x_ptr: tl.tensor,  # (whole tiles, D)
    unit_ptr: tl.tensor,  # (whole tiles, D)
    z_ptr: tl.tensor,  # (splits, padded_rows) float32, added to
    dense_ptr: tl.tensor,  # (splits, padded_rows, D) float32, added to
    apart_ptr: tl.tensor,  # (padded_rows,) int64: the class of this chunk that is not added, for APART alone
    padded_rows: int,
    num_classes: int,
    classes_per_split: int,
    scale: float,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    PRECISION: tl.constexpr,
    APART: tl.constexpr,
) -> None:
    """Z and A of a tile of rows over one split of a chunk of classes. Grid: (tiles of rows, splits).

    A split has its own slot of the sums, so that no two programs write to one place and the result is the same every
    time. Only the last split can end in a partial tile; its padding is masked outside of the loop.
    """
    rows_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims_D = tl.arange(0, D)
    classes_C = tl.arange(0, CLASSES)
    first = tl.program_id(1) * classes_per_split
    last = tl.minimum(first + classes_per_split, num_classes)
    whole = first + tl.maximum(last - first, 0) // CLASSES * CLASSES

    x_MD = tl.load(x_ptr + rows_M[:, None] * D + dims_D[None, :])
    apart_M1 = tl.load(apart_ptr + rows_M)[:, None] if APART else rows_M[:, None]
    unit_ptrs_CD = unit_ptr + classes_C[:, None] * D + dims_D[None, :]
    z_M = tl.zeros([ROWS], tl.float32)
    dense_MD = tl.zeros([ROWS, D], tl.float32)
    for start in range(first, whole, CLASSES):
        unit_CD = tl.load(unit_ptrs_CD + start * D)
        exp_MC = tl.exp2(tl.dot(x_MD, tl.trans(unit_CD), input_precision=PRECISION) * scale)
        if APART:
            exp_MC = tl.where((start + classes_C)[None, :] == apart_M1, 0.0, exp_MC)
        z_M += tl.sum(exp_MC, axis=1)
        dense_MD = tl.dot(exp_MC.to(unit_CD.dtype), unit_CD, dense_MD, input_precision=PRECISION)
    if whole < last:
        unit_CD = tl.load(unit_ptrs_CD + whole * D)
        exp_MC = tl.exp2(tl.dot(x_MD, tl.trans(unit_CD), input_precision=PRECISION) * scale)
        exp_MC = tl.where((whole + classes_C)[None, :] < last, exp_MC, 0.0)
        if APART:
            exp_MC = tl.where((whole + classes_C)[None, :] == apart_M1, 0.0, exp_MC)
        z_M += tl.sum(exp_MC, axis=1)
        dense_MD = tl.dot(exp_MC.to(unit_CD.dtype), unit_CD, dense_MD, input_precision=PRECISION)

    slot_rows_M = tl.program_id(1).to(tl.int64) * padded_rows + rows_M
    slot_MD = dense_ptr + slot_rows_M[:, None] * D + dims_D[None, :]
    tl.store(z_ptr + slot_rows_M, tl.load(z_ptr + slot_rows_M) + z_M)
    tl.store(slot_MD, tl.load(slot_MD) + dense_MD)


@triton.jit
def sparse_sums_kernel(
    x_ptr: tl.tensor,  # (≥ rows, PADDED_DIM)
    weight_ptr: tl.tensor,  # (n, DIM)
    row_entries_ptr: tl.tensor,  # (rows + 1,) where each row's entries begin
    classes_ptr: tl.tensor,  # entries sorted by row
    values_ptr: tl.tensor,
    y_ptr: tl.tensor,  # (rows,) float32
    exp_ptr: tl.tensor,  # exp(s) of the entries, float32
    sparse_ptr: tl.tensor,  # (rows, PADDED_DIM) float32
    correction_ptr: tl.tensor,  # (rows, PADDED_DIM) float32, to be added to A
    scale: float,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ENTRIES: tl.constexpr,
    MIXTURE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Y, C and exp(s) of one row's entries, and what rounding loses of A for them. One program a row.

    Sums differ in their last bits with their order, and log Z - log Y of a row that knows its class is all last bits.
    So the cosines come from the same matrix product as in the dense part. It needs at least 16 rows: here 16 copies of
    one. Reading the rows of W is still the whole cost.
    """
    row = tl.program_id(0)
    dims_D = tl.arange(0, PADDED_DIM)
    copies_R = tl.arange(0, 16)
    x_RD = tl.load(x_ptr + row * PADDED_DIM + (copies_R * 0)[:, None] + dims_D[None, :])
    y_E = tl.zeros([ENTRIES], tl.float32)
    sparse_D = tl.zeros([PADDED_DIM], tl.float32)
    correction_D = tl.zeros([PADDED_DIM], tl.float32)
    last = tl.load(row_entries_ptr + row + 1)
    for first in range(tl.load(row_entries_ptr + row), last, ENTRIES):
        entries_E = first + tl.arange(0, ENTRIES)
        inside_E = entries_E < last
        classes_E = tl.load(classes_ptr + entries_E, mask=inside_E, other=0).to(tl.int64)
        values_E = tl.load(values_ptr + entries_E, mask=inside_E, other=0.0).to(tl.float32)
        inside_ED = inside_E[:, None] & (dims_D[None, :] < DIM)  # beyond: y = 0 and ŵ = 0, so nothing is added
        rows_ED = tl.load(weight_ptr + classes_E[:, None] * DIM + dims_D[None, :], mask=inside_ED, other=0.0)
        unit_ED, _ = _normalise(rows_ED.to(tl.float32))
        rounded_unit_ED = unit_ED.to(x_RD.dtype)
        cosine_RE = tl.dot(x_RD, tl.trans(rounded_unit_ED), input_precision=PRECISION)
        log2_E = tl.max(cosine_RE, axis=0) * scale
        exp_E = tl.exp2(log2_E)
        tl.store(exp_ptr + entries_E, exp_E, mask=inside_E)
        rounded_exp_E = exp_E.to(x_RD.dtype).to(tl.float32)
        rounded_ED = rounded_exp_E[:, None] * rounded_unit_ED.to(tl.float32)
        correction_D += tl.sum(exp_E[:, None] * unit_ED - rounded_ED, axis=0)
        weights_E = values_E * exp_E if MIXTURE else values_E
        y_E += weights_E if MIXTURE else values_E * log2_E * 0.6931471805599453
        sparse_D += tl.sum(weights_E[:, None] * unit_ED, axis=0)
    tl.store(correction_ptr + row * PADDED_DIM + dims_D, correction_D)
    tl.store(sparse_ptr + row * PADDED_DIM + dims_D, sparse_D)
    tl.store(y_ptr + row, tl.sum(y_E, axis=0))


@triton.jit
def _dense_gradient(
    unit_CD: tl.tensor,
    first_class: tl.tensor,
    x_ptr: tl.tensor,
    minus_log2_z_ptr: tl.tensor,
    apart_ptr: tl.tensor,
    padded_rows: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    APART: tl.constexpr,
) -> tl.tensor:
    """Σ_i p_ij x̂_i of a tile of classes (C, D): -log2 Z in the exponent makes exp2 give p itself.

    The multiply-add is explicit because Triton plans to stop fusing by default.
    """
    rows_M = tl.arange(0, ROWS)
    x_ptrs_MD = x_ptr + rows_M[:, None] * D + tl.arange(0, D)[None, :]
    classes_C1 = (first_class + tl.arange(0, unit_CD.shape[0]))[:, None]
    gradient_CD = tl.zeros([unit_CD.shape[0], D], tl.float32)
    for start in range(0, padded_rows, ROWS):
        x_MD = tl.load(x_ptrs_MD + start * D)
        minus_log2_z_M = tl.load(minus_log2_z_ptr + start + rows_M)
        cosine_CM = tl.dot(unit_CD, tl.trans(x_MD), input_precision=PRECISION)
        p_CM = tl.exp2(tl.fma(cosine_CM, scale, minus_log2_z_M[None, :]))
        if APART:
            p_CM = tl.where(classes_C1 == tl.load(apart_ptr + start + rows_M)[None, :], 0.0, p_CM)
        gradient_CD = tl.dot(p_CM.to(x_MD.dtype), x_MD, gradient_CD, input_precision=PRECISION)
    return gradient_CD


@triton.jit
def _add_sparse_gradient(
    gradient_CD: tl.tensor,
    unit_CD: tl.tensor,
    first_class: tl.tensor,
    x_ptr: tl.tensor,
    minus_log2_z_ptr: tl.tensor,
    apart_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    classes_ptr: tl.tensor,
    terms_ptr: tl.tensor,
    first_entry: tl.tensor,
    last_entry: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
    APART: tl.constexpr,
) -> tl.tensor:
    """Puts (p_ij - q_ij) x̂_i in the place of each entry's p_ij x̂_i, as the dense part has rounded it.

    The entries' rows of X are gathered, multiplied with all classes of the tile, and a mask keeps each entry's own
    class: a matrix product with few nonzeros is cheaper than sums over scattered rows of a register tile.
    """
    for first in range(first_entry, last_entry, ENTRIES):
        entries_E = first + tl.arange(0, ENTRIES)
        inside_E = entries_E < last_entry
        rows_E = tl.load(rows_ptr + entries_E, mask=inside_E, other=0)
        classes_E = tl.load(classes_ptr + entries_E, mask=inside_E, other=-1)
        terms_E = tl.load(terms_ptr + entries_E, mask=inside_E, other=0.0)
        x_ED = tl.load(x_ptr + rows_E[:, None] * D + tl.arange(0, D)[None, :])
        cosine_CE = tl.dot(unit_CD, tl.trans(x_ED), input_precision=PRECISION)
        p_CE = tl.exp2(tl.fma(cosine_CE, scale, tl.load(minus_log2_z_ptr + rows_E)[None, :]))
        own_CE = (first_class + tl.arange(0, unit_CD.shape[0]))[:, None] == classes_E[None, :]
        added_CE = p_CE.to(x_ED.dtype).to(tl.float32)
        if APART:
            added_CE = tl.where((classes_E == tl.load(apart_ptr + rows_E))[None, :], 0.0, added_CE)
        change_CE = tl.where(own_CE, terms_E[None, :] - added_CE, 0.0)
        high_CE = change_CE.to(x_ED.dtype)
        gradient_CD = tl.dot(high_CE, x_ED, gradient_CD, input_precision=PRECISION)
        if x_ED.dtype == tl.bfloat16:  # two halves: one bfloat16 would round it by more than p - q
            low_CE = (change_CE - high_CE.to(tl.float32)).to(x_ED.dtype)
            gradient_CD = tl.dot(low_CE, x_ED, gradient_CD, input_precision=PRECISION)
    return gradient_CD


@triton.jit
def update_kernel(
    weight_ptr: tl.tensor,  # (n, DIM) float32 or bfloat16, updated
    momentum_ptr: tl.tensor,  # (n, DIM) float32 or bfloat16, updated
    x_ptr: tl.tensor,  # (padded_rows, PADDED_DIM), the type of the matrix products
    minus_log2_z_ptr: tl.tensor,  # (padded_rows,) float32
    apart_ptr: tl.tensor,  # (padded_rows,) int64: the class whose p the dense part leaves to the entries, for APART
    rows_ptr: tl.tensor,  # entries sorted by class
    classes_ptr: tl.tensor,
    terms_ptr: tl.tensor,  # p - q of each, float32
    tile_entries_ptr: tl.tensor,  # (tiles + 1,) where each tile's entries begin
    num_classes: int,
    padded_rows: int,
    scale: float,
    gradient_scale: float,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    seed: int,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
    APART: tl.constexpr,
) -> None:
    """∂J/∂w of a tile of classes, its momentum and its SGD step. One program per CLASSES rows of W."""
    tile = tl.program_id(0)
    classes_C = tile * CLASSES + tl.arange(0, CLASSES)
    dims_D = tl.arange(0, PADDED_DIM)
    inside_CD = (classes_C[:, None] < num_classes) & (dims_D[None, :] < DIM)
    index_CD = classes_C.to(tl.int64)[:, None] * DIM + dims_D[None, :]

    rows_CD = tl.load(weight_ptr + index_CD, mask=inside_CD, other=0.0, eviction_policy="evict_last")
    unit_CD, _ = _normalise(rows_CD.to(tl.float32))
    unit_CD = unit_CD.to(x_ptr.dtype.element_ty)
    gradient_CD = _dense_gradient(
        unit_CD, tile * CLASSES, x_ptr, minus_log2_z_ptr, apart_ptr, padded_rows, scale,
        D=PADDED_DIM, ROWS=ROWS, PRECISION=PRECISION, APART=APART,
    )  # fmt: skip
    gradient_CD = _add_sparse_gradient(
        gradient_CD, unit_CD, tile * CLASSES, x_ptr, minus_log2_z_ptr, apart_ptr,
        rows_ptr, classes_ptr, terms_ptr, tl.load(tile_entries_ptr + tile), tl.load(tile_entries_ptr + tile + 1),
        scale, D=PADDED_DIM, ENTRIES=ENTRIES, PRECISION=PRECISION, APART=APART,
    )  # fmt: skip

    # Read again rather than kept: held through the loop, the float32 rows would take a quarter of all registers.
    # (The other eviction hint also keeps the compiler from merging the two loads.)
    rows_CD = tl.load(weight_ptr + index_CD, mask=inside_CD, other=0.0, eviction_policy="evict_first").to(tl.float32)
    unit_CD, inverse_C1 = _normalise(rows_CD)
    gradient_CD *= gradient_scale
    along_C1 = tl.sum(gradient_CD * unit_CD, axis=1)[:, None]
    gradient_CD = (gradient_CD - along_C1 * unit_CD) * inverse_C1 + weight_decay * rows_CD
    buffer_CD = tl.load(momentum_ptr + index_CD, mask=inside_CD, other=0.0).to(tl.float32)
    buffer_CD = momentum * buffer_CD + gradient_CD
    tl.store(momentum_ptr + index_CD, buffer_CD.to(momentum_ptr.dtype.element_ty), mask=inside_CD)
    rows_CD -= learning_rate * buffer_CD
    if weight_ptr.dtype.element_ty == tl.bfloat16:
        rows_CD = _round_stochastically(rows_CD, seed, index_CD)
    tl.store(weight_ptr + index_CD, rows_CD, mask=inside_CD)
