"""The sharded classifier against its dense float64 twin: value and both gradients, at uneven sizes."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from instance_ssl.classifier.reference import dense_hard_classes, dense_labels, dense_loss
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.choices import LossForm
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition

N, D, K, TAU = 507, 16, 20, 0.15
ROWS = {1: [46], 2: [21, 25], 3: [10, 31, 5], 4: [12, 1, 30, 3]}  # 46 ragged rows, whatever the number of ranks


def make_problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, instance ids (every id twice, as with two views) and weights with norms far from 1."""
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(46, D, generator=generator, dtype=torch.float64)
    labels_B = torch.randperm(N, generator=generator)[:23].repeat(2)
    scale = torch.rand(N, 1, generator=generator, dtype=torch.float64) * 3 + 0.1
    return x_BD, labels_B, torch.randn(N, D, generator=generator, dtype=torch.float64) * scale


def make_shard(group: Group, weight_ND: Tensor, form: LossForm, alpha: float, **settings: Any) -> ClassifierShard:
    block_bytes = settings.pop("block_bytes", 46 * 37 * 8)
    matmul_dtype = settings.pop("matmul_dtype", weight_ND.dtype)
    options = SoftmaxOptions(
        temperature=TAU,
        form=form,
        block_bytes=block_bytes,
        matmul_dtype=matmul_dtype,
    )
    shard = ClassifierShard(
        weight_ND.shape[0],
        weight_ND.shape[1],
        group,
        options,
        smoothing_factor=alpha,
        row_dtype=weight_ND.dtype,
        momentum_dtype=weight_ND.dtype,
        **settings,
    )
    shard.weight.copy_(weight_ND[shard.start : shard.stop])
    return shard


def sharded_gradients(group: Group, form: LossForm, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    x_BD, labels_B, weight_ND = make_problem()
    shard = make_shard(group, weight_ND, form, alpha, momentum=0.0, weight_decay=0.0)
    shard.refresh_hard_classes(K)
    counts = ROWS[group.size]
    first = sum(counts[: group.rank])
    own = slice(first, first + counts[group.rank])
    output = shard.forward(x_BD[own], labels_B[own], total_rows=len(x_BD), row_counts=counts)
    shard.step(learning_rate=0.0)  # with μ = λ = η = 0 the momentum buffer is ∂w itself
    return output.loss, output.feature_gradient_bD, shard.momentum_buffer


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("form", "alpha"), [("mixture", 0.0), ("mixture", 0.2), ("cross_entropy", 0.2)])
def test_loss_and_gradients_equal_the_dense_twin(world_size: int, form: LossForm, alpha: float) -> None:
    x_BD, labels_B, weight_ND = (t.requires_grad_(t.is_floating_point()) for t in make_problem())
    hard_BK = dense_hard_classes(weight_ND.detach(), K)[labels_B] if alpha else None
    loss = dense_loss(x_BD, weight_ND, dense_labels(labels_B, hard_BK, alpha, N), TAU, form)
    grad_x, grad_w = torch.autograd.grad(loss, [x_BD, weight_ND])

    results = run_ranks(sharded_gradients, world_size, form, alpha)

    for rank_loss, _, _ in results:
        torch.testing.assert_close(rank_loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), grad_x, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), grad_w, rtol=1e-9, atol=1e-14)
    if world_size > 1 and alpha:  # the case that matters: hard classes that live in other shards
        partition = Partition(N, world_size)
        assert hard_BK is not None
        owners = [
            {
                rank
                for rank in range(world_size)
                for c in row
                if partition.bounds(rank)[0] <= c < partition.bounds(rank)[1]
            }
            for row in hard_BK.tolist()
        ]
        assert max(len(o) for o in owners) == world_size


def accuracy_among_equals(group: Group, label: int) -> float:
    shard = ClassifierShard(4, 2, group, SoftmaxOptions(0.15, "mixture", torch.float32, 4000))
    shard.weight.fill_(1)
    return shard.measure(torch.ones(1, 2), torch.tensor([label]))[0]


def test_of_equal_cosines_on_different_ranks_the_lower_id_is_the_nearest() -> None:
    assert run_ranks(accuracy_among_equals, 2, 0) == [1, 1]
    assert run_ranks(accuracy_among_equals, 2, 2) == [0, 0]
