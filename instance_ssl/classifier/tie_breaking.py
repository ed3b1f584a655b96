"""A total order of (score, id): of equal scores the lower id wins, whatever the block or the rank.

`torch.topk` may return any of several equal values. Packed into one int64, no two candidates are equal.
"""

import torch
from torch import Tensor

_ALL_ONES = 0xFFFFFFFF
_MAGNITUDE = 0x7FFFFFFF

# Below every packed score: an empty column.
LOWEST_KEY = torch.iinfo(torch.int64).min


def pack_scores(scores_qm: Tensor, first_id: int) -> Tensor:
    """int64 keys (q, m) that order by score, then by lower id.

    Args:
        scores_qm: float32; column c belongs to id first_id + c.
        first_id: ids up to 2**32 - 1.
    """
    return pack_pairs(scores_qm, torch.arange(first_id, first_id + scores_qm.shape[1], device=scores_qm.device))


def pack_pairs(scores: Tensor, ids: Tensor) -> Tensor:
    """`pack_scores` with an id for each score; shapes are broadcast."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0: equal scores, equal bits
    # Of two negative IEEE 754 numbers the one with the smaller magnitude bits is the larger: flip all but the sign.
    ordered = torch.where(bits < 0, bits ^ _MAGNITUDE, bits)
    return (ordered.long() << 32) + (_ALL_ONES - ids)


def unpack_scores(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `pack_scores`: float32 scores and int64 ids."""
    ordered = (keys >> 32).int()
    scores = torch.where(ordered < 0, ordered ^ _MAGNITUDE, ordered).view(torch.float32)
    return scores, _ALL_ONES - (keys & _ALL_ONES)
