"""Every optimizer on 1, 2 and 4 ranks, under each ZeRO stage that it allows, against plain PyTorch in one process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from instance_ssl.config.choices import OptimizerName
from instance_ssl.config.deepspeed import DeepSpeedSettings, DtypeName, InstanceClassifierSection
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.models.encoder import Encoder
from instance_ssl.training.engine import Engine, OptimizerState
from instance_ssl.training.optimizers import OptimizerOptions, build_optimizer, learning_rate_scales

ROWS, WIDTH, D = 11, 6, 5  # rows of a micro-batch over all ranks, which they share unevenly
MICRO_BATCHES, STEPS = 2, 3


@dataclass(frozen=True)
class Case:
    """An optimizer under a ZeRO stage."""

    name: OptimizerName
    zero_stage: int
    clip: float = 0.0

    @property
    def options(self) -> OptimizerOptions:
        return OptimizerOptions(self.name, 0.9, 0.05, backbone_multiplier=0.5, layer_decay=0.7)


CASES = [
    *(Case(name, stage) for name in ("sgd", "adamw") for stage in (0, 1, 2)),
    *(Case("adamw", stage, clip=0.5) for stage in (0, 1)),
    Case("lars", 0),
    Case("muon", 0),
]
RATES: dict[OptimizerName, float] = {"sgd": 0.1, "adamw": 0.01, "lars": 20.0, "muon": 0.02}
# Muon's matrix products are in bfloat16, where a gradient that differs in its last bit may round otherwise.
ACCURACY: dict[OptimizerName, float] = {"sgd": 2e-6, "adamw": 2e-5, "lars": 2e-6, "muon": 1e-3}


class Backbone(nn.Module):
    """A stem, two blocks with a norm each, a norm behind them. No batch norm: its statistics are a micro-batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, rows: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        rows = self.stem(rows)
        for block in self.blocks:
            rows = rows + block(rows).tanh()
        return self.norm(rows)


def make_encoder() -> Encoder:
    torch.manual_seed(3)
    backbone: Any = Backbone()
    return Encoder(backbone, nn.Sequential(nn.Linear(WIDTH, 7), nn.ReLU(), nn.Linear(7, D)))


def make_engine(
    group: Group, case: Case, encoder: nn.Module, first_step: int, autocast: DtypeName | None = None
) -> Engine:
    json: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "zero_optimization": {"stage": case.zero_stage},
        "gradient_clipping": case.clip,
        "gradient_allreduce_op": "sum",
        "steps_per_print": 2**31,
    }
    if case.zero_stage:
        json["zero_allow_untested_optimizer"] = True
    if autocast is not None:
        json["torch_autocast"] = {"enabled": True, "dtype": autocast}
    settings = DeepSpeedSettings(json, InstanceClassifierSection(), 1, MICRO_BATCHES, autocast)
    engine = Engine(encoder, rate_of(case.name), settings, group, case.options, first_step=first_step)
    engine.encoder.train()
    return engine


def rate_of(name: OptimizerName) -> Callable[[int], float]:
    return lambda step: RATES[name] / (1 + step)


def micro_batch(step: int, number: int) -> tuple[Tensor, Tensor]:
    """Rows and ∂J/∂x of all ranks."""
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.randn(ROWS, D, generator=generator)


def train(engine: Engine, steps: range, scale: float = 1.0) -> None:
    own = slice(*Partition(ROWS, engine.group.size).bounds(engine.group.rank))
    for step in steps:
        for number in range(MICRO_BATCHES):
            rows, gradient = micro_batch(step, number)
            engine.backward(engine(rows[own]), scale * gradient[own])
            applied = engine.end_micro_batch()
        assert applied


def train_plainly(case: Case, frozen_steps: int = 0) -> tuple[Encoder, torch.optim.Optimizer]:
    """The twin: one process, autograd, an optimizer whose groups are written out for torch's own."""
    encoder, options = make_encoder(), case.options
    scales = learning_rate_scales(encoder, options)
    groups = []
    for name, parameter in encoder.named_parameters():
        decay = options.weight_decay if case.name == "sgd" or parameter.ndim > 1 else 0.0
        groups.append({"params": [parameter], "lr_scale": scales[name], "weight_decay": decay})
    optimizer: torch.optim.Optimizer
    if case.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=options.momentum)
    elif case.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(options.momentum, 0.999))
    else:
        optimizer = build_optimizer(encoder, options)
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(MICRO_BATCHES):
            rows, gradient = micro_batch(step, number)
            (encoder(rows) * gradient).sum().backward()
        if step < frozen_steps:
            encoder.backbone.zero_grad()
        if case.clip:
            nn.utils.clip_grad_norm_(encoder.parameters(), case.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate_of(case.name)(step) * group["lr_scale"]
        optimizer.step()
    return encoder, optimizer


def note(*where: object) -> Callable[[str], str]:
    return lambda message: f"{where}: {message}"


def assert_equals_twin(
    case: Case, states: tuple[dict[str, Tensor], OptimizerState], twin: tuple[Encoder, torch.optim.Optimizer]
) -> None:
    (state, kept), (encoder, optimizer) = states, twin
    close = {"rtol": 1e-4, "atol": ACCURACY[case.name]}
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), **close, msg=note(case, name))
        expected = optimizer.state[parameter]
        assert kept[name].keys() == expected.keys()
        for slot, value in kept[name].items():
            torch.testing.assert_close(value, expected[slot], **close, msg=note(case, name, slot))


def train_on_ranks(group: Group, cases: list[Case]) -> list[tuple[dict[str, Tensor], OptimizerState]]:
    results = []
    for case in cases:
        engine = make_engine(group, case, make_encoder(), 0)
        train(engine, range(STEPS))
        results.append(engine.full_state())
    return results


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.full)])
def test_steps_on_any_number_of_ranks_equal_plain_pytorch(world_size: int) -> None:
    for results in run_ranks(train_on_ranks, world_size, CASES):
        for case, states in zip(CASES, results, strict=True):
            assert_equals_twin(case, states, train_plainly(case))


def resume(group: Group, cases: list[Case], path: Path | None) -> list[tuple[Any, Any, Any]]:
    """By case: the unbroken run's end, the state as loaded (its own, or `path`'s), and the resumed run's end."""
    results, saved = [], [None] * len(cases) if path is None else torch.load(path)
    for case, given in zip(cases, saved, strict=True):
        engine = make_engine(group, case, make_encoder(), 0)
        train(engine, range(STEPS - 1))
        state, kept = given or engine.full_state()
        train(engine, range(STEPS - 1, STEPS))
        encoder = make_encoder()
        encoder.load_state_dict(state)
        resumed = make_engine(group, case, encoder, STEPS - 1)
        resumed.load_optimizer(kept)
        loaded = resumed.full_state()
        train(resumed, range(STEPS - 1, STEPS))
        results.append((engine.full_state(), loaded, resumed.full_state()))
    return results


def assert_same_bits(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_resumed_run_ends_with_the_same_bits() -> None:
    for results in run_ranks(resume, 2, CASES, None):
        for unbroken, _, resumed in results:
            assert_same_bits(resumed, unbroken)


def states_before_the_last_step(group: Group, cases: list[Case]) -> list[Any]:
    engines = [make_engine(group, case, make_encoder(), 0) for case in cases]
    for engine in engines:
        train(engine, range(STEPS - 1))
    return [engine.full_state() for engine in engines]


@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(1, 2), pytest.param(4, 1, marks=pytest.mark.full)])
def test_a_state_is_read_by_any_number_of_ranks_and_any_stage(
    tmp_path: Path, ranks_before: int, ranks_after: int
) -> None:
    before = [Case(name, stage) for name in ("sgd", "adamw") for stage in (0, 2, 1)]
    after = [Case(name, stage) for name in ("sgd", "adamw") for stage in (2, 1, 0)]
    saved = run_ranks(states_before_the_last_step, ranks_before, before)[0]
    torch.save(saved, path := tmp_path / "saved.pt")
    for results in run_ranks(resume, ranks_after, after, path):
        for case, given, (_, loaded, resumed) in zip(after, saved, results, strict=True):
            assert_same_bits(loaded[1], given[1])
            assert_equals_twin(case, resumed, train_plainly(case))


def thaw(group: Group, cases: list[Case]) -> list[tuple[Any, Any, Any]]:
    """By case: the start, the end of two steps with a frozen backbone, and the end of a further one without."""
    results = []
    for case in cases:
        encoder = make_encoder()
        encoder.freeze_backbone()
        start = {name: value.clone() for name, value in encoder.state_dict().items()}
        engine = make_engine(group, case, encoder, 0)
        train(engine, range(STEPS - 1))
        frozen = engine.full_state()
        encoder = make_encoder()
        encoder.load_state_dict(frozen[0])
        thawed = make_engine(group, case, encoder, STEPS - 1)
        thawed.load_optimizer(frozen[1])
        train(thawed, range(STEPS - 1, STEPS))
        results.append((start, frozen, thawed.full_state()))
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_frozen_backbone_keeps_its_bits_and_then_learns_as_if_the_training_began(world_size: int) -> None:
    cases = [case for case in CASES if not case.clip]
    for results in run_ranks(thaw, world_size, cases):
        for case, (start, (state, kept), end) in zip(cases, results, strict=True):
            backbone = [name for name in start if name.startswith("backbone.")]
            assert_same_bits({name: state[name] for name in backbone}, {name: start[name] for name in backbone})
            assert {name.split(".")[0] for name in kept} == {"projection"}
            assert not torch.equal(state["projection.0.weight"], start["projection.0.weight"])
            assert_equals_twin(case, end, train_plainly(case, frozen_steps=STEPS - 1))


def overflow(group: Group, case: Case, autocast: DtypeName | None) -> tuple[bool, Any, Any]:
    """A step, one whose gradient is not finite on the last rank, and the state before and after that."""
    engine = make_engine(group, case, make_encoder(), 0, autocast)
    small = 1e-4  # float16's first loss scale is 65536
    train(engine, range(1), small)
    before = engine.full_state()
    for number in range(MICRO_BATCHES):
        rows, gradient = micro_batch(1, number)
        spoilt = torch.full_like(gradient, torch.inf if group.rank == group.size - 1 else 1.0)
        engine.backward(engine(rows), spoilt)
        applied = engine.end_micro_batch()
    after = engine.full_state()
    train(engine, range(2, 3), small)
    return applied, before, after


@pytest.mark.parametrize(
    ("case", "autocast"),
    [
        (Case("adamw", 0), "float16"),
        (Case("adamw", 2), None),
        pytest.param(Case("adamw", 1), "bfloat16", marks=pytest.mark.full),
        (Case("muon", 0), "float16"),
        pytest.param(Case("lars", 0), "float16", marks=pytest.mark.full),
        pytest.param(Case("lars", 0), None, marks=pytest.mark.full),
    ],
    ids=lambda value: f"{value.name}-{value.zero_stage}" if isinstance(value, Case) else str(value),
)
def test_a_gradient_that_is_not_finite_moves_neither_weights_nor_moments(
    case: Case, autocast: DtypeName | None
) -> None:
    for applied, before, after in run_ranks(overflow, 2, case, autocast):
        assert not applied
        assert_same_bits(after, before)
