"""Stochastic rounding, with which bfloat16 rows learn from updates far below their resolution."""

import torch
from torch import Tensor


def round_stochastically_(values: Tensor, bits: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 values to one of their two bfloat16 neighbours, in place, each with the probability of its nearness.

    A step of SGD is far below half a unit of bfloat16's last place: rounding to nearest would lose it always, this
    keeps it on average. Random low bits are added, then the low half of the float32 is cut off.

    Args:
        bits: int32 buffer of the same shape.
    """
    as_bits = values.view(torch.int32)
    as_bits.add_(bits.random_(0, 1 << 16, generator=generator)).bitwise_and_(-(1 << 16))
    return values
