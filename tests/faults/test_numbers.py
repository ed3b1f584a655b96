"""Numbers that are not finite, and losses that jump (F23, F24)."""

import json
from pathlib import Path

import pytest
import torch
from rig import TOTAL_STEPS, checkpoints, digests, metrics, run


@pytest.mark.parametrize("zero_stage", [0, *(pytest.param(stage, marks=pytest.mark.fault) for stage in (1, 2))])
def test_a_step_with_a_nan_on_one_rank_moves_nothing_anywhere(place: Path, zero_stage: int) -> None:
    """The run ends like one whose step 6 was skipped: weights, momenta, W, batch-norm statistics, all to the bit."""
    poisoned = run(place, fault="step:1:6:nan", zero_stage=zero_stage)
    assert poisoned.wait() == [0, 0], poisoned.text()
    assert poisoned.text().count("are not finite: skipped") == 1
    assert sum(line.get("train/skipped_steps", 0) for line in metrics(place)) == 1
    assert metrics(place)[-1]["train/loss"] < 10
    with_a_nan = digests(place)
    for path in checkpoints(place)[1:]:
        path.rename(place / path.name)
    (place / "run/pretrain/result.json").unlink()
    (place / "run/pretrain/left_out_steps.json").write_text(json.dumps({"steps": [6]}))
    left_out = run(place, zero_stage=zero_stage)
    assert left_out.wait() == [0, 0], left_out.text()
    assert digests(place) == with_a_nan


def test_too_many_in_a_row_end_the_run_with_the_batch_kept(place: Path) -> None:
    poisoned = run(place, fault="step:1:*:nan", settings={"safety.max_skipped_steps": 4})
    assert poisoned.wait() == [2, 2], poisoned.text()
    assert poisoned.text().count("error: ") == 1
    assert "4 steps in a row" in poisoned.text()
    captured = sorted((place / "run/pretrain").glob("not_finite_step_000000004_rank_*.pt"))
    assert len(captured) == 2
    content = torch.load(captured[1], weights_only=True)
    assert content["embeddings"].isnan().all()
    assert content["instance_ids"].shape[0] == content["embeddings"].shape[0]
    assert not torch.load(captured[0], weights_only=True)["embeddings"].isnan().any()
    assert checkpoints(place) == []


@pytest.mark.full
def test_the_count_of_skipped_steps_survives_a_stop(place: Path) -> None:
    settings = {"safety.max_skipped_steps": 7}
    first = run(place, fault="step:1:*:nan", settings={**settings, "checkpoint.every_steps": 5})
    assert first.wait() == [2, 2], first.text()
    (kept,) = checkpoints(place)
    assert json.loads((kept / "training.json").read_text())["skipped_in_a_row"] == 5
    second = run(place, fault="step:1:*:nan", settings=settings)
    assert second.wait() == [2, 2], second.text()
    assert second.text().count("are not finite: skipped") == 2


SPIKE = "loss:*:11:spike"  # ten thousand times the loss


def test_a_spike_is_said_and_logged(place: Path) -> None:
    finished = run(place, fault=SPIKE)
    assert finished.wait() == [0, 0], finished.text()
    assert "warning: step 12: the loss is" in finished.text()
    assert [line["step"] for line in metrics(place) if "train/loss_spike" in line] == [12]


def test_a_rollback_ends_like_a_run_that_never_saw_the_batch(place: Path) -> None:
    rolled_back = run(place, fault=SPIKE, settings={"safety.rollback": "true"})
    assert rolled_back.wait() == [0, 0], rolled_back.text()
    assert "going back to the newest checkpoint; step 11 is skipped" in rolled_back.text()
    assert json.loads((place / "run/pretrain/left_out_steps.json").read_text()) == {"steps": [11]}
    assert metrics(place)[-1]["step"] == TOTAL_STEPS
    after = digests(place)
    for path in checkpoints(place):
        path.rename(place / path.name)
    (place / "run/pretrain/result.json").unlink()
    masked = run(place)
    assert masked.wait() == [0, 0], masked.text()
    assert digests(place) == after
