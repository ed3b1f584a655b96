"""Runs that were stopped go on as if they had not been (F11 to F15, F18, F39)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh_copy
from rig import EPOCHS, STEPS_PER_EPOCH, TOTAL_STEPS, checkpoints, digests, metrics, quick_first, run, status

LAST = TOTAL_STEPS - 1


@pytest.fixture(scope="module")
def clean_by_stage(initialised: Path, clean: dict[str, str], tmp_path_factory: pytest.TempPathFactory):
    """ZeRO stage → what an undisturbed run ends with; each made when first asked for."""
    known = {0: clean}

    def get(zero_stage: int) -> dict[str, str]:
        if zero_stage not in known:
            directory = tmp_path_factory.mktemp(f"zero_{zero_stage}")
            fresh_copy(initialised, directory)
            finished = run(directory, zero_stage=zero_stage)
            assert finished.wait() == [0, 0], finished.text()
            known[zero_stage] = digests(directory)
        return known[zero_stage]

    return get


# Name → (fault that sends SIGTERM to one rank, step of the checkpoint that the stop leaves).
STOPS = {
    "at the first step": ("step:1:0:term", 1),
    "in the middle of an epoch": ("step:0:6:term", 7),
    "at the end of an epoch": ("step:1:4:term", 5),
    "in the search for the hardest classes": ("hard_classes:1:5:term", 5),
    "at the last step": (f"step:0:{LAST}:term", TOTAL_STEPS),
}
QUICK = [
    ("in the middle of an epoch", 1, 0),
    ("at the end of an epoch", 0, 2),
    ("in the middle of an epoch", 2, 2),
    ("at the first step", 0, 0),
    ("in the search for the hardest classes", 0, 0),
]
ALL = [(stop, zero_stage, workers) for stop in STOPS for zero_stage in (0, 1, 2) for workers in (0, 2)]
CASES = quick_first(ALL, lambda case: case in QUICK[:2], lambda case: case not in QUICK)


@pytest.mark.parametrize(("stop", "zero_stage", "workers"), CASES)
def test_a_stopped_run_ends_like_an_undisturbed_one(
    place: Path, clean_by_stage, stop: str, zero_stage: int, workers: int
):
    fault, step = STOPS[stop]
    settings = {"data.num_workers": workers}
    stopped = run(place, fault=fault, zero_stage=zero_stage, settings=settings)
    assert stopped.wait() == [75, 75], stopped.text()
    assert status(place)["state"] == "stopped"
    assert status(place)["reason"] == "SIGTERM"
    assert checkpoints(place)[-1].name == f"step_{step:09d}"
    resumed = run(place, zero_stage=zero_stage, settings=settings)
    assert resumed.wait() == [0, 0], resumed.text()
    assert f"{step} steps in all" in resumed.text()
    assert digests(place) == clean_by_stage(zero_stage)
    steps = [line["step"] for line in metrics(place) if "train/loss" in line]
    assert steps == sorted(set(steps))
    assert steps[-1] == TOTAL_STEPS


@pytest.mark.parametrize(("size", "micro_batch"), quick_first([(1, 3), (3, 2)], lambda case: case == (3, 2)))
def test_other_numbers_of_ranks_go_on_at_the_exact_sample_too(
    initialised: Path, tmp_path: Path, size: int, micro_batch: int
) -> None:
    """Stopped in the middle of an epoch, where a step is several micro-batches."""
    ends = []
    for name, fault in (("undisturbed", None), ("stopped", f"step:{size - 1}:7:term")):
        place = tmp_path / name
        place.mkdir()
        fresh_copy(initialised, place)
        options: dict[str, Any] = {"size": size, "micro_batch": micro_batch, "settings": {"data.num_workers": 1}}
        if fault is not None:
            assert set(run(place, fault=fault, **options).wait()) == {75}
            assert checkpoints(place)[-1].name == "step_000000008"
        finished = run(place, **options)
        assert set(finished.wait()) == {0}, finished.text()
        ends.append(digests(place))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("batch", quick_first([0, 3], lambda batch: batch == 3))
def test_a_stopped_initialisation_goes_on(initialised: Path, tmp_path: Path, clean: dict[str, str], batch: int) -> None:
    (tmp_path / "images").symlink_to(initialised / "images")
    stopped = run(tmp_path, stage="initialize_classifier", fault=f"initialize:1:{batch}:term")
    assert stopped.wait() == [75, 75], stopped.text()
    resumed = run(tmp_path, stage="initialize_classifier")
    assert resumed.wait() == [0, 0], resumed.text()
    assert f"{batch + 1} batches done" in resumed.text()
    assert digests(tmp_path, "initialize_classifier") == digests(initialised, "initialize_classifier")
    assert not (tmp_path / "run/initialize_classifier/partial").exists()


def test_a_stopped_evaluation_is_done_again(place: Path) -> None:
    settings = {
        "evaluation.data.kind": "digits",
        "evaluation.data.limit_train": 50,
        "evaluation.data.limit_test": 20,
        "evaluation.sources": "[random]",
        "evaluation.batch_size": 4,
        "evaluation.knn.neighbours": "[5]",
    }
    stopped = run(place, stage="evaluate_knn", fault="evaluate:1:0:term", settings=settings)
    codes = stopped.wait()
    assert codes[1] == 75, stopped.text()
    assert codes[0] in (3, 75)
    assert not (place / "run/evaluate_knn/result.json").exists()
    resumed = run(place, stage="evaluate_knn", settings=settings)
    assert resumed.wait() == [0, 0], resumed.text()
    assert "random" in json.loads((place / "run/evaluate_knn/result.json").read_text())["figures"]


@pytest.mark.full
def test_two_undisturbed_runs_are_alike_whatever_the_workers(place: Path, clean: dict[str, str]) -> None:
    finished = run(place, settings={"data.num_workers": 1})
    assert finished.wait() == [0, 0], finished.text()
    assert digests(place) == clean


def leave_out(place: Path, first: int) -> None:
    """From this step on the data are passed over and nothing moves: the end shows what was loaded."""
    steps = list(range(first, TOTAL_STEPS))
    (place / "run/pretrain/left_out_steps.json").write_text(json.dumps({"steps": steps}))


def whole_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything that was learned, gathered over the ranks that wrote it."""
    encoder = torch.load(checkpoint / "encoder.pt", weights_only=True)
    state = dict(encoder["state"])
    for name, slots in encoder["optimizer"].items():
        state |= {f"{name}/{slot}": value for slot, value in slots.items()}
    rows = [torch.load(path, weights_only=True) for path in sorted(checkpoint.glob("rows_*.pt"))]
    return state | {name: torch.cat([part[name] for part in rows]) for name in ("weight", "momentum")}


CHANGES = {
    "2 to 1 ranks": ({"size": 2}, {"size": 1}),
    "1 to 2 ranks": ({"size": 1}, {"size": 2}),
    "2 to 3 ranks": ({"size": 2}, {"size": 3, "micro_batch": 2}),
    "4 to 2 ranks": ({"size": 4}, {"size": 2}),
    "ZeRO 0 to 1, other accumulation": ({}, {"zero_stage": 1, "micro_batch": 6}),
    "ZeRO 1 to 2": ({"zero_stage": 1}, {"zero_stage": 2}),
    "ZeRO 2 on 2 ranks to 0 on 3": ({"zero_stage": 2}, {"size": 3, "micro_batch": 1}),
}


FIRST = ("2 to 3 ranks", "ZeRO 1 to 2")


@pytest.mark.parametrize(
    "change", quick_first([*CHANGES], FIRST.__contains__, lambda change: change == "ZeRO 2 on 2 ranks to 0 on 3")
)
def test_another_layout_loads_the_same_state_and_trains_on(place: Path, change: str) -> None:
    before, after = CHANGES[change]
    stopped = run(place, fault="step:0:6:term", **before)
    assert set(stopped.wait()) == {75}, stopped.text()
    written = whole_state(checkpoints(place)[-1])
    leave_out(place, 7)
    still = run(place, **after)
    assert set(still.wait()) == {0}, still.text()
    loaded = whole_state(checkpoints(place)[-1])
    assert loaded.keys() == written.keys()
    for name, value in written.items():
        if "running" in name:  # the mean of what three ranks were given alike is rounded anew
            torch.testing.assert_close(loaded[name], value, rtol=1e-6, atol=0)
        else:
            assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("size", quick_first([1, 3], lambda size: False, lambda size: size == 3))
def test_training_goes_on_with_another_number_of_ranks(place: Path, size: int) -> None:
    stopped = run(place, fault="step:0:6:term")
    assert stopped.wait() == [75, 75]
    resumed = run(place, size=size, micro_batch=2)
    assert set(resumed.wait()) == {0}, resumed.text()
    result = json.loads((place / "run/pretrain/result.json").read_text())
    assert result["world_size"] == size
    assert result["steps"] == EPOCHS * STEPS_PER_EPOCH


def test_nothing_to_begin_with_is_said(place: Path) -> None:
    checkpoints(place, "initialize_classifier")[-1].rename(place / "gone")
    refused = run(place)
    assert refused.wait() == [2, 2]
    assert "no initialised classifier" in refused.text()


def test_a_changed_key_is_named(place: Path) -> None:
    settings = {"classifier.temperature": 0.2, "optimization.epochs": 5, "log.every_steps": 3}
    refused = run(place, settings=settings)
    assert refused.wait() == [2, 2]
    assert "classifier.temperature = 0.15, not 0.2 (and optimization.epochs)" in refused.text()


def test_changed_images_are_refused(initialised: Path, place: Path) -> None:
    images = place / "images"
    images.unlink()
    images.mkdir()
    for path in (initialised / "images").iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "064.png").write_bytes((images / "000.png").read_bytes() + b"\0")
    refused = run(place)
    assert refused.wait() == [2, 2]
    assert "the images have changed" in refused.text()
    (place / "run/data.json").unlink()  # as if the list had been made anew: the checkpoint itself knows
    refused = run(place)
    assert refused.wait() == [2, 2]
    assert "of a run with other images" in refused.text()


@pytest.mark.full
def test_a_head_with_batch_norm_goes_on_to_the_same_bits(place: Path) -> None:
    """Its running statistics are each rank's own, as those of the backbone, and saved like them."""
    settings = {"model.projection": "mlp_bn"}
    shutil.rmtree(place / "run")
    assert run(place, stage="initialize_classifier", settings=settings).wait() == [0, 0]
    assert run(place, settings=settings).wait() == [0, 0]
    undisturbed = digests(place)
    shutil.rmtree(place / "run/pretrain")
    assert run(place, fault="step:0:6:term", settings=settings).wait() == [75, 75]
    assert run(place, settings=settings).wait() == [0, 0]
    assert digests(place) == undisturbed


def test_a_head_with_batch_norm_needs_two_views(place: Path) -> None:
    settings = {"model.projection": "mlp_bn", "augmentation.num_views": 1}
    shutil.rmtree(place / "run")
    refused = run(place, stage="initialize_classifier", settings=settings, micro_batch=1)
    assert refused.wait() == [2, 2], refused.text()
    assert "model.projection mlp_bn needs two views a micro-batch" in refused.text()
