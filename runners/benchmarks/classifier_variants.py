"""One step of the classifier (forward, backward, SGD) on synthetic features, in every layout to compare.

Every variant does what training does: loss, ∂J/∂x of the local rows, and SGD of the weights with momentum and weight
decay. The dense ones are plain PyTorch with autograd and torch.optim.SGD.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from instance_ssl.classifier.kernel_selection import choose_block_bytes, choose_kernels
from instance_ssl.classifier.matmul_rates import auto_matmul_dtype
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError

TEMPERATURE, SMOOTHING, MOMENTUM, DECAY, RATE = 0.15, 0.2, 0.9, 1e-4, 0.1
_WEIGHT_ROWS = 2048


@dataclass(frozen=True)
class Problem:
    """Synthetic features and labels, the same on every rank.

    Attributes:
        num_classes: N.
        x_BD: (B, D) embeddings of the global batch, float32.
        labels_B: (B,) instance ids.
        hard_NK: (N, K) table of hardest classes, int32. Rows without a label in the batch are never touched, so they
            take no memory.
    """

    num_classes: int
    x_BD: Tensor
    labels_B: Tensor
    hard_NK: Tensor

    @staticmethod
    def draw(
        num_classes: int, num_rows: int, embedding_dim: int, num_hard_classes: int, device: torch.device
    ) -> "Problem":
        """Draws Gaussian embeddings and random labels, with hard classes at even distances from each label."""
        generator = torch.Generator().manual_seed(num_classes + num_rows)
        x_BD = torch.randn(num_rows, embedding_dim, generator=generator)
        labels_B = torch.randint(num_classes, (num_rows,), generator=generator)
        stride = (num_classes - 1) // (num_hard_classes + 1)  # so distinct, and never the label itself
        hard_BK = (labels_B[:, None] + stride * torch.arange(1, num_hard_classes + 1)) % num_classes
        hard_NK = torch.zeros(num_classes, num_hard_classes, dtype=torch.int32, device=device)
        hard_NK[labels_B.to(device)] = hard_BK.to(device, torch.int32)
        return Problem(num_classes, x_BD.to(device), labels_B.to(device), hard_NK)

    def rows_of(self, group: Group) -> slice:
        """Rows of the batch that belong to this rank; equally many on each."""
        count = len(self.labels_B) // group.size
        return slice(group.rank * count, (group.rank + 1) * count)

    def weight(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of W, (stop - start, D); the same on every rank."""
        weight = torch.empty(stop - start, self.x_BD.shape[1], device=self.x_BD.device)
        self.fill(weight, start)
        return weight

    def fill(self, weight: Tensor, start: int) -> None:
        """Fills `weight` (n, D) with the rows of W from `start` on, without a second copy."""
        stop = start + len(weight)
        for first in range(start - start % _WEIGHT_ROWS, stop, _WEIGHT_ROWS):
            generator = torch.Generator(weight.device).manual_seed(first)
            rows = torch.randn(_WEIGHT_ROWS, weight.shape[1], generator=generator, device=weight.device)
            low, high = max(first, start), min(first + _WEIGHT_ROWS, stop)
            weight[low - start : high - start] = rows[low - first : high - first]


@dataclass(frozen=True)
class Running:
    """A variant ready to run.

    Attributes:
        step: takes a step and returns the loss and ∂J/∂x of the local rows.
        weight: local rows of W, (n, D).
        momentum: returns their momentum, after the first step.
        groups: groups whose `sent_bytes` count the classifier's traffic.
    """

    step: Callable[[], tuple[Tensor, Tensor]]
    weight: Tensor
    momentum: Callable[[], Tensor]
    groups: tuple[Group, ...]


Builder = Callable[[Problem, Group], Running]


def streamed(
    wanted_dtype: torch.dtype | Literal["auto"],
    *,
    group_size: int | None = None,
    kernels: Literal["auto", "torch", "triton"] = "auto",
    row_dtype: torch.dtype = torch.float32,
    momentum_dtype: torch.dtype = torch.float32,
    block_mib: int | None = None,
) -> Builder:
    """Builds this project's classifier.

    Args:
        wanted_dtype: of the matrix products; `auto`: what `matmul_dtype: auto` takes under bfloat16 autocast.
        group_size: ranks that share a copy of W; None: all.
    """

    def build(problem: Problem, world: Group) -> Running:
        matmul_dtype = auto_matmul_dtype(world)[0] if wanted_dtype == "auto" else wanted_dtype
        group, replicas = (world, None) if group_size is None else comm.split(world, group_size)
        block_bytes, chosen = (
            choose_block_bytes(block_mib and block_mib * 2**20, world.device),
            choose_kernels(kernels, world.device, problem.x_BD.shape[1], matmul_dtype),
        )
        options = SoftmaxOptions(TEMPERATURE, "mixture", matmul_dtype, block_bytes, chosen)
        shard = ClassifierShard(
            problem.num_classes,
            problem.x_BD.shape[1],
            group,
            options,
            replicas=replicas,
            smoothing_factor=SMOOTHING,
            momentum=MOMENTUM,
            weight_decay=DECAY,
            row_dtype=row_dtype,
            momentum_dtype=momentum_dtype,
        )
        problem.fill(shard.weight, shard.start)
        rows = problem.rows_of(world)
        x_bD, labels_b, total_rows = problem.x_BD[rows], problem.labels_B[rows], len(problem.labels_B)
        shard.hard_classes = problem.hard_NK[shard.start : shard.stop]

        def step() -> tuple[Tensor, Tensor]:
            output = shard.forward(x_bD, labels_b, total_rows=total_rows)
            shard.step(RATE)
            return output.loss, output.feature_gradient_bD

        groups = (group,) if replicas is None else (group, replicas)
        return Running(step, shard.weight, lambda: shard.momentum_buffer, groups)

    return build


def dense(*, sharded: bool = False, autocast: bool = False, compiled: bool = False, fused_sgd: bool = False) -> Builder:
    """Builds plain PyTorch: all logits in memory, autograd, torch.optim.SGD.

    Args:
        sharded: W in shards and gathered features, the paper's hybrid parallelism; otherwise a copy of W on each rank
            with an all-reduced gradient, as in DistributedDataParallel.
        autocast: computes the product in bfloat16.
        compiled: compiles forward and backward with torch.compile.
        fused_sgd: uses torch's fused SGD.
    """

    def build(problem: Problem, world: Group) -> Running:
        partition = Partition(problem.num_classes, world.size if sharded else 1)
        start, stop = partition.bounds(world.rank if sharded else 0)
        weight = problem.weight(start, stop).requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, fused=fused_sgd or None)
        own, total_rows = problem.rows_of(world), len(problem.labels_B)
        rows = slice(None) if sharded else own
        entries = _Entries(problem, rows, start, stop)
        loss_of = torch.compile(_dense_loss, dynamic=False) if compiled else _dense_loss

        def step() -> tuple[Tensor, Tensor]:
            optimizer.zero_grad()
            x = world.all_gather_rows(problem.x_BD[own]) if sharded else problem.x_BD[own].clone()
            x.requires_grad_()
            loss = loss_of(x, weight, entries, autocast, world if sharded and world.size > 1 else None) / total_rows
            loss.backward()
            assert x.grad is not None
            assert weight.grad is not None
            value = loss.detach()
            gradient = world.reduce_scatter_rows(x.grad) if sharded else x.grad
            if not sharded and world.size > 1:
                world.all_reduce_sum_(weight.grad)
                value = world.all_reduce_sum_(value.clone())
            optimizer.step()
            return value, gradient

        return Running(step, weight.detach(), lambda: optimizer.state[weight]["momentum_buffer"], (world,))

    return build


class _Entries:
    """Nonzero entries of y (Eq. 2) among classes [start, stop): (rows, K+1) columns and log y."""

    def __init__(self, problem: Problem, rows: slice, start: int, stop: int) -> None:
        hard_BK = problem.hard_NK[problem.labels_B[rows]]
        columns = torch.cat([problem.labels_B[rows, None], hard_BK.long()], dim=1) - start
        log_y = torch.full(columns.shape, math.log(SMOOTHING / hard_BK.shape[1]), device=columns.device)
        log_y[:, 0] = math.log(1 - SMOOTHING)
        outside = (columns < 0) | (columns >= stop - start)
        self.columns = columns.masked_fill(outside, 0)
        self.log_y = log_y.masked_fill(outside, -torch.inf)


def _dense_loss(x: Tensor, weight: Tensor, entries: _Entries, autocast: bool, group: Group | None) -> Tensor:
    """Σ_i J_i of Eq. 3 with all logits in memory; an all-reduce completes Z and Y over shards."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        cosine = F.linear(F.normalize(x, dim=1), F.normalize(weight, dim=1))
    logits = cosine.float() / TEMPERATURE
    labelled = logits.gather(1, entries.columns) + entries.log_y
    if group is None:
        return (torch.logsumexp(logits, dim=1) - torch.logsumexp(labelled, dim=1)).sum()
    z, y = logits.exp().sum(dim=1), labelled.exp().sum(dim=1)
    sums = torch.stack([z, y])
    z_all, y_all = sums + (group.all_reduce_sum_(sums.detach().clone()) - sums.detach())
    return (z_all.log() - y_all.log()).sum()


def torch_linear_cross_entropy(problem: Problem, world: Group) -> Running:
    """Builds `torch.nn.functional.linear_cross_entropy` on the whole batch, made Eq. 3 by a sparse correction.

    J = (its loss, log Z - s of the target) + s of the target - log Y. One rank only.

    Raises:
        UserError: torch is older than 2.13, or there are several ranks.
    """
    options_class = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options_class is None or world.size > 1:
        raise UserError("torch-linear-cross-entropy needs torch 2.13 or newer, and one rank")
    weight = problem.weight(0, problem.num_classes).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    entries = _Entries(problem, slice(None), 0, problem.num_classes)
    num_rows = len(problem.labels_B)
    options = options_class(batch_chunk_size=num_rows, chunking_method=None)

    def step() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        x = problem.x_BD.clone().requires_grad_()
        unit_x, unit_w = F.normalize(x, dim=1) / TEMPERATURE, F.normalize(weight, dim=1)
        loss = F.linear_cross_entropy(unit_x, unit_w, problem.labels_B, options=options)
        labelled = torch.einsum("bd,bkd->bk", unit_x, unit_w[entries.columns])
        loss = loss + (labelled[:, 0] - torch.logsumexp(labelled + entries.log_y, dim=1)).mean()
        loss.backward()
        optimizer.step()
        assert x.grad is not None
        return loss.detach(), x.grad

    return Running(step, weight.detach(), lambda: optimizer.state[weight]["momentum_buffer"], (world,))


VARIANTS: dict[str, Builder] = {
    "replicated-dense": dense(),
    "replicated-dense-bfloat16": dense(autocast=True),
    "replicated-dense-compiled": dense(autocast=True, compiled=True),
    "sharded-dense": dense(sharded=True),
    "torch-linear-cross-entropy": torch_linear_cross_entropy,
    "streamed": streamed(torch.float32),
    "streamed-bfloat16": streamed(torch.bfloat16),
    "streamed-auto": streamed("auto"),
    "streamed-bfloat16-torch": streamed(torch.bfloat16, kernels="torch"),
    "streamed-bfloat16-momentum": streamed(torch.bfloat16, momentum_dtype=torch.bfloat16),
    "streamed-bfloat16-rows": streamed(torch.bfloat16, momentum_dtype=torch.bfloat16, row_dtype=torch.bfloat16),
    "streamed-bfloat16-1-mib": streamed(torch.bfloat16, block_mib=1),
    "streamed-bfloat16-64-mib": streamed(torch.bfloat16, block_mib=64),
    "replicated-streamed": streamed(torch.float32, group_size=1),
}


def gradient_error(builder: Builder, world: Group) -> dict[str, float]:
    """Relative errors of loss, ∂J/∂x and ∂J/∂w against dense float64, at a small uneven size.

    The gradient of the weights is the momentum after the first step.
    """
    problem = Problem.draw(2003, 24 * world.size, 64, 20, world.device)
    running = builder(problem, world)
    start = Partition(problem.num_classes, world.size).bounds(world.rank)[0] if len(running.weight) < 2003 else 0
    before = running.weight.clone()
    loss, gradient_x = running.step()
    truth_w = problem.weight(0, problem.num_classes).double().requires_grad_()
    truth_x = problem.x_BD.double().requires_grad_()
    entries = _Entries(problem, slice(None), 0, problem.num_classes)
    logits = F.normalize(truth_x, dim=1) @ F.normalize(truth_w, dim=1).T / TEMPERATURE
    labelled = logits.gather(1, entries.columns) + entries.log_y
    truth = (torch.logsumexp(logits, dim=1) - torch.logsumexp(labelled, dim=1)).mean()
    truth.backward()
    gradient_w = running.momentum() - DECAY * before
    own_rows = slice(start, start + len(before))
    assert truth_x.grad is not None
    assert truth_w.grad is not None
    pairs = {
        "loss": (loss, truth.detach()),
        "dx": (gradient_x, truth_x.grad[problem.rows_of(world)]),
        "dw": (gradient_w, truth_w.grad[own_rows]),
    }
    return {name: ((ours - true).norm() / true.norm()).item() for name, (ours, true) in pairs.items()}
