"""Whole runs with another optimizer and a backbone that thaws: stopped on either side, they end with the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh_copy
from rig import STEPS_PER_EPOCH, TOTAL_STEPS, checkpoints, digests, make_images, metrics, quick_first, run

SETTINGS: dict[str, Any] = {
    "model.freeze_epochs": 1,
    "optimization.optimizer": "adamw",
    "optimization.learning_rate": 0.01,
    "optimization.layer_decay": 0.5,
    "classifier.learning_rate": 0.2,
    "checkpoint.keep": 9,
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised classifier of `SETTINGS`."""
    directory = tmp_path_factory.mktemp("optimizers")
    make_images(directory / "images")
    finished = run(directory, stage="initialize_classifier", settings=SETTINGS)
    assert finished.wait() == [0, 0], finished.text()
    return directory


@pytest.fixture(scope="module")
def undisturbed(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    fresh_copy(begun, directory)
    finished = run(directory, settings=SETTINGS, zero_stage=2)
    assert finished.wait() == [0, 0], finished.text()
    assert "the backbone is frozen for the first 1 epochs" in finished.text()
    assert "the backbone is trained from now on" in finished.text()
    return directory


def encoder_of(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / "encoder.pt", weights_only=True)


def backbone_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in encoder_of(checkpoint)["state"].items() if name.startswith("backbone.")}


def test_the_backbone_is_frozen_for_its_epochs_and_then_learns(begun: Path, undisturbed: Path) -> None:
    frozen, *thawed = checkpoints(undisturbed)
    start = backbone_of(checkpoints(begun, "initialize_classifier")[-1])
    assert frozen.name == f"step_{STEPS_PER_EPOCH:09d}"
    assert all(torch.equal(value, start[name]) for name, value in backbone_of(frozen).items())
    assert not any(name.startswith("backbone.") for name in encoder_of(frozen)["optimizer"])
    end = encoder_of(thawed[-1])
    assert all(not torch.equal(value, start[name]) for name, value in backbone_of(thawed[-1]).items())
    steps = {name: slots["step"].item() for name, slots in end["optimizer"].items()}
    assert {steps[name] for name in steps if name.startswith("backbone.")} == {TOTAL_STEPS - STEPS_PER_EPOCH}
    assert {steps[name] for name in steps if name.startswith("projection.")} == {TOTAL_STEPS}


def test_the_schedule_goes_on_through_the_thaw(undisturbed: Path) -> None:
    rates = {
        line["step"]: line["train/learning_rate"] for line in metrics(undisturbed) if "train/learning_rate" in line
    }
    assert sorted(rates)[-1] == TOTAL_STEPS
    assert rates[STEPS_PER_EPOCH] == pytest.approx(0.01)  # the end of the warm-up, and of the frozen epoch
    after = [rates[step] for step in sorted(rates) if step >= STEPS_PER_EPOCH]
    assert after == sorted(after, reverse=True)


# Name → (fault that sends SIGTERM to one rank, step of the checkpoint that the stop leaves).
STOPS = {
    "while frozen": ("step:1:1:term", 2),
    "at the thaw": (f"step:0:{STEPS_PER_EPOCH - 1}:term", STEPS_PER_EPOCH),
    "after the thaw": ("step:0:6:term", 7),
}


@pytest.mark.parametrize("stop", quick_first([*STOPS], lambda stop: stop == "while frozen"))
def test_a_run_stopped_on_either_side_of_the_thaw_ends_like_an_undisturbed_one(
    begun: Path, undisturbed: Path, tmp_path: Path, stop: str
) -> None:
    fault, step = STOPS[stop]
    fresh_copy(begun, tmp_path)
    stopped = run(tmp_path, fault=fault, settings=SETTINGS, zero_stage=2)
    assert stopped.wait() == [75, 75], stopped.text()
    assert checkpoints(tmp_path)[-1].name == f"step_{step:09d}"
    resumed = run(tmp_path, settings=SETTINGS, zero_stage=2)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(tmp_path) == digests(undisturbed)


@pytest.mark.full
@pytest.mark.parametrize("name", ["lars", "muon"])
def test_other_optimizers_resume_to_the_bit(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    settings = {"optimization.optimizer": name}
    if name == "muon":
        settings["optimization.learning_rate"] = "0.01"
    first, second = (tmp_path_factory.mktemp(name) for _ in range(2))
    make_images(first / "images")
    assert run(first, stage="initialize_classifier", settings=settings).wait() == [0, 0]
    fresh_copy(first, second)
    assert run(first, settings=settings).wait() == [0, 0]
    assert run(second, settings=settings, fault="step:0:6:term").wait() == [75, 75]
    assert run(second, settings=settings).wait() == [0, 0]
    assert digests(second) == digests(first)


def test_lars_under_zero_is_refused_before_anything_is_written(begun: Path, tmp_path: Path) -> None:
    fresh_copy(begun, tmp_path)
    before = sorted((tmp_path / "run").rglob("*"))
    refused = run(tmp_path, settings={**SETTINGS, "optimization.optimizer": "lars"}, zero_stage=1)
    assert refused.wait() == [2, 2], refused.text()
    assert "optimization.optimizer lars needs the norm of each whole tensor" in refused.text()
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_another_optimizer_than_a_run_began_with_is_refused(begun: Path, tmp_path: Path) -> None:
    fresh_copy(begun, tmp_path)
    refused = run(tmp_path, settings={**SETTINGS, "optimization.optimizer": "sgd"})
    assert refused.wait() == [2, 2], refused.text()
    assert "optimization.optimizer = adamw, not sgd" in refused.text()
