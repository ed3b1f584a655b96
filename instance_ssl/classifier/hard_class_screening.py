"""Screening: finds the pairs of classes that can be among the K most similar from scores of low precision.

A score is the product of two unit rows rounded to `dtype`. It is compared as the integer with the same bits: positive
IEEE 754 numbers keep their order, negative ones are below them, and a CPU compares integers several times faster. A
cutoff that is not positive therefore lets every score pass.

Error bound. Let ã be the unit row a rounded to `dtype`, ρ(a) = ‖a - ã‖ its rounding error, measured row by row, and
x = Σ ã_k b̃_k the product as it is summed in float32. Then

    |a·b - x| ≤ ‖a - ã‖ ‖b‖ + ‖ã‖ ‖b - b̃‖ + γ ‖ã‖ ‖b̃‖ ≤ (1 + 2⁻⁷)(ρ(a) + ρ(b)) + D 2⁻²²  =: δ(a, b)

by the Cauchy-Schwarz inequality: unit rows have ‖a‖ ≤ 1 + 2⁻²⁰ and ‖ã‖ ≤ 1 + 2⁻⁷, and float32 sums of D products
err by γ ≤ D 2⁻²³ of Σ |ã_k b̃_k|, in any order of summation (Higham, Accuracy and Stability of Numerical Algorithms,
eq. 3.4, with a factor 2 to spare). What is stored is r(x), x rounded to `dtype`. Rounding is monotone, so

    a·b ≥ e  implies  r(x) ≥ r(e - δ)                 an exact score e becomes the cutoff e - δ
    r(x) ≥ t > 0  implies  a·b ≥ t / (1 + u) - δ      a screened score t becomes the exact score t / (1 + u) - δ

with u the unit roundoff of `dtype` (2⁻⁸ for bfloat16, which has 8 significant bits; 0 for float32). No class among the
K most similar is screened out, whatever the rows; unfavourable rows only let more pass.

If PyTorch multiplies float32 in lower precision (TF32, bfloat16), each factor errs by at most 2⁻⁸ more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Scores that are first compared by their maximum. Longer groups leave more members to check.
GROUP = 16

# Shares of a tile beyond which all of it is computed exactly, which bounds memory and is then faster.
MOST_GROUPS = 1 / 4
MOST_PAIRS = 1 / 32


@dataclass(frozen=True)
class Screen:
    """Precision of the screening and its error bounds.

    Attributes:
        dtype: bfloat16 or float32.
    """

    dtype: torch.dtype

    @property
    def bits_dtype(self) -> torch.dtype:
        """The integer type of a score's size."""
        return torch.int16 if self.dtype == torch.bfloat16 else torch.int32

    def low_rows(self, unit_mD: Tensor, num_rows: int) -> Tensor:
        """(num_rows, D) rows in `dtype`, padded with zeros after the first m."""
        low = torch.zeros(num_rows, unit_mD.shape[1], dtype=self.dtype, device=unit_mD.device)
        low[: unit_mD.shape[0]] = unit_mD
        return low

    def rounding_errors(self, unit_mD: Tensor) -> Tensor:
        """ρ of every row, (m,), plus what PyTorch's float32 products may add."""
        errors = torch.linalg.vector_norm(unit_mD - unit_mD.to(self.dtype).float(), dim=1)
        reduced = self.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        return errors + (2.0**-8 if reduced else 0.0)

    def margins(self, errors_m: Tensor, largest_error: Tensor, embedding_dim: int) -> Tensor:
        """δ of every row against any other, (m,)."""
        return (errors_m + largest_error) * (1 + 2.0**-7) + embedding_dim * 2.0**-22

    def exact_bounds(self, bits_m: Tensor, margins_m: Tensor) -> Tensor:
        """Exact scores (m,) reached by every pair screened at `bits_m` or above; -inf if unknown."""
        screened_m = bits_m.view(self.dtype).float()
        unit_roundoff = 2.0**-8 if self.dtype == torch.bfloat16 else 0.0
        return torch.where(bits_m > 0, screened_m / (1 + unit_roundoff) - margins_m, -torch.inf)

    def cutoff_bits(self, bounds_m: Tensor, margins_m: Tensor, num_rows: int) -> Tensor:
        """(num_rows,) cutoffs: lower scores cannot reach the exact `bounds_m`. Padding rows let nothing pass."""
        cutoffs_m = (bounds_m - margins_m).to(self.dtype)
        limits = torch.iinfo(self.bits_dtype)
        bits = torch.full((num_rows,), limits.max, dtype=self.bits_dtype, device=bounds_m.device)
        bits[: len(bounds_m)] = torch.where(cutoffs_m > 0, cutoffs_m.view(self.bits_dtype), limits.min)
        return bits


def group_maxima(bits_qm: Tensor, num_groups: int) -> Tensor:
    """(q, num_groups) maxima; column c belongs to group c mod num_groups, as neighbours in memory reduce in step."""
    return bits_qm.unflatten(1, (-1, num_groups)).amax(dim=1)


def kth_largest(maxima_qg: Tensor, k: int) -> Tensor:
    """(q,) bits that at least k different members of each row's groups reach."""
    return maxima_qg.topk(k, dim=1, sorted=False).values.amin(dim=1)


def passing_pairs(bits_qm: Tensor, cutoffs_q: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows and columns (P,), ascending by row, of the scores at or above their row's cutoff.

    None if there are too many to be worth picking out.
    """
    num_groups = bits_qm.shape[1] // GROUP
    hit = group_maxima(bits_qm, num_groups) >= cutoffs_q[:, None]
    rows, groups = torch.nonzero(hit, as_tuple=True)
    if len(rows) > MOST_GROUPS * hit.numel():
        return None
    members = bits_qm.unflatten(1, (GROUP, num_groups))[rows, :, groups]
    hits, places = torch.nonzero(members >= cutoffs_q[rows, None], as_tuple=True)
    return None if len(hits) > MOST_PAIRS * bits_qm.numel() else (rows[hits], groups[hits] + places * num_groups)


def passing_pairs_transposed(bits_mq: Tensor, cutoffs_q: Tensor) -> tuple[Tensor, Tensor] | None:
    """`passing_pairs` of the transpose, for scores whose columns are the queries, without a copy."""
    num_groups = bits_mq.shape[0] // GROUP
    grouped = bits_mq.unflatten(0, (GROUP, num_groups))
    hit = (grouped.amax(dim=0) >= cutoffs_q).T.contiguous()
    rows, groups = torch.nonzero(hit, as_tuple=True)
    if len(rows) > MOST_GROUPS * hit.numel():
        return None
    members = grouped[:, groups, rows].T
    hits, places = torch.nonzero(members >= cutoffs_q[rows, None], as_tuple=True)
    return None if len(hits) > MOST_PAIRS * bits_mq.numel() else (rows[hits], groups[hits] + places * num_groups)
