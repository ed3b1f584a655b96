"""The benchmarks' own measurements."""

import pytest
import torch

from instance_ssl.benchmarks import measure


@pytest.mark.parametrize("gflops", [0.5, 50, 5000])
def test_a_rate_is_found_in_seconds_at_any_speed(monkeypatch: pytest.MonkeyPatch, gflops: float) -> None:
    seconds: list[float] = []

    def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
        seconds.append(2 * len(a) ** 3 / gflops / 1e9)
        return seconds[-1]

    monkeypatch.setattr(measure, "_product_seconds", multiply)
    assert measure.matmul_rate(torch.float32, torch.device("cpu")) == pytest.approx(gflops)
    assert sum(seconds) < 5
