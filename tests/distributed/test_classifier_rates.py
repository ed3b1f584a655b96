"""W's own weight decay and rate: two parameter groups of one dense SGD, whether rows are sampled or not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from instance_ssl.classifier.reference import dense_labels, dense_loss
from instance_ssl.classifier.sampling import ClassSampler
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.choices import SamplingMode
from instance_ssl.config.deepspeed import load_ds_config
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.distributed.comm import Group
from instance_ssl.run.build import classifier_shard

N, D, M, BATCH, STEPS, TAU = 41, 6, 15, 8, 6, 0.15
MOMENTUM, RATE = 0.9, 0.3
DS = Path(__file__).parents[2] / "ds_configs/cpu_float32.json"


def sampler(mode: SamplingMode | None) -> ClassSampler | None:
    return None if mode is None else ClassSampler(mode, N, M, seed=3)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(BATCH, D, generator=generator, dtype=torch.float64), torch.randperm(N, generator=generator)[
        :BATCH
    ]


def first_weight() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def train_shard(group: Group, mode: SamplingMode | None, decay: float, multiplier: float) -> Tensor:
    shard = ClassifierShard(
        N,
        D,
        group,
        SoftmaxOptions(TAU, "mixture", torch.float64, 4000),
        momentum=MOMENTUM,
        weight_decay=decay,
        learning_rate_multiplier=multiplier,
        row_dtype=torch.float64,
        momentum_dtype=torch.float64,
        sampler=sampler(mode),
    )
    shard.weight.copy_(first_weight()[shard.start : shard.stop])
    for step in range(STEPS):
        x_BD, ids = batch_of(step)
        own = torch.arange(BATCH).chunk(group.size)[group.rank]
        shard.begin_step(ids)
        shard.forward(x_BD[own], ids[own], total_rows=BATCH)
        shard.step(RATE / (1 + step))
    shard.settle()
    return shard.weight


def train_densely(mode: SamplingMode | None, decay: float, multiplier: float) -> Tensor:
    weight_ND = first_weight().requires_grad_()
    optimizer = torch.optim.SGD([weight_ND], lr=1.0, momentum=MOMENTUM, weight_decay=decay)
    draws = sampler(mode)
    for step in range(STEPS):
        x_BD, ids = batch_of(step)
        drawn = torch.arange(N) if draws is None else draws.draw(ids, step)
        labels = dense_labels(torch.searchsorted(drawn, ids), None, 0.0, len(drawn))
        optimizer.zero_grad()
        dense_loss(x_BD, weight_ND[drawn], labels, TAU, "mixture").backward()
        optimizer.param_groups[0]["lr"] = multiplier * RATE / (1 + step)
        optimizer.step()
    return weight_ND.detach()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mode", [None, "random", "recent"])
@pytest.mark.parametrize(("decay", "multiplier"), [(0.0, 3.0), (0.05, 0.25)])
def test_rows_have_a_decay_and_a_rate_of_their_own(
    world_size: int, mode: SamplingMode | None, decay: float, multiplier: float
) -> None:
    rows = torch.cat(run_ranks(train_shard, world_size, mode, decay, multiplier))
    torch.testing.assert_close(rows, train_densely(mode, decay, multiplier), rtol=1e-11, atol=1e-13)


def shard_of(group: Group, optimization: dict[str, Any], classifier: dict[str, Any]) -> tuple[float, float]:
    """The rate at the end of the warm-up, and the decay, of the shard that a stage builds."""
    config = ExperimentConfig.model_validate({"optimization": optimization, "classifier": classifier})
    ds = load_ds_config(DS, global_batch_size=4096, max_grad_norm=0.0, world_size=group.size)
    stage: Any = SimpleNamespace(config=config, ds=ds, world=group, source=range(N))
    shard = classifier_shard(stage)
    return config.optimization.peak_learning_rate * shard.learning_rate_multiplier, shard.weight_decay


@pytest.mark.parametrize(
    ("optimization", "classifier", "rate", "decay"),
    [
        ({}, {}, 0.48, 1e-4),
        ({"learning_rate": 0.1, "weight_decay": 0.01}, {"learning_rate_multiplier": 2}, 0.2, 0.01),
        ({"optimizer": "adamw"}, {}, 0.48, 1e-4),
        ({"optimizer": "adamw", "learning_rate": 1e-3}, {"learning_rate": 0.3, "weight_decay": 0.02}, 0.3, 0.02),
        ({"optimizer": "lars"}, {"learning_rate_multiplier": 0.5}, 0.24, 1e-4),
    ],
)
def test_a_stage_gives_w_its_own_rate_and_decay(
    optimization: dict[str, Any], classifier: dict[str, Any], rate: float, decay: float
) -> None:
    (built,) = run_ranks(shard_of, 1, optimization, classifier)
    assert built == (pytest.approx(rate, rel=1e-12), decay)
