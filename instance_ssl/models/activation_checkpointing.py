"""Activation checkpointing: activations inside a stage are not kept, but computed again in the backward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_stages(stages: Iterable[nn.Module], activations: Tensor, *, recompute: bool) -> Tensor:
    """One stage after another; the same mathematics with and without `recompute`.

    With it, only the input of each stage is kept for the backward pass, which runs the stage once more under the same
    autocast. Buffers, batch norm's running statistics, move in the forward pass alone. Stages draw no random numbers.
    """
    for stage in stages:
        activations = _recomputed(stage, activations) if recompute and torch.is_grad_enabled() else stage(activations)
    return activations


def _recomputed(stage: nn.Module, activations: Tensor) -> Tensor:
    return checkpoint(
        stage,
        activations,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _copied_buffers(stage)),
    )


@contextmanager
def _copied_buffers(stage: nn.Module) -> Iterator[None]:
    """Lets `stage` write to copies of its buffers.

    Not None in their place: the second run must save tensors like those of the first, one by one.
    """
    modules = list(stage.modules())
    owned = [(module, name, buffer) for module in modules for name, buffer in module.named_buffers(recurse=False)]
    for module, name, buffer in owned:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in owned:
            setattr(module, name, buffer)
