"""Batch norm over all ranks: statistics and gradients are those of the global batch.

torch's SyncBatchNorm runs on GPUs only. MoCo's `naiveSyncBN` averages the ranks' statistics, which is exact only where
all ranks hold equally many positions. Here the counts may differ, as for the boxes of a detector's head.
"""

from typing import Any

import torch
from torch import Tensor, nn

from instance_ssl.distributed.comm import Group


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with training statistics over all ranks. Every rank calls it with at least one image.

    Args:
        like: the layer whose parameters, buffers and keys it takes over.
    """

    def __init__(self, like: nn.BatchNorm2d, group: Group) -> None:
        super().__init__(like.num_features, like.eps, like.momentum)
        self.group = group
        self.weight, self.bias = like.weight, like.bias
        self.running_mean, self.running_var = like.running_mean, like.running_var
        self.num_batches_tracked = like.num_batches_tracked
        self.training = like.training

    def forward(self, input: Tensor) -> Tensor:
        """Normalises activations (b, C, H, W)."""
        if not self.training:
            return super().forward(input)
        mean_C, var_C, count = _statistics(input.detach(), self.group)
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        # Without a momentum the running averages are the mean of all batches.
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C, weight)
        self.running_var.lerp_(var_C * (count / (count - 1).clamp_min(1)), weight)
        return _Normalise.apply(input, self.weight, self.bias, mean_C, (var_C + self.eps).rsqrt(), count, self.group)


def synchronise_batch_norm(module: nn.Module, group: Group) -> None:
    """Replaces every `nn.BatchNorm2d` below `module` in place; parameters, buffers and keys stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, SynchronisedBatchNorm2d(child, group))
        else:
            synchronise_batch_norm(child, group)


def _statistics(input: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean (C,) and biased variance (C,) over all ranks, and the number of positions, without a device sync."""
    var_C, mean_C = torch.var_mean(input.float(), dim=(0, 2, 3), correction=0)
    count = input.numel() // input.shape[1]
    own = torch.cat([mean_C, var_C, mean_C.new_tensor([count])])
    means_TC, vars_TC, counts_T1 = group.all_gather_rows(own[None]).split([len(mean_C), len(mean_C), 1], dim=1)
    shares_T1 = counts_T1 / counts_T1.sum()
    mean_C = (shares_T1 * means_TC).sum(dim=0)
    var_C = (shares_T1 * (vars_TC + (means_TC - mean_C).square())).sum(dim=0)
    return mean_C, var_C, counts_T1.sum()


class _Normalise(torch.autograd.Function):
    """(x - mean) · scale · weight + bias, where mean and scale depend on the x of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        mean_C: Tensor,
        scale_C: Tensor,
        count: Tensor,
        group: Group,
    ) -> Tensor:
        ctx.save_for_backward(input, weight_C, mean_C, scale_C, count)
        ctx.group = group
        shift_C = bias_C - mean_C * scale_C * weight_C
        return (input * _wide(scale_C * weight_C) + _wide(shift_C)).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        input, weight_C, mean_C, scale_C, count = ctx.saved_tensors
        normalised = (input - _wide(mean_C)) * _wide(scale_C)
        sums_2C = torch.stack([gradient.sum(dim=(0, 2, 3)), (gradient * normalised).sum(dim=(0, 2, 3))]).float()
        # The parameters' gradients are this rank's share, as all gradients are until they are summed over ranks.
        bias_gradient_C, weight_gradient_C = sums_2C.unbind()
        mean_2C = ctx.group.all_reduce_sum_(sums_2C.clone()) / count
        own = gradient - _wide(mean_2C[0]) - normalised * _wide(mean_2C[1])
        input_gradient = (own * _wide(scale_C * weight_C)).to(input.dtype)
        return input_gradient, weight_gradient_C, bias_gradient_C, None, None, None, None


def _wide(values_C: Tensor) -> Tensor:
    return values_C[None, :, None, None]
