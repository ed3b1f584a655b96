"""Gradients of the encoder that are not finite, and large ones (F23, F29)."""

import json
import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from rig import TOTAL_STEPS, checkpoints, metrics, quick_first, run
from torch import Tensor, nn

from instance_ssl.config.deepspeed import load_ds_config
from instance_ssl.distributed.comm import Group
from instance_ssl.training.engine import Engine
from instance_ssl.training.optimizers import OptimizerOptions


def make_a_gradient_infinite() -> None:
    """Of the encoder alone, on rank 1 in the seventh step, while the loss is finite."""
    original = Engine.backward

    def backward(self: Engine, x_bD: Tensor, gradient_bD: Tensor) -> None:
        if self.steps_taken == 6 and os.environ["RANK"] == "1" and gradient_bD.isfinite().all():
            gradient_bD = gradient_bD * torch.inf
        original(self, x_bD, gradient_bD)

    Engine.backward = backward  # type: ignore[method-assign]


def hashes(checkpoint: Path) -> dict[str, str]:
    files = json.loads((checkpoint / "MANIFEST.json").read_text())["files"]
    return {name: record["sha256"] for name, record in files.items() if name != "training.json"}


SKIPS = [(zero_stage, fault) for zero_stage in (0, 1, 2) for fault in ("step:1:6:nan", None)]


@pytest.mark.parametrize(("zero_stage", "fault"), quick_first(SKIPS, lambda case: case == (0, None), lambda case: True))
def test_what_is_saved_after_a_skipped_step_is_what_was_saved_before(
    place: Path, zero_stage: int, fault: str | None
) -> None:
    """F23: a NaN among the pixels, or an infinite gradient of the encoder: every file of state is the same."""
    settings = {"checkpoint.every_steps": 1, "checkpoint.keep": 99}
    prepare = None if fault else make_a_gradient_infinite
    skipped = run(place, fault=fault, zero_stage=zero_stage, settings=settings, prepare=prepare)
    assert skipped.wait() == [0, 0], skipped.text()
    assert skipped.text().count("step 7 has numbers that are not finite: skipped") == 1
    assert sum(line.get("train/skipped_steps", 0) for line in metrics(place)) == 1
    by_step = [hashes(path) for path in checkpoints(place)]
    assert len(by_step) == TOTAL_STEPS
    assert by_step[5] == by_step[6]
    for name in ("encoder.pt", "rows_000000000_000000033.pt"):
        assert len({files[name] for files in by_step}) == TOTAL_STEPS - 1  # and all other steps have moved
    for path in checkpoints(place)[-1].glob("*.pt"):
        assert all_finite(torch.load(path, weights_only=True)), path.name


@pytest.mark.full
def test_the_end_of_a_run_is_told_even_when_its_last_batch_cannot_be_written(place: Path) -> None:
    """F23 on a disk that is full for rank 1."""
    settings = {"safety.max_skipped_steps": 3}
    ended = run(place, fault="step:1:*:nan", settings=settings, file_limit={1: 100})
    assert ended.wait() == [2, 2], ended.text()
    assert "error: 3 steps in a row" in ended.text()
    assert len(list((place / "run/pretrain").glob("not_finite_*"))) == 2


def all_finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(all_finite(inner) for inner in value.values())
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


def take_a_step_with_a_large_gradient(group: Group, path: Path) -> Tensor:
    """How far a weight moves at a learning rate of 0.5."""
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    settings = load_ds_config(path, global_batch_size=8 * group.size, max_grad_norm=0.0, world_size=group.size)
    engine = Engine(model, lambda step: 0.5, settings, group, OptimizerOptions(momentum=0.0, weight_decay=0.0))
    x_bD = engine(torch.full((8, 3), 100.0))
    engine.backward(x_bD, torch.ones_like(x_bD))
    assert engine.end_micro_batch()
    return -model.weight.detach()


@pytest.mark.parametrize("zero_stage", quick_first([0, 1, 2], lambda stage: stage == 1))
def test_no_gradient_is_clipped_behind_one_s_back(tmp_path: Path, zero_stage: int) -> None:
    """F29: DeepSpeed clips at norm 1 unless told not to. The gradient is 8 · 100 on each of two ranks, and summed."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": zero_stage}}))
    for moved in run_ranks(take_a_step_with_a_large_gradient, 2, path):
        torch.testing.assert_close(moved, torch.full((2, 3), 0.5 * 2 * 8 * 100))
