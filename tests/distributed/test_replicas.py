"""Groups of G ranks with copies of W: the same training as one group, at world 4 with G = 1, 2 and 4."""

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from instance_ssl.classifier.reference import dense_hard_classes, dense_labels, dense_loss
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group

N, D, K, BATCH, STEPS = 507, 16, 20, 24, 3
TAU, ALPHA, MOMENTUM, DECAY, RATE = 0.15, 0.2, 0.9, 1e-2, 0.5


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 + step)
    ids = torch.randperm(N, generator=generator)[: BATCH // 2].repeat(2)
    return torch.randn(BATCH, D, generator=generator, dtype=torch.float64), ids


def first_weight() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def train(
    world: Group, group_size: int, accumulation: int, row_dtype: torch.dtype = torch.float64
) -> tuple[int, list[tuple[Tensor, Tensor]], Tensor, Tensor, tuple[float, float]]:
    group, replicas = comm.split(world, group_size)
    shard = ClassifierShard(
        N,
        D,
        group,
        SoftmaxOptions(TAU, "mixture", torch.promote_types(row_dtype, torch.float32), 40_000),
        replicas=replicas,
        smoothing_factor=ALPHA,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        row_dtype=row_dtype,
        momentum_dtype=row_dtype,
    )
    shard.weight.copy_(first_weight()[shard.start : shard.stop])
    shard.refresh_hard_classes(K)
    log_z = torch.logsumexp(torch.cosine_similarity(batch_of(0)[0][:, None], first_weight(), dim=2) / TAU, dim=1).mean()
    steps = []
    for step in range(STEPS):
        x_BD, ids = batch_of(step)
        losses, gradients = [], []
        for rows in torch.arange(BATCH).chunk(accumulation):
            own = rows.chunk(world.size)[world.rank]
            output = shard.forward(x_BD[own], ids[own], total_rows=BATCH)
            losses.append(output.loss)
            if step == 0 and accumulation == 1:
                torch.testing.assert_close(output.log_z.double(), log_z, rtol=1e-2, atol=0)
            gradients.append(output.feature_gradient_bD)
        shard.step(RATE)
        steps.append((torch.stack(losses).sum(), torch.cat(gradients)))
    x_BD, ids = batch_of(0)
    own = torch.arange(BATCH).chunk(world.size)[world.rank]
    return shard.start, steps, shard.weight, shard.momentum_buffer, shard.measure(x_BD[own], ids[own])


@pytest.mark.parametrize(("group_size", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 3)])
def test_groups_train_alike(group_size: int, accumulation: int) -> None:
    weight_ND = first_weight().requires_grad_()
    optimizer = torch.optim.SGD([weight_ND], lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    hard_NK = dense_hard_classes(weight_ND.detach(), K)
    results = run_ranks(train, 4, group_size, accumulation)
    for step in range(STEPS):
        x_BD, ids = batch_of(step)
        x_BD.requires_grad_()
        loss = dense_loss(x_BD, weight_ND, dense_labels(ids, hard_NK[ids], ALPHA, N), TAU, "mixture")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert x_BD.grad is not None
        for rank, (_, steps, *_) in enumerate(results):
            own = torch.cat([rows.chunk(4)[rank] for rows in torch.arange(BATCH).chunk(accumulation)])
            torch.testing.assert_close(steps[step][0], loss.detach(), rtol=1e-12, atol=0)
            torch.testing.assert_close(steps[step][1], x_BD.grad[own], rtol=1e-9, atol=1e-14)
    momentum_ND = optimizer.state[weight_ND]["momentum_buffer"]
    for start, _, weight_nD, momentum_nD, _ in results:
        own_rows = slice(start, start + len(weight_nD))
        torch.testing.assert_close(weight_nD, weight_ND.detach()[own_rows], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(momentum_nD, momentum_ND[own_rows], rtol=1e-9, atol=1e-14)
    assert len({result[4] for result in results}) == 1  # accuracy and cosine are the world's, on every rank


def test_copies_of_w_stay_equal_to_the_bit() -> None:
    """Those in bfloat16, too, which round by chance, and differently on each shard."""
    for row_dtype in (torch.float64, torch.bfloat16):
        results = run_ranks(train, 4, 2, 1, row_dtype)
        assert torch.equal(results[0][2], results[2][2])
        assert torch.equal(results[1][2], results[3][2])
