"""Sampled classes: the draw is the same on all ranks, and all of W follows dense SGD, sampled or not."""

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from instance_ssl.classifier.reference import dense_labels, dense_loss
from instance_ssl.classifier.sampling import ClassSampler
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.choices import SamplingMode
from instance_ssl.distributed.comm import Group

N, D, M, BATCH, STEPS, TAU = 61, 8, 20, 12, 7, 0.15
MOMENTUM, DECAY = 0.9, 1e-2


def positives_of(step: int) -> Tensor:
    return torch.randperm(N, generator=torch.Generator().manual_seed(100 + step))[:BATCH]


def embeddings_of(step: int) -> Tensor:
    return torch.randn(BATCH, D, generator=torch.Generator().manual_seed(200 + step), dtype=torch.float64)


def first_weight() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def learning_rate(step: int) -> float:
    return 0.5 / (1 + step)


def train_sampled(group: Group, mode: SamplingMode, settle_at: int | None) -> tuple[list[float], Tensor, Tensor]:
    """Steps of two micro-batches each; W is also settled in mid-run, as a log line or a checkpoint does."""
    shard = ClassifierShard(
        N,
        D,
        group,
        SoftmaxOptions(TAU, "mixture", torch.float64, 4000),
        momentum=MOMENTUM,
        weight_decay=DECAY,
        row_dtype=torch.float64,
        momentum_dtype=torch.float64,
        sampler=ClassSampler(mode, N, M, seed=3),
    )
    shard.weight.copy_(first_weight()[shard.start : shard.stop])
    losses = []
    for step in range(STEPS):
        ids, x_BD = positives_of(step), embeddings_of(step)
        shard.begin_step(ids)
        total = 0.0
        for part in torch.arange(BATCH).chunk(2):
            own = part.chunk(group.size)[group.rank]
            total += shard.forward(x_BD[own], ids[own], total_rows=BATCH).loss.item()
        losses.append(total)
        shard.step(learning_rate(step))
        if step == settle_at:
            shard.settle()
    shard.settle()
    return losses, shard.weight, shard.momentum_buffer


def train_densely(mode: SamplingMode) -> tuple[list[float], Tensor, Tensor]:
    """The dense twin: all N x D parameters in torch.optim.SGD, a loss over the drawn rows, zero gradient elsewhere."""
    weight_ND = first_weight().requires_grad_()
    optimizer = torch.optim.SGD([weight_ND], lr=1.0, momentum=MOMENTUM, weight_decay=DECAY)
    sampler = ClassSampler(mode, N, M, seed=3)
    losses = []
    for step in range(STEPS):
        drawn = sampler.draw(positives_of(step), step)
        labels = torch.searchsorted(drawn, positives_of(step))
        loss = dense_loss(
            embeddings_of(step), weight_ND[drawn], dense_labels(labels, None, 0.0, len(drawn)), TAU, "mixture"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        losses.append(loss.item())
    return losses, weight_ND.detach(), optimizer.state[weight_ND]["momentum_buffer"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("mode", ["random", "recent"])
def test_every_row_follows_dense_sgd(world_size: int, mode: SamplingMode) -> None:
    losses, weight_ND, momentum_ND = train_densely(mode)
    results = run_ranks(train_sampled, world_size, mode, 3 if world_size > 1 else None)
    for rank_losses, _, _ in results:
        assert rank_losses == pytest.approx(losses, rel=1e-12)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), weight_ND, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), momentum_ND, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("num_sampled", [16, 40, 100, 1000])
def test_a_random_draw_has_all_positives_and_the_wanted_number(num_sampled: int) -> None:
    positives = torch.tensor([3, 99, 3, 40, 7])
    drawn = ClassSampler("random", 100, num_sampled, seed=0).draw(positives, step=5)
    assert torch.equal(drawn, drawn.unique())
    assert len(drawn) == min(num_sampled, 100)
    assert torch.isin(positives, drawn).all()
    again = ClassSampler("random", 100, num_sampled, seed=0)
    assert torch.equal(again.draw(positives, step=5), drawn)
    if num_sampled < 100:
        assert not torch.equal(again.draw(positives, step=6), drawn)


def test_random_negatives_are_uniform() -> None:
    """Each of 95 other classes is drawn with probability 15/95; 2000 draws leave none 6 deviations away."""
    sampler, positives = ClassSampler("random", 100, 20, seed=1), torch.arange(5)
    counts = torch.zeros(100)
    for step in range(2000):
        counts[sampler.draw(positives, step)] += 1
    assert (counts[:5] == 2000).all()
    share = 15 / 95
    assert (counts[5:] - 2000 * share).abs().max() < 6 * (2000 * share * (1 - share)) ** 0.5


def test_more_positives_than_samples_are_all_kept() -> None:
    assert torch.equal(ClassSampler("random", 100, 4, seed=0).draw(torch.arange(9), 0), torch.arange(9))


def test_recent_classes_are_those_of_the_last_batches() -> None:
    sampler = ClassSampler("recent", 100, 6, seed=0)
    assert sampler.draw(torch.tensor([1, 2]), 0).tolist() == [1, 2]
    assert sampler.draw(torch.tensor([3, 4]), 1).tolist() == [1, 2, 3, 4]
    assert sampler.draw(torch.tensor([5, 1]), 2).tolist() == [1, 2, 3, 4, 5]
    assert sampler.draw(torch.tensor([6, 7]), 3).tolist() == [1, 3, 4, 5, 6, 7]  # 2 is the oldest


def test_only_sampled_rows_are_touched() -> None:
    assert run_ranks(untouched_rows, 1) == [True]


def untouched_rows(group: Group) -> bool:
    options = SoftmaxOptions(TAU, "mixture", torch.float32, 4000)
    sampler = ClassSampler("random", N, M, seed=3)
    shard = ClassifierShard(N, D, group, options, momentum=MOMENTUM, weight_decay=DECAY, sampler=sampler)
    shard.weight.normal_(generator=torch.Generator().manual_seed(0))
    before = shard.weight.clone()
    ids = positives_of(0)
    shard.begin_step(ids)
    shard.forward(embeddings_of(0).float(), ids, total_rows=BATCH)
    shard.step(0.5)
    drawn = torch.zeros(N, dtype=torch.bool)
    drawn[ClassSampler("random", N, M, seed=3).draw(ids, 0)] = True
    assert torch.equal(shard.weight[~drawn], before[~drawn])
    return bool((shard.weight[drawn] != before[drawn]).any(dim=1).all())
