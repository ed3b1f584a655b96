"""The contrastive prior: classifier weights as features of a fixed random network (paper, "A Contrastive Prior").

All weights stay as they are; only batch-norm statistics move. Modes, as in Figure 4:

- `running` (the paper's): every batch-norm layer first updates its running mean and variance with the batch, then
  normalises with them, so features "subtract a running average of other instance features".
- `batch`: normalises with the batch's own statistics, plain train mode.
- `frozen`: the statistics of a fresh network, mean 0 and variance 1, never move.
- `gaussian`: no features at all; w ~ N(0, 0.01²) as in PIC (Cao et al. 2020).

Where no batch norm moves (a network has none, or has given weights, whose statistics stay), the bias of the last layer
does in its place: it follows the mean of the embeddings, which so subtract a running average of other instances, too.

Statistics are those of the global batch, summed over the ranks, and batches are the same images in the same order
whatever the number of ranks: so is the result, to rounding.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.config.choices import InitializationMode
from instance_ssl.distributed.comm import Group

GAUSSIAN_STD = 0.01
_MOMENTUM = 0.1  # torch's of a batch norm
_GAUSSIAN_ROWS = 4096


class Rows(Protocol):
    """Receives embeddings by instance id, like a `ClassifierShard`."""

    def assign(self, x_BD: Tensor, instance_id_B: Tensor) -> None:
        """Keeps those of (B, D) that are its own."""


class OwnRows:
    """Rows start … stop - 1 of a table sharded over the ranks, float32; rows never assigned are 0."""

    def __init__(self, start: int, stop: int, width: int, device: torch.device) -> None:
        self.start, self.stop = start, stop
        self.rows_nD = torch.zeros(stop - start, width, device=device)

    def assign(self, x_BD: Tensor, instance_id_B: Tensor) -> None:
        """Keeps those of (B, D) that are its own."""
        own_B = (instance_id_B >= self.start) & (instance_id_B < self.stop)
        self.rows_nD[instance_id_B[own_B] - self.start] = x_BD[own_B].float()


class Moving(NamedTuple):
    """What moves during the pass.

    Attributes:
        kept: part of the network whose batch norms keep their statistics; None: all batch norms move.
        centred: the last layer, where its bias moves: it has one.
    """

    kept: nn.Module | None = None
    centred: nn.Linear | None = None


ALL_MOVES = Moving()


def moving_parts(encoder: nn.Module, kept: nn.Module | None = None) -> Moving:
    """What moves, given the part of the encoder that has given weights: a last layer only where no batch norm does."""
    modules, still = list(encoder.modules()), set() if kept is None else set(kept.modules())
    last = modules[-1]
    moves = any(isinstance(module, _BatchNorm) and module not in still for module in modules)
    return Moving(kept, None if moves or not isinstance(last, nn.Linear) or last.bias is None else last)


@contextmanager
def batch_norm_statistics(
    network: nn.Module, mode: InitializationMode, group: Group, batches_done: int = 0, moving: Moving = ALL_MOVES
) -> Iterator[None]:
    """Runs `network` in eval mode and updates its batch-norm statistics before every layer as `mode` says.

    A running average needs a first value: as in Adam's bias correction, update t weighs the batch by
    max(momentum, 1/t), so that early images are normalised by real statistics and not by the initial 0 and 1. A resumed
    pass counts on from `batches_done`.
    """
    was_training = network.training
    network.eval()
    kept = set() if moving.kept is None else set(moving.kept.modules())
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm) and module not in kept]
    hooks = [layer.register_forward_pre_hook(_statistics_hook(mode, group, batches_done)) for layer in layers]
    if moving.centred is not None:
        hooks.append(moving.centred.register_forward_hook(_centring_hook(mode, group, batches_done)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        network.train(was_training)


def _statistics_hook(
    mode: InitializationMode, group: Group, updates: int
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:

    def update(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal updates
        updates += 1
        if mode == "frozen":
            return
        assert isinstance(layer, _BatchNorm)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, variance = _global_statistics(inputs[0], group)
        weight = _weight(mode, updates, _MOMENTUM if layer.momentum is None else layer.momentum)
        layer.running_mean.lerp_(mean, weight)
        layer.running_var.lerp_(variance, weight)

    return update


def _centring_hook(
    mode: InitializationMode, group: Group, updates: int
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:

    def centre(layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor | None:
        nonlocal updates
        updates += 1
        if mode == "frozen":
            return None
        assert isinstance(layer, nn.Linear)
        shift = _global_statistics(outputs, group)[0] * _weight(mode, updates, _MOMENTUM)
        layer.bias.sub_(shift)
        return outputs - shift.to(outputs.dtype)

    return centre


def _weight(mode: InitializationMode, updates: int, momentum: float) -> float:
    return 1.0 if mode == "batch" else max(momentum, 1 / updates)


def _global_statistics(inputs: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance per channel over the batch of all ranks; a rank's batch may be empty."""
    values = inputs.detach().float()
    count = values.numel() // values.shape[1]
    sums = torch.zeros(3, values.shape[1], dtype=torch.float64, device=values.device)
    if count:
        variance, mean = torch.var_mean(values, dim=[0, *range(2, values.dim())], correction=0)
        mean, variance = mean.double(), variance.double()
        sums = torch.stack([torch.full_like(mean, count), count * mean, count * (variance + mean.square())])
    counts, total, squares = group.all_reduce_sum_(sums)
    mean = total / counts
    return mean.float(), (squares / counts - mean.square()).clamp_(min=0).float()


@torch.no_grad()
def initialize_from_features(
    shard: Rows,
    encoder: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    mode: InitializationMode,
    world: Group,
    *,
    batches_done: int = 0,
    moving: Moving = ALL_MOVES,
    on_batch: Callable[[int], None] | None = None,
) -> None:
    """w_i ← x_i: row i becomes the embedding of image i.

    Args:
        shard: takes the rows.
        encoder: images (b, 3, S, S) → embeddings (b, D); its batch-norm statistics end as the pass left them.
        batches: this rank's part of every global batch, (images, instance ids), equally many batches on all ranks
            and every image once over all of them; a part may be empty, and so may a whole batch: it changes nothing.
        batches_done: how many an earlier part of the pass has done, for the weight of the next statistics.
        moving: what moves.
        on_batch: called with the number of images of each global batch.
    """
    with batch_norm_statistics(encoder, mode, world, batches_done, moving):
        for images, instance_id_b in batches:
            counts = world.row_counts(len(instance_id_b))
            if sum(counts):
                x_bD = encoder(images.to(world.device, non_blocking=True))
                x_BD = world.all_gather_rows(x_bD, counts)
                shard.assign(x_BD, world.all_gather_rows(instance_id_b.to(world.device), counts))
            if on_batch is not None:
                on_batch(sum(counts))


def mean_row_norm(shard: ClassifierShard) -> float:
    """Mean norm of the rows that are not 0, the same on all ranks. Collective."""
    norms = torch.linalg.vector_norm(shard.weight, dim=1, dtype=torch.float64)
    total, count = shard.group.all_reduce_sum_(torch.stack([norms.sum(), (norms > 0).sum()]))
    return (total / count.clamp(min=1)).item()


@torch.no_grad()
def fill_unread_rows(shard: ClassifierShard, ids: Tensor, seed: int) -> None:
    """Gives those of these rows that are 0 a random direction and the mean norm of the others. Collective.

    A row of 0 has no gradient and would stay 0 for good.

    Args:
        ids: (k,) int64 on the CPU, of the images that could not be read; equal on all ranks.
    """
    if len(ids) == 0:
        return
    norm = mean_row_norm(shard)
    for index in ids[(ids >= shard.start) & (ids < shard.stop)].tolist():
        row = shard.weight[index - shard.start]
        if not row.any():
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            direction = torch.nn.functional.normalize(torch.randn(len(row), generator=generator), dim=0)
            row.copy_(norm * direction)


@torch.no_grad()
def initialize_gaussian(shard: ClassifierShard, seed: int) -> None:
    """w ~ N(0, 0.01²), drawn in fixed runs of rows, so that row i does not depend on the number of ranks."""
    for first in range(shard.start - shard.start % _GAUSSIAN_ROWS, shard.stop, _GAUSSIAN_ROWS):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        values = torch.randn(_GAUSSIAN_ROWS, shard.weight.shape[1], generator=generator) * GAUSSIAN_STD
        start, stop = max(first, shard.start), min(first + _GAUSSIAN_ROWS, shard.stop)
        shard.weight[start - shard.start : stop - shard.start] = values[start - first : stop - first].to(shard.weight)
