"""Rates of products: found quickly at any speed, alike on all ranks, and the faster precision is taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from ranks import run_ranks

from instance_ssl.checkpoint.state import Checkpoint, TrainingPosition
from instance_ssl.classifier import matmul_rates
from instance_ssl.classifier.matmul_rates import Rates, agreed_rates
from instance_ssl.config.deepspeed import DeepSpeedSettings, DtypeName, InstanceClassifierSection
from instance_ssl.distributed.comm import Group
from instance_ssl.run import precision
from instance_ssl.run.log import RunLog


@pytest.mark.parametrize("gflops", [0.5, 50, 5000])
def test_a_rate_is_found_in_seconds_at_any_speed(monkeypatch: pytest.MonkeyPatch, gflops: float) -> None:
    seconds: list[float] = []

    def multiply(work: Any, _: torch.device) -> float:
        seconds.append(2 * len(work.args[0]) ** 3 / gflops / 1e9)
        return seconds[-1]

    monkeypatch.setattr(matmul_rates, "_seconds", multiply)
    assert matmul_rates.matmul_rate(torch.float32, torch.device("cpu")) == pytest.approx(gflops)
    assert sum(seconds) < 5


@pytest.mark.parametrize(
    ("rates", "faster"),
    [((80, 2), torch.float32), ((80, 150), torch.bfloat16), ((80, 79), torch.bfloat16), ((80, 81), torch.bfloat16)],
)
def test_float32_is_taken_where_it_is_clearly_faster(rates: tuple[float, float], faster: torch.dtype) -> None:
    assert Rates(*rates).faster == faster


def measured_as(rates: dict[int, tuple[float, float]], rank: int) -> Callable[[torch.dtype, torch.device], float]:
    return lambda dtype, _: rates[rank][dtype == torch.bfloat16]


def rates_of_ranks(group: Group, rates: dict[int, tuple[float, float]]) -> tuple[float, float]:
    agreed = agreed_rates(measured_as(rates, group.rank), group)
    return agreed.float32, agreed.bfloat16


def test_ranks_that_measure_differently_agree_on_the_slowest() -> None:
    rates = {0: (80.0, 150.0), 1: (70.0, 2.0), 2: (90.0, 160.0)}  # rank 1 has no bfloat16 instructions
    assert run_ranks(rates_of_ranks, 3, rates) == [(70.0, 2.0)] * 3


class Heard(RunLog):
    """A log that keeps its lines."""

    def __init__(self) -> None:
        super().__init__(is_main=True)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def settled(
    group: Group, rates: dict[int, tuple[float, float]], ds: DeepSpeedSettings
) -> tuple[torch.dtype, list[str]]:
    """The precision that the ranks settle on, and what they say."""
    measure = measured_as(rates, group.rank)
    for module, name in [(matmul_rates, "quick_matmul_rate"), (precision, "quick_matmul_rate")]:
        setattr(module, name, measure)
    precision.quick_convolution_rate = measure
    log = Heard()
    chosen = precision.settle(ds, group, log)
    return chosen.matmul_dtype, log.lines


SLOW, FAST = {0: (80.0, 150.0), 1: (70.0, 2.0)}, {0: (80.0, 150.0), 1: (70.0, 160.0)}


@pytest.mark.parametrize(
    ("autocast", "wanted", "rates", "chosen", "said"),
    [
        ("bfloat16", "auto", SLOW, torch.float32, ["warning: torch_autocast", "matmul_dtype auto takes float32"]),
        ("bfloat16", "auto", FAST, torch.bfloat16, ["matmul_dtype auto takes bfloat16"]),
        (None, "auto", FAST, torch.float32, []),
        (None, "bfloat16", SLOW, torch.bfloat16, ["warning: instance_classifier.matmul_dtype bfloat16"]),
        (None, "bfloat16", FAST, torch.bfloat16, []),
    ],
)
def test_the_precision_that_a_json_leads_to(
    autocast: DtypeName | None,
    wanted: Literal["auto", "bfloat16"],
    rates: dict[int, tuple[float, float]],
    chosen: torch.dtype,
    said: list[str],
) -> None:
    ds = DeepSpeedSettings({}, InstanceClassifierSection(matmul_dtype=wanted), 1, 1, autocast)
    first, second = run_ranks(settled, 2, rates, ds)
    assert first == second
    assert first[0] == chosen
    assert len(first[1]) == len(said)
    for line, part in zip(first[1], said, strict=True):
        assert part in line
    if rates is SLOW:
        assert all("70 GFLOP/s in float32, 2 in bfloat16" in line for line in first[1])


def test_measuring_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        assert matmul_rates.quick_matmul_rate(dtype, torch.device("cpu")) > 0
        assert matmul_rates.quick_convolution_rate(dtype, torch.device("cpu")) > 0
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("before", "lines"), [(None, 0), ("float32", 0), ("bfloat16", 1)])
def test_a_run_that_resumes_in_another_precision_says_so(before: str | None, lines: int) -> None:
    log, position = Heard(), TrainingPosition(1, 0, 10, 8, matmul_dtype=before)
    precision.say_if_changed(Checkpoint(Path("step_1"), position), torch.float32, log)
    assert len(log.lines) == lines
    assert all("float32 from here on and were in bfloat16" in line for line in log.lines)
