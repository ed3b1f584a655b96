"""What one rank of the classifier holds, sends and computes: measured by running it, without a GPU or other ranks.

A `ClassifierShard` takes one optimizer step of the planned batch. Its collectives only count their bytes, and the large
matrix products, whose results decide no allocation, are skipped. One run has a full block of classes and one a single
class; the number of classes changes nothing else but what is proportional to it. The search for hard classes runs on a
few hundred classes, and its tile has the budget that it states itself. `tests/distributed/test_classifier_memory.py`
compares all of it with real allocations.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from instance_ssl.classifier.hard_classes import (
    ROWS_AT_ONCE,
    HardTable,
    fast_screen_dtype,
    find_hard_classes,
    search_bytes,
    tile_bytes,
    tile_edge,
)
from instance_ssl.classifier.matmul_rates import float32_precision, onednn_multiplies_bfloat16
from instance_ssl.classifier.sampling import ClassSampler
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.classifier.torch_passes import block_classes, sums_block_bytes, update_block_bytes
from instance_ssl.distributed.comm import Group, Transfer, ring_bytes
from instance_ssl.distributed.partition import Partition
from instance_ssl.training.live_bytes import LiveBytes

_CPU = torch.device("cpu")
_LARGE = 2**24  # numbers in a copy that is skipped
_MOST_CLASSES = 2**16  # in a run of several blocks


@dataclass(frozen=True)
class ClassifierSize:
    """The numbers that decide memory and traffic of `ClassifierShard`.

    Attributes:
        num_instances: N.
        embedding_dim: D.
        group_size: G, ranks that hold W once between them.
        num_replicas: copies of W in the world.
        rows_per_rank: b, views of one micro-batch on one rank.
        accumulation_steps: micro-batches of an optimizer step.
        num_hard_classes: K; 0 without smoothing.
        options: of the two passes; the PyTorch passes are measured, whatever `kernels` says.
        row_dtype: of W.
        momentum_dtype: of its momentum.
        num_sampled_classes: M of Table 3; None: every step's softmax runs over all N.
        device: decides the tiles and the precision of the search, and the workspace of products.
    """

    num_instances: int
    embedding_dim: int
    group_size: int
    num_replicas: int
    rows_per_rank: int
    accumulation_steps: int
    num_hard_classes: int
    options: SoftmaxOptions
    row_dtype: torch.dtype = torch.float32
    momentum_dtype: torch.dtype = torch.float32
    num_sampled_classes: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))

    @property
    def local_classes(self) -> int:
        """n of rank 0, which has the most."""
        return Partition(self.num_instances, self.group_size).count(0)

    @property
    def stepped_classes(self) -> int:
        """Local classes that a step's softmax runs over; the mean where they are sampled."""
        if self.num_sampled_classes is None:
            return self.local_classes
        return Partition(min(self.num_sampled_classes, self.num_instances), self.group_size).count(0)

    @property
    def gathered_rows(self) -> int:
        """B, rows of a micro-batch over the group."""
        return self.rows_per_rank * self.group_size

    @property
    def block_classes(self) -> int:
        """Classes in a block of the first pass."""
        return block_classes(self.options, self.gathered_rows, self.embedding_dim)

    @property
    def update_block_classes(self) -> int:
        """Classes in a block of the second pass, over the rows of all micro-batches."""
        return block_classes(self.options, self.gathered_rows * self.accumulation_steps, self.embedding_dim)


@dataclass(frozen=True)
class ClassifierMemory:
    """Bytes of one rank: the first four all the time, one of the others at a time.

    Attributes:
        weight: local rows of W.
        momentum: their momentum.
        hard_classes: local rows of the table of hardest classes, int32.
        clock: how many steps each local row has seen, where classes are sampled.
        sums_block: block buffers of the first pass, part of `first_pass`.
        update_block: block buffers of the second pass, part of `update`.
        first_pass: peak of the last micro-batch's `forward`.
        pending: features and labels that wait for the update while the encoder's backward pass runs.
        update: peak of `step`.
        refresh: peak of the search for hard classes, including the table that it makes.
    """

    weight: int
    momentum: int
    hard_classes: int
    clock: int
    sums_block: int
    update_block: int
    first_pass: int
    pending: int
    update: int
    refresh: int

    @property
    def resident(self) -> int:
        """What is held all the time."""
        return self.weight + self.momentum + self.hard_classes + self.clock


def classifier_memory(size: ClassifierSize) -> ClassifierMemory:
    """Memory of rank 0's shard."""
    shape, n = replace(size, num_instances=0), size.stepped_classes
    one, full = _step(shape, 1), _step(shape, size.block_classes * _blocks_to_run(size))
    most, most_updated = size.block_classes, size.update_block_classes
    sums_block, update_block = _block_bytes(size, min(n, most), min(n, most_updated))
    full_sums_block, full_update_block = _block_bytes(size, most, most_updated)
    hidden, hidden_in_update = _hidden_bytes(size)
    first_pass = full.first_pass + hidden - full_sums_block + sums_block
    update = full.update + hidden_in_update - full_update_block + update_block
    sampled = full.sampled_row * n
    local = {name: count * size.local_classes for name, count in one.row_bytes.items()}
    return ClassifierMemory(
        weight=local["weight"],
        momentum=local["momentum"],
        hard_classes=local.get("hard_classes", 0),
        clock=local.get("steps_seen", 0),
        sums_block=sums_block,
        update_block=update_block,
        first_pass=sampled + max(one.first_pass, first_pass),
        pending=sampled + one.pending,
        update=sampled + max(one.update, update),
        refresh=_search(size) if size.num_hard_classes else 0,
    )


def _block_bytes(size: ClassifierSize, num_classes: int, num_updated: int) -> tuple[int, int]:
    """Buffers of a block in the first and the second pass, as the passes count them against their budget."""
    rows, width = size.gathered_rows, size.embedding_dim
    dtypes = {"row_dtype": size.row_dtype, "momentum_dtype": size.momentum_dtype}
    update = update_block_bytes(size.options, num_updated, rows * size.accumulation_steps, width, **dtypes)
    return sums_block_bytes(size.options, num_classes, rows, width), update


def _blocks_to_run(size: ClassifierSize) -> int:
    """Blocks of a run, 1 to 8, a power of two: labels that all fall into one block take more than they should."""
    affordable = max(1, _MOST_CLASSES // size.block_classes)
    return 1 << min(3, affordable.bit_length() - 1, max(1, size.stepped_classes // size.block_classes).bit_length() - 1)


def classifier_traffic(size: ClassifierSize) -> Counter[str]:
    """Bytes that one rank sends in one optimizer step, by collective, as `Group.sent_bytes` counts them."""
    sent = Counter(_step(replace(size, num_instances=0), 1).sent)
    if size.num_replicas > 1:  # ∂W, block by block
        row = size.embedding_dim * 4
        full, rest = divmod(size.stepped_classes, size.update_block_classes)
        sent["all_reduce"] += full * ring_bytes("all_reduce", size.update_block_classes * row, size.num_replicas)
        sent["all_reduce"] += ring_bytes("all_reduce", rest * row, size.num_replicas)
    return sent


def classifier_flops(size: ClassifierSize) -> int:
    """FLOPs of one rank in one optimizer step."""
    return step_flops(size.gathered_rows * size.accumulation_steps, size.stepped_classes, size.embedding_dim)


def step_flops(num_rows: int, num_classes: int, embedding_dim: int) -> int:
    """8BND: logits and numerators, logits again and ∂W; 2 a row, class and dimension each."""
    return 8 * num_rows * num_classes * embedding_dim


@dataclass(frozen=True)
class _AbsentRanks(Group):
    """Rank 0 of a group whose other ranks do not run: collectives count their bytes and allocate their results."""

    labels_B: Tensor = field(kw_only=True)
    hard_BK: Tensor = field(kw_only=True)

    def all_gather_rows(self, rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        self._count("all_gather", rows)
        return rows.repeat(self.size, 1) if rows.dim() == 2 else self.labels_B.clone()

    def reduce_scatter_rows(self, rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        own = rows[: len(rows) // self.size].clone()
        self._count("reduce_scatter", own)
        return own

    def row_counts(self, count: int) -> list[int]:
        return [count] * self.size

    def start_broadcast_(self, tensor: Tensor, source: int) -> Transfer:
        return Transfer(tensor, SimpleNamespace(wait=lambda: None))

    def _all_reduce(self, tensor: Tensor, operation: Any) -> None:
        self._count("all_reduce", tensor)
        if not tensor.is_floating_point():
            tensor.copy_(self.hard_BK)


def _decides_nothing(func: Any, args: Any) -> bool:
    """Products, exp and sums of a block, and its copy: skipped, they never touch their memory, nor is it mapped."""
    aten = torch.ops.aten
    is_large_copy = func is aten.copy_.default and args[0].numel() > _LARGE
    return is_large_copy or func in (aten.mm.out, aten.exp2_.default, aten.sum.IntList_out)


class _Step(NamedTuple):
    """Bytes of an optimizer step; the first three above the resident ones and those of sampled rows."""

    first_pass: int
    pending: int
    update: int
    sampled_row: int  # of one sampled row and its momentum, held from `begin_step` to `step`
    row_bytes: dict[str, int]  # resident, of one local class, by name
    sent: Counter[str]  # by collective, in the forward passes


@functools.cache
@torch.no_grad()
def _step(size: ClassifierSize, num_classes: int) -> _Step:
    """Takes one optimizer step of a shard of `num_classes`; `size.num_instances` is not used."""
    total, num_rows, num_hard = num_classes * size.group_size, size.gathered_rows, size.num_hard_classes
    labels_B, hard_BK = _spread(num_rows, total), _spread(num_rows * num_hard, total).view(num_rows, num_hard).int()
    group, replicas = (
        _AbsentRanks(None, 0, count, _CPU, labels_B=labels_B, hard_BK=hard_BK)
        for count in (size.group_size, size.num_replicas)
    )
    float32_precision()  # its self-test, once a process, does not count
    with LiveBytes([labels_B, hard_BK], skips=_decides_nothing) as counted:
        shard = ClassifierShard(
            total,
            size.embedding_dim,
            group,
            size.options,
            replicas=replicas if size.num_replicas > 1 else None,
            smoothing_factor=0.2 if num_hard else 0.0,
            row_dtype=size.row_dtype,
            momentum_dtype=size.momentum_dtype,
            sampler=None if size.num_sampled_classes is None else ClassSampler("random", total, total, seed=0),
        )
        shard.options = replace(size.options, kernels="torch")
        if num_hard:
            shard.hard_classes = torch.zeros(num_classes, num_hard, dtype=torch.int32)
        resident = counted.live
        shard.begin_step(labels_B)
        sampled = counted.live - resident
        for _ in range(size.accumulation_steps):
            counted.peak = counted.live
            x_bD = torch.ones(size.rows_per_rank, size.embedding_dim)
            shard.forward(x_bD, labels_B[: size.rows_per_rank], total_rows=num_rows * size.accumulation_steps)
            del x_bD
        held = resident + sampled
        first_pass, pending = counted.peak - held, counted.live - held
        sent = group.sent_bytes + (replicas.sent_bytes if size.num_replicas > 1 else Counter())
        counted.peak = counted.live
        shard.step(0.1)
        update = counted.peak - held
    rows = {name: value.nbytes // num_classes for name, value in shard.own_state().items() if value is not None}
    return _Step(first_pass, pending, update, sampled // num_classes, rows, sent)


def _spread(count: int, total: int) -> Tensor:
    """`count` classes evenly over all, so that each shard has its share."""
    return torch.arange(count) * total // max(1, count)


def _hidden_bytes(size: ClassifierSize) -> tuple[int, int]:
    """What narrow products allocate inside the two passes, unseen by `LiveBytes`.

    In both a workspace, which oneDNN and GPUs need and other CPUs do not; in the first also the product, in the
    precision of the sum that it is added to.
    """
    if size.options.matmul_dtype.itemsize >= 4:
        return 0, 0
    features = size.gathered_rows * size.embedding_dim * 4
    has_workspace = size.device.type != "cpu" or onednn_multiplies_bfloat16()
    return features * (1 + has_workspace), features * size.accumulation_steps * has_workspace


def _search(size: ClassifierSize) -> int:
    """Peak of the search for hard classes: rows and candidates, beside a tile at first and the result at last."""
    n, width = size.local_classes, size.embedding_dim
    screen_dtype = fast_screen_dtype(size.device)
    edge = tile_edge(search_bytes(size.options.block_bytes, size.device), width, n, size.device.type)
    row, table_row, apart = _search_rows(width, size.num_hard_classes, screen_dtype)
    padding = (-n % edge) * width * screen_dtype.itemsize
    scores = edge * edge * screen_dtype.itemsize
    result = n * table_row + min(n, ROWS_AT_ONCE) * apart
    return n * row + padding + max(tile_bytes(edge, width), scores + result)


@functools.cache
def _search_rows(embedding_dim: int, num_hard_classes: int, screen_dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes of the search for each class: while it runs, of the result, and while the result is taken apart."""
    count = max(64, 1 << (2 * num_hard_classes - 1).bit_length())  # one tile, and as many candidates as in a large W
    weight_nD = torch.randn(count, embedding_dim, generator=torch.Generator().manual_seed(0))
    none = torch.empty(0)
    group = _AbsentRanks(None, 0, 1, _CPU, labels_B=none, hard_BK=none)
    partition, found = Partition(count, 1), []
    with LiveBytes([weight_nD]) as counted:
        find_hard_classes(
            weight_nD,
            num_hard_classes,
            partition,
            group,
            block_bytes=tile_bytes(count, embedding_dim),
            screen_dtype=screen_dtype,
            on_block=lambda *_: found.append(counted.live),
        )
        table = HardTable(ROWS_AT_ONCE, num_hard_classes, 2 * num_hard_classes, _CPU)
        before = counted.peak = counted.live
        result = table.ids().nbytes
        apart = counted.peak - before - result
    scores = count * count * screen_dtype.itemsize
    return (found[-1] - scores) // count, result // ROWS_AT_ONCE, apart // ROWS_AT_ONCE
