"""Classes left out: as if W had no such columns, on any ranks, in every mode; their rows are 0 and stay 0."""

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from instance_ssl.classifier.hard_classes import find_hard_classes
from instance_ssl.classifier.reference import dense_hard_classes, dense_labels, dense_loss
from instance_ssl.classifier.sampling import ClassSampler
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.choices import LossForm
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition

N, D, K, M, BATCH, TAU, ALPHA, MOMENTUM, DECAY, RATE = 61, 8, 7, 30, 12, 0.15, 0.2, 0.9, 1e-2, 0.5
FIRST = torch.tensor([60, 3, 21, 20])  # of all ranks, in no order
LATER = torch.tensor([3, 40, 0])  # one is known already
ALL = torch.cat([FIRST, LATER]).unique()
# Steps: 0 with FIRST left out and a table made then; 1 with LATER struck out of it; 2 with a new table.
STEPS = 3


def first_weight() -> Tensor:
    weight_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return weight_ND + 0.5  # cosines with a 0 in the middle, where a row of zeros would have its place


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 + step)
    ids = torch.randperm(N, generator=generator)
    ids = ids[~torch.isin(ids, ALL)][: BATCH // 2].repeat(2)
    return torch.randn(BATCH, D, generator=generator, dtype=torch.float64), ids


def make_shard(
    world: Group,
    group_size: int,
    form: LossForm = "mixture",
    mode: str = "full",
    dtype: torch.dtype = torch.float64,
) -> ClassifierShard:
    group, replicas = comm.split(world, group_size)
    products = torch.float64 if dtype == torch.float64 else dtype
    shard = ClassifierShard(
        N,
        D,
        group,
        SoftmaxOptions(TAU, form, products, 4000),
        replicas=replicas,
        smoothing_factor=ALPHA if mode == "full" else 0.0,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        row_dtype=dtype,
        momentum_dtype=dtype,
        sampler=None if mode == "full" else ClassSampler(mode, N, M, seed=3),  # type: ignore[arg-type]
    )
    shard.weight.copy_(first_weight()[shard.start : shard.stop])
    return shard


def train(world: Group, group_size: int, form: LossForm, mode: str, dtype: torch.dtype):
    """What every step gives (loss, own feature gradients), and the rows and momentum at the end."""
    shard = make_shard(world, group_size, form, mode, dtype)
    shard.leave_out(FIRST)
    shard.refresh_hard_classes(K)
    steps = []
    for step in range(STEPS):
        if step == 1:
            shard.leave_out(LATER)
        if step == 2:
            shard.refresh_hard_classes(K)
        x_BD, ids = batch_of(step)
        shard.begin_step(ids)
        own = torch.arange(BATCH).tensor_split(world.size)[world.rank]
        counts = [len(part) for part in torch.arange(BATCH).tensor_split(group_size)] if group_size > 1 else None
        output = shard.forward(x_BD[own].to(shard._compute_dtype), ids[own], total_rows=BATCH, row_counts=counts)
        shard.step(RATE)
        steps.append((output.loss, output.feature_gradient_bD))
    shard.settle()
    return shard.start, steps, shard.weight, shard.momentum_buffer


def train_densely(form: LossForm, mode: str):
    """The dense twin has no columns of what is left out; the rows there are simply set to 0."""
    weight_ND, buffer_ND = first_weight(), torch.zeros(N, D, dtype=torch.float64)
    sampler = None if mode == "full" else ClassSampler(mode, N, M, seed=3)  # type: ignore[arg-type]
    steps, hard_NK = [], torch.full((N, K), -1, dtype=torch.int64)
    for step in range(STEPS):
        gone = FIRST if step == 0 else ALL
        weight_ND[gone], buffer_ND[gone] = 0, 0
        if sampler is not None:
            sampler.leave_out(gone)
        is_live_N = torch.ones(N, dtype=torch.bool).index_fill_(0, gone, False)
        live = is_live_N.nonzero()[:, 0]
        if step in (0, 2):
            hard_NK[live] = live[dense_hard_classes(weight_ND[live], K).long()]
        hard_NK[torch.isin(hard_NK, gone)] = -1
        x_BD, ids = batch_of(step)
        columns = live if sampler is None else sampler.draw(ids, step)
        assert not torch.isin(columns, gone).any()
        x_BD.requires_grad_()
        w_ND = weight_ND.clone().requires_grad_()
        y_BN = dense_labels(ids, hard_NK[ids] if mode == "full" else None, ALPHA, N)
        loss = dense_loss(x_BD, w_ND[columns], y_BN[:, columns], TAU, form)
        grad_x, grad_w = torch.autograd.grad(loss, [x_BD, w_ND])
        buffer_ND = MOMENTUM * buffer_ND + grad_w + DECAY * weight_ND
        weight_ND = weight_ND - RATE * buffer_ND
        steps.append((loss.detach(), grad_x))
    return steps, weight_ND, buffer_ND


@pytest.mark.parametrize(
    ("world_size", "group_size", "form", "mode"),
    [
        (1, 1, "mixture", "full"),
        (3, 3, "mixture", "full"),
        (2, 2, "cross_entropy", "full"),
        (2, 1, "mixture", "full"),  # copies of W
        (3, 3, "mixture", "random"),
        (2, 2, "mixture", "recent"),
    ],
)
def test_values_and_gradients_are_those_without_the_columns(
    world_size: int, group_size: int, form: LossForm, mode: str
) -> None:
    steps, weight_ND, buffer_ND = train_densely(form, mode)
    results = run_ranks(train, world_size, group_size, form, mode, torch.float64)
    for step, (loss, grad_x) in enumerate(steps):
        for result in results:
            torch.testing.assert_close(result[1][step][0], loss, rtol=1e-11, atol=0)
        gradients = torch.cat([result[1][step][1] for result in results])
        torch.testing.assert_close(gradients, grad_x, rtol=1e-9, atol=1e-13)
    for result in results:
        rows = slice(result[0], result[0] + len(result[2]))
        torch.testing.assert_close(result[2], weight_ND[rows], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(result[3], buffer_ND[rows], rtol=1e-10, atol=1e-13)
        own = ALL[(rows.start <= ALL) & (rows.stop > ALL)] - rows.start
        assert not result[2][own].any()
        assert not result[3][own].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_precision_stay_zero(dtype: torch.dtype) -> None:
    steps, weight_ND, _ = train_densely("mixture", "full")
    results = run_ranks(train, 2, 2, "mixture", "full", dtype)
    weight = torch.cat([result[2] for result in results])
    assert not weight[ALL].any()
    assert weight.isfinite().all()
    close = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(results[0][1][0][0].double(), steps[0][0], rtol=close, atol=0)
    torch.testing.assert_close(weight.double(), weight_ND, rtol=close, atol=10 * close)


def tables(group: Group, left_out: Tensor, k: int, num_rows: int) -> Tensor:
    weight_ND = first_weight()[:num_rows].float()
    partition = Partition(num_rows, group.size)
    start, stop = partition.bounds(group.rank)
    return find_hard_classes(weight_ND[start:stop], k, partition, group, block_bytes=4000, left_out=left_out)


@pytest.mark.parametrize(
    ("world_size", "left_out", "k", "num_rows"),
    [
        (1, [0, 5, 60], 7, N),
        (3, [0, 5, 60], 57, N),  # all others, just
        (3, [0, 5, 60], 60, N),  # more than there are
        (4, [0, 1, 2, 8], 3, 10),  # a rank of which nothing is left
        (2, [*range(8), 9], 3, 10),  # one class is left, and has no other
    ],
)
def test_nobody_has_a_left_out_class_among_its_hardest(
    world_size: int, left_out: list[int], k: int, num_rows: int
) -> None:
    live = torch.tensor([i for i in range(num_rows) if i not in left_out])
    found = min(k, len(live) - 1)
    expected = torch.full((num_rows, k), -1, dtype=torch.int32)
    expected[live, :found] = live[dense_hard_classes(first_weight()[live], found).long()].int()
    table = torch.cat(run_ranks(tables, world_size, torch.tensor(left_out), k, num_rows))
    assert torch.equal(table, expected)


def nearest_live() -> int:
    """The class that is the nearest of those that are not left out."""
    weight_ND = first_weight().abs() + 0.1
    live = torch.tensor([i for i in range(N) if i not in ALL])
    return int(live[torch.cosine_similarity(weight_ND[live], -torch.ones(1, D, dtype=torch.float64)).argmax()])


def accuracy(group: Group) -> tuple[float, float]:
    """Features opposite to all rows, so that a cosine of 0 would be the best."""
    shard = make_shard(group, group.size)
    ids = torch.tensor([nearest_live(), 30])
    shard.weight.copy_(shard.weight.abs() + 0.1)
    shard.leave_out(ALL)
    own = ids[group.rank : group.rank + 1] if group.size == 2 else ids
    return shard.measure(-torch.ones(len(own), D, dtype=torch.float64), own)


def test_a_left_out_class_is_nobody_s_nearest() -> None:
    assert nearest_live() != 30
    for size in (1, 2):
        assert all(result[0] == 0.5 for result in run_ranks(accuracy, size))


def test_sampled_negatives_are_none_of_them() -> None:
    sampler = ClassSampler("random", 100, 40, seed=0)
    sampler.leave_out(torch.arange(50, 100))
    for step in range(20):
        drawn = sampler.draw(torch.tensor([1, 2]), step)
        assert len(drawn) == 40
        assert drawn.max() < 50
    few = ClassSampler("random", 100, 99, seed=0)
    few.leave_out(torch.arange(50, 100))
    assert few.draw(torch.tensor([1, 2, 70]), 0).tolist() == list(range(50))  # 70 has a substitute in its batch
    recent = ClassSampler("recent", 100, 6, seed=0)
    recent.draw(torch.tensor([1, 2, 3]), 0)
    recent.leave_out(torch.tensor([2, 5]))
    assert recent.draw(torch.tensor([4, 5]), 1).tolist() == [1, 3, 4]
