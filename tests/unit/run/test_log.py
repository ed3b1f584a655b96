"""Metrics: what TensorBoard reads back, and what a resumed run leaves of them."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from instance_ssl.run.log import RunLog


def write(directory: Path, steps: range, value: float, resumed_at: int | None = None) -> None:
    log = RunLog(is_main=True)
    with log.metrics_in(directory):
        if resumed_at is not None:
            log.forget_after(resumed_at)
        for step in steps:
            log.metrics(step, {"train/loss": value * step, "train/none": None})


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), 0.5)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (3, 1.5)]


def test_a_resumed_run_takes_the_place_of_what_it_does_again(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), 0.5)
    write(tmp_path, range(4, 7), 2.0, resumed_at=3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [(1, 0.5), (2, 1.0), (3, 1.5), (4, 8.0), (5, 10.0), (6, 12.0)]
    assert [(line["step"], line["train/loss"]) for line in lines] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == expected


def test_ranks_that_are_not_the_first_write_nothing(tmp_path: Path) -> None:
    log = RunLog(is_main=False)
    with log.metrics_in(tmp_path):
        log.metrics(1, {"train/loss": 1.0})
    assert list(tmp_path.iterdir()) == []
