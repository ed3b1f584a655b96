"""Activation checkpointing: keep the inputs of a backbone's stages, and compute what is inside them again.

The same to the bit with and without it: the backward pass runs a stage once more under the same autocast and random
numbers, and batch norm's running statistics move in the forward pass alone.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_stages(stages: Iterable[nn.Module], activations: Tensor, *, recompute: bool) -> Tensor:
    """Runs one stage after another, with activation checkpointing if `recompute`."""
    for stage in stages:
        activations = _recomputed(stage, stage, activations) if recompute else stage(activations)
    return activations


def recompute_blocks(network: nn.Module) -> int:
    """Wraps the forward pass of the network's blocks in activation checkpointing, in place; returns how many.

    Blocks are the children of each outermost `Sequential` or `ModuleList` (a ViT's `blocks`, a ConvNeXt's `stages`, a
    ResNet's `layer1` …), and have one input each or what else their network gives them. Names in the state do not
    change.
    """
    blocks = [block for block in outermost_blocks(network) if any(True for _ in block.parameters())]
    for block in blocks:
        block.forward = partial(_recomputed, block, block.forward)
    return len(blocks)


def outermost_blocks(network: nn.Module) -> list[nn.Module]:
    """The children of each outermost container of the network with at least two, in the order of their definition."""
    blocks: list[nn.Module] = []
    for child in network.children():
        is_container = isinstance(child, nn.Sequential | nn.ModuleList) and len(child) > 1
        blocks += child.children() if is_container else outermost_blocks(child)
    return blocks


def _recomputed(stage: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `forward`, which is the stage's, and keeps its arguments only where gradients are recorded."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts = partial(_contexts, stage)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(stage: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _copied_buffers(stage)


@contextmanager
def _copied_buffers(stage: nn.Module) -> Iterator[None]:
    """Lets `stage` write to copies of its buffers.

    Not None in their place: the second run must save tensors like those of the first, one by one.
    """
    owned = [(module, name, value) for module in stage.modules() for name, value in module.named_buffers(recurse=False)]
    for module, name, value in owned:
        setattr(module, name, value.clone())
    try:
        yield
    finally:
        for module, name, value in owned:
            setattr(module, name, value)
