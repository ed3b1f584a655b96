"""What an epoch's loop counts, skips and measures, with the engine and the classifier stubbed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from instance_ssl.classifier.shard import ShardOutput
from instance_ssl.training import step


def test_a_step_s_loss_is_a_sum_over_micro_batches_and_log_z_a_mean() -> None:
    parts = [(1.0, 4.0, 1.0), (2.0, 6.0, 2.0), (0.5, 5.0, 0.0)]
    outputs = [ShardOutput(*(torch.tensor(value) for value in part), torch.empty(0)) for part in parts]
    assert step._read(outputs) == (3.5, 5.0, 3)


def test_steps_that_are_skipped_use_their_data_up_and_the_last_step_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = SimpleNamespace(encoder=SimpleNamespace(train=lambda: None), steps_taken=10)
    discarded: list[int] = []
    shard = SimpleNamespace(discard=lambda: discarded.append(engine.steps_taken))
    trained: list[tuple[int, int, bool]] = []

    def train_step(*arguments: Any, measure: bool) -> str:
        _, _, iterator, accumulation, positives = arguments
        trained.append((int(positives), next(iterator), measure))
        assert [next(iterator) for _ in range(accumulation - 1)]
        engine.steps_taken += 1
        return "report"

    monkeypatch.setattr(step, "train_step", train_step)
    seen: list[tuple[int, object]] = []
    step.train_epoch(
        engine, shard, iter(range(100, 120)), steps=range(10, 18), accumulation_steps=2,  # type: ignore[arg-type]
        positives_of=torch.tensor, measure_every_steps=3, on_step=lambda *report: seen.append(report), skipped={12},
    )  # fmt: skip
    assert [step for step, _ in seen] == list(range(10, 18))
    assert [step for step, report in seen if report is None] == [12]
    assert discarded == [13]
    assert engine.steps_taken == 18
    assert [(step, first) for step, first, _ in trained] == [
        (step, 100 + 2 * (step - 10)) for step in range(10, 18) if step != 12
    ]
    assert [step for step, _, measure in trained if measure] == [11, 14, 17]
    trained.clear()
    step.train_epoch(
        engine, shard, iter(range(100, 120)), steps=range(1), accumulation_steps=2,  # type: ignore[arg-type]
        positives_of=torch.tensor, measure_every_steps=3, on_step=lambda *report: None,
    )  # fmt: skip
    assert trained == [(0, 100, True)]
