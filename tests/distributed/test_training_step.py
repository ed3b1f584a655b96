"""Optimizer steps on 1, 2 and 4 ranks, under ZeRO 0, 1 and 2, with and without accumulation, against plain PyTorch."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from instance_ssl.classifier.reference import dense_hard_classes, dense_labels, dense_loss
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.deepspeed import DeepSpeedSettings, InstanceClassifierSection
from instance_ssl.data.sampler import GlobalBatchSampler
from instance_ssl.data.views import ViewBatch
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.models.encoder import build_encoder
from instance_ssl.training.engine import Engine, OptimizerState
from instance_ssl.training.optimizers import OptimizerOptions
from instance_ssl.training.schedules import warmup_cosine
from instance_ssl.training.step import train_step

N, D, K, V, BATCH, STEPS = 53, 8, 5, 2, 16, 3
TAU, ALPHA, MOMENTUM, DECAY = 0.15, 0.2, 0.9, 1e-2
SGD = OptimizerOptions(momentum=MOMENTUM, weight_decay=DECAY)
CASES = [(stage, accumulation) for stage in (0, 1, 2) for accumulation in (1, 4)]
NOT_SAMPLED = torch.empty(0, dtype=torch.int64)  # the global batch's ids, which only sampling needs


def make_encoder(kind: str = "mlp") -> nn.Module:
    """No batch norm: its statistics belong to a micro-batch, so only without it are all divisions equal."""
    torch.manual_seed(3)
    if kind == "vit":
        return build_encoder(
            backbone="timm/vit_tiny_patch16_224",
            backbone_options={"depth": 2, "embed_dim": 12, "num_heads": 2, "patch_size": 2},
            stem="auto",
            image_size=4,
            projection="mlp",
            projection_hidden_dim=None,
            embedding_dim=D,
        )
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 24), nn.ReLU(), nn.Linear(24, D))


def make_weight() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(4)) * 0.5


def views_of(ids: Tensor) -> Tensor:
    """(b, V, 3, 4, 4): pixels that depend on nothing but the id and the view."""
    return torch.stack([torch.randn(V, 3, 4, 4, generator=torch.Generator().manual_seed(int(i))) for i in ids])


def schedule(step: int) -> float:
    return warmup_cosine(step, peak=0.5, warmup_steps=2, total_steps=6)


def settings_for(world_size: int, zero_stage: int, accumulation: int) -> DeepSpeedSettings:
    micro = BATCH // (world_size * accumulation)
    engine: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": zero_stage},
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "sum",
        "steps_per_print": 2**31,
    }
    if zero_stage:
        engine["zero_allow_untested_optimizer"] = True
    return DeepSpeedSettings(engine, InstanceClassifierSection(), micro, accumulation, None)


def make_training(
    group: Group, zero_stage: int, accumulation: int, kind: str = "mlp"
) -> tuple[Engine, ClassifierShard]:
    options = SoftmaxOptions(temperature=TAU, form="mixture", block_bytes=2000, matmul_dtype=torch.float32)
    own_group = comm.split(group, group.size)[0]
    shard = ClassifierShard(N, D, own_group, options, smoothing_factor=ALPHA, momentum=MOMENTUM, weight_decay=DECAY)
    shard.weight.copy_(make_weight()[shard.start : shard.stop])
    shard.refresh_hard_classes(K)
    settings = settings_for(group.size, zero_stage, accumulation)
    engine = Engine(make_encoder(kind), schedule, settings, group, SGD)
    return engine, shard


def micro_batches(group: Group, accumulation: int) -> Iterator[ViewBatch]:
    micro = BATCH // (group.size * accumulation)
    for keys in GlobalBatchSampler(N, BATCH, micro, group.rank, group.size, seed=0):
        ids = torch.tensor([index for _, index in keys])
        yield ViewBatch(views_of(ids), ids)


def train_on_ranks(
    group: Group, kind: str = "mlp"
) -> list[tuple[list[float], dict[str, Tensor], OptimizerState, Tensor, Tensor]]:
    results = []
    for zero_stage, accumulation in CASES:
        engine, shard = make_training(group, zero_stage, accumulation, kind)
        batches = micro_batches(group, accumulation)
        losses = [train_step(engine, shard, batches, accumulation, NOT_SAMPLED).loss for _ in range(STEPS)]
        results.append((losses, *engine.full_state(), shard.weight, shard.momentum_buffer))
    return results


def train_plainly(kind: str = "mlp") -> tuple[list[float], nn.Module, Tensor, torch.optim.SGD]:
    """The dense twin: one process, one parameter list, autograd, torch.optim.SGD."""
    encoder, weight_ND = make_encoder(kind), make_weight().requires_grad_()
    optimizer = torch.optim.SGD([*encoder.parameters(), weight_ND], lr=1.0, momentum=MOMENTUM, weight_decay=DECAY)
    hard_NK = dense_hard_classes(weight_ND.detach(), K)
    losses = []
    for step, keys in zip(range(STEPS), GlobalBatchSampler(N, BATCH, BATCH, 0, 1, seed=0), strict=False):
        ids = torch.tensor([index for _, index in keys])
        labels_B = ids.repeat(V)
        optimizer.param_groups[0]["lr"] = schedule(step)
        y_BN = dense_labels(labels_B, hard_NK[labels_B], ALPHA, N)
        loss = dense_loss(encoder(views_of(ids).transpose(0, 1).flatten(0, 1)), weight_ND, y_BN, TAU, "mixture")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, encoder, weight_ND, optimizer


@pytest.mark.parametrize(
    ("world_size", "kind"),
    [
        (1, "mlp"),
        (2, "mlp"),
        (4, "mlp"),
        (2, "vit"),
        pytest.param(1, "vit", marks=pytest.mark.full),
        pytest.param(4, "vit", marks=pytest.mark.full),
    ],
)
def test_steps_equal_plain_pytorch(world_size: int, kind: str) -> None:
    losses, encoder, weight_ND, optimizer = train_plainly(kind)
    # Attention and layer norm sum in another order with another micro-batch.
    close = {"rtol": 2e-4, "atol": 1e-5} if kind == "vit" else {"rtol": 2e-5, "atol": 2e-6}
    by_rank = run_ranks(train_on_ranks, world_size, kind)
    for results in zip(*by_rank, strict=True):  # case by case, in the order of CASES
        for rank_losses, state, momentum, _, _ in results:
            torch.testing.assert_close(rank_losses, losses, rtol=1e-5, atol=0)
            for name, parameter in encoder.named_parameters():
                torch.testing.assert_close(state[name], parameter.detach(), **close)
                expected = optimizer.state[parameter]["momentum_buffer"]
                torch.testing.assert_close(momentum[name]["momentum_buffer"], expected, **close)
        torch.testing.assert_close(torch.cat([r[3] for r in results]), weight_ND.detach(), **close)
        expected = optimizer.state[weight_ND]["momentum_buffer"]
        torch.testing.assert_close(torch.cat([r[4] for r in results]), expected, **close)


def poison_one_rank(group: Group) -> bool:
    """A NaN in one rank's pixels in the second of two micro-batches: what moves?"""
    engine, shard = make_training(group, 0, 2)
    before = [value.clone() for value in (*engine.full_state()[0].values(), shard.weight, shard.momentum_buffer)]
    batches = list(micro_batches(group, 2))
    if group.rank == 1:
        batches[1][0].fill_(torch.nan)
    report = train_step(engine, shard, iter(batches), 2, NOT_SAMPLED)
    assert not report.applied
    assert (engine.steps_taken, shard.steps_taken) == (1, 1)
    after = [*engine.full_state()[0].values(), shard.weight, shard.momentum_buffer]
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_nothing_moves_when_one_rank_meets_a_nan() -> None:
    assert run_ranks(poison_one_rank, 2) == [True, True]


def spoil_with_batch_norm(group: Group) -> bool:
    """A NaN in the second of two micro-batches: the first one's statistics do not stay either."""
    encoder = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    engine = Engine(encoder, schedule, settings_for(1, 0, 2), group, SGD)
    before = engine.own_buffers()
    x_bD = engine(torch.ones(BATCH // 2, 4))
    engine.backward(x_bD, torch.zeros_like(x_bD))
    engine.end_micro_batch()
    engine.abandon_step(engine(torch.full((BATCH // 2, 4), torch.nan)))
    for gradient in (0.0, torch.nan):  # a finite loss, and a gradient that is not
        x_bD = engine(torch.ones(BATCH // 2, 4))
        engine.backward(x_bD, torch.full_like(x_bD, gradient))
        assert not engine.end_micro_batch()
    return all(torch.equal(before[name], after) for name, after in engine.own_buffers().items())


def test_batch_norm_forgets_all_micro_batches_of_a_step_that_is_dropped() -> None:
    assert run_ranks(spoil_with_batch_norm, 1) == [True]


def saved_statistics(group: Group) -> list[Tensor]:
    norm = nn.BatchNorm1d(4)
    settings = settings_for(group.size, 0, 1)
    engine = Engine(nn.Sequential(norm), schedule, settings, group, SGD)
    assert norm.running_mean is not None
    norm.running_mean.fill_(float(group.rank))
    return [engine.full_state()[0]["0.running_mean"], norm.running_mean.clone()]


def test_saved_statistics_are_the_ranks_mean_and_each_rank_keeps_its_own() -> None:
    for rank, (saved, own) in enumerate(run_ranks(saved_statistics, 2)):
        assert (saved == 0.5).all()
        assert (own == rank).all()


def overflow_one_gradient(group: Group, zero_stage: int) -> bool:
    """A finite loss, but a gradient that is not finite on one rank: nothing moves, and the next step is a usual one."""
    engine, shard = make_training(group, zero_stage, 1)
    batches = list(micro_batches(group, 1))
    train_step(engine, shard, iter(batches[:1]), 1, NOT_SAMPLED)
    before = [value.clone() for value in (*engine.full_state()[0].values(), shard.weight, shard.momentum_buffer)]
    momentum_before = engine.full_state()[1]
    handle = None
    if group.rank == 1:
        handle = next(engine.encoder.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    report = train_step(engine, shard, iter(batches[1:2]), 1, NOT_SAMPLED)
    assert not report.applied
    assert math.isfinite(report.loss)
    state, momentum = engine.full_state()
    after = [*state.values(), shard.weight, shard.momentum_buffer]
    still = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    still = still and all(
        torch.equal(*(state[name]["momentum_buffer"] for state in (momentum_before, momentum))) for name in momentum
    )
    if handle is not None:
        handle.remove()
    return still and train_step(engine, shard, iter(batches[2:3]), 1, NOT_SAMPLED).applied


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_gradient_that_is_not_finite_moves_nothing_on_any_rank(zero_stage: int) -> None:
    assert run_ranks(overflow_one_gradient, 2, zero_stage) == [True, True]


def momentum_round_trip(group: Group, zero_stage: int) -> tuple[OptimizerState, OptimizerState]:
    engine, shard = make_training(group, zero_stage, 1)
    batches = micro_batches(group, 1)
    train_step(engine, shard, batches, 1, NOT_SAMPLED)
    state, momentum = engine.full_state()
    rows = shard.weight.clone(), shard.momentum_buffer.clone()
    train_step(engine, shard, batches, 1, NOT_SAMPLED)

    encoder = make_encoder()
    encoder.load_state_dict(state)
    settings = settings_for(group.size, zero_stage, 1)
    resumed = Engine(encoder, schedule, settings, group, SGD, first_step=1)
    resumed.load_optimizer(momentum)
    shard.weight, shard.momentum_buffer = rows
    batches = micro_batches(group, 1)
    next(batches)
    train_step(resumed, shard, batches, 1, NOT_SAMPLED)
    return engine.full_state()[1], resumed.full_state()[1]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_resumed_engine_goes_on_bit_for_bit(zero_stage: int) -> None:
    for unbroken, resumed in run_ranks(momentum_round_trip, 2, zero_stage):
        assert all(
            torch.equal(state["momentum_buffer"], resumed[name]["momentum_buffer"]) for name, state in unbroken.items()
        )
