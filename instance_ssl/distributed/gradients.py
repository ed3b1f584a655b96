"""Sums the gradients of a network that every rank holds."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from instance_ssl.distributed.comm import Group


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], figures_k: Tensor, group: Group) -> Tensor:
    """Replaces each parameter's gradient by its sum over the ranks; a missing one counts as 0.

    Returns the sum of the metrics (k,), which travel in the same all-reduce. Collective.
    """
    parameters = list(parameters)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    packed = group.all_reduce_sum_(torch.cat([figures_k, *(gradient.flatten() for gradient in gradients)]))
    summed_k, *parts = packed.split([len(figures_k), *(parameter.numel() for parameter in parameters)])
    for parameter, gradient in zip(parameters, parts, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return summed_k
