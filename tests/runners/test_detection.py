"""Detection as a user starts it: on two ranks, resumed on one, and with what cannot be read."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torchvision
from processes import run_bare, run_forked
from ranks import run_ranks
from voc_tree import add_image, make_tree, object_xml, write_list

from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.evaluation.detection.voc import open_voc
from instance_ssl.evaluation.workload import Workload
from instance_ssl.run.log import RunLog
from instance_ssl.run.stage import Stage
from instance_ssl.run.watchdog import Stopped
from instance_ssl.stages.evaluate_detection import _bound, _build, _refuse, _train


def settings(root: Path, **more: str) -> list[str]:
    keys = {
        "model.backbone": "resnet18", "model.stem": "imagenet", "evaluation.sources": "[random]",
        "data.num_workers": "0", "log.every_steps": "1",
    }  # fmt: skip
    detection = {
        "root": str(root), "train": "[VOC2007/train]", "test": "[VOC2007/test]", "classes": "[cat, dog]",
        "iterations": "2", "steps": "[]", "warmup_iterations": "0", "batch_size": "3", "regions_per_image": "8",
        "test_proposals": "60", "train_short_sides": "[48, 64]", "test_short_side": "64", "statistics_iterations": "0",
        **more,
    }  # fmt: skip
    keys |= {f"evaluation.detection.{key}": value for key, value in detection.items()}
    return ["--set", *(f"{key}={value}" for key, value in keys.items())]


@pytest.mark.full
def test_two_ranks_train_and_one_goes_on_to_the_same_figures(tmp_path: Path) -> None:
    """The second run finds the first one's detector, trained to the end, and evaluates it alone."""
    tree = make_tree(tmp_path / "voc")
    finished = run_forked("evaluate_detection", 2, "--run-dir", str(tmp_path / "two"), *settings(tree))
    assert finished.returncode == 0, finished.stderr
    folder = tmp_path / "two/evaluate_detection"
    two = json.loads((folder / "result.json").read_text())
    assert two["world_size"] == 2
    figures = two["figures"]["random"]
    assert figures["test_images"] == 5
    assert figures["detections"] > 0
    assert {"AP", "AP50", "AP75", "area", "coco", "train_loss", "epoch"} <= set(figures)
    assert two["recipe"]["iterations"] == 2
    assert two["recipe"]["train_images"] == 6
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "detection/random_loss" in line] == [1, 2]
    assert any("detection/random_coco_AP75" in line for line in lines)

    (tmp_path / "one/evaluate_detection").mkdir(parents=True)
    shutil.copy(folder / "detector_random.pth", tmp_path / "one/evaluate_detection")
    finished = run_bare("evaluate_detection", "--run-dir", str(tmp_path / "one"), *settings(tree))
    assert finished.returncode == 0, finished.stderr
    assert "detection resumes at iteration 2" in finished.stdout
    one = json.loads((tmp_path / "one/evaluate_detection/result.json").read_text())
    assert one["world_size"] == 1
    assert {**one["figures"]["random"], "train_loss": None} == {**figures, "train_loss": None}


def test_a_box_outside_its_image_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "voc")
    add_image(tree, "wrong", np.zeros((40, 60, 3), np.uint8), object_xml("cat", (1, 1, 99, 40)))
    write_list(tree, "train", ["000000", "wrong"])
    finished = run_bare("evaluate_detection", "--run-dir", str(tmp_path / "run"), *settings(tree))
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.strip().splitlines()
    assert "Annotations/wrong.xml" in line
    assert "outside its image of 60 x 40" in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"evaluation": {"sources": ["pixels"]}}, "evaluation.sources"),
        ({"model": {"backbone": "small_cnn"}}, "model.backbone"),
        ({"evaluation": {"detection": {"batch_size": 1}}}, "evaluation.detection.batch_size 1"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(changes: dict[str, Any], expected: str) -> None:
    stage = SimpleNamespace(
        config=ExperimentConfig.model_validate(changes), world=SimpleNamespace(size=2), together=lambda check: check()
    )
    with pytest.raises(UserError, match=expected):
        _refuse(cast(Stage, stage))


@pytest.mark.parametrize(
    ("detection", "expected"),
    [({"steps": [5, 3]}, "must rise"), ({"classes": ["cat", "cat"]}, "twice"), ({"iteration": 3}, "iteration")],
)
def test_wrong_settings_are_refused(detection: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ExperimentConfig.model_validate({"evaluation": {"detection": detection}})


class StubStage:
    """What `_train` asks of a stage: one rank, told to stop after `stop_after` iterations."""

    def __init__(self, group: Group, directory: Path, config: ExperimentConfig, stop_after: int) -> None:
        self.world, self.directory, self.config = group, directory, config
        self.log = RunLog(is_main=True)
        self.left = stop_after

    def together(self, load: Callable[[], Any]) -> Any:
        return load()

    on_rank_0 = together

    def check_together(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stopped("a test")


def _train_with_stops(group: Group, directory: str, tree: str, stops: list[int], rate: float) -> tuple[str, Any]:
    detection = {"iterations": 4, "steps": [2], "warmup_iterations": 1, "batch_size": 2, "regions_per_image": 4}
    detection |= {"train_short_sides": [64], "classes": ["cat", "dog"], "statistics_iterations": 1}
    config = ExperimentConfig.model_validate(
        {
            "model": {"backbone": "resnet18", "stem": "imagenet"},
            "data": {"num_workers": 0},
            "evaluation": {"sources": ["random"], "detection": {**detection, "learning_rate": rate}},
        }
    )
    data = open_voc(Path(tree), ["VOC2007/train"], ["cat", "dog"])
    said = io.StringIO()
    for stop_after in stops:
        stage = cast(Stage, StubStage(group, Path(directory), config, stop_after))
        training, _, digest = _build(stage, "random")
        with contextlib.redirect_stdout(said), contextlib.suppress(Stopped):
            workload = Workload(stage.log.say, "detection", [4])
            _train(stage, "random", training, data, _bound(stage, "random", digest, data), workload)
    return said.getvalue(), training.model.state_dict()


def _build_from_weights(group: Group, path: str) -> tuple[Any, Any, int | None]:
    config = ExperimentConfig.model_validate(
        {
            "model": {"backbone": "resnet18", "stem": "imagenet"},
            "evaluation": {"sources": ["weights"], "weights": path},
        }
    )
    training, epoch, _ = _build(cast(Stage, StubStage(group, Path(path).parent, config, 99)), "weights")
    model = training.model
    return model.c4.state_dict(), model.roi_heads.box_head.layer4.state_dict(), epoch


def test_a_weights_file_is_what_the_detector_starts_from(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    ((c4, layer4, epoch),) = run_ranks(_build_from_weights, 1, str(tmp_path / "resnet18.pth"))
    assert epoch is None
    found = {**c4, **{f"layer4.{name}": value for name, value in layer4.items()}}
    assert set(found) == {name for name in state if not name.startswith("fc.")}
    assert all(torch.equal(value, state[name]) for name, value in found.items())


def _stories(group: Group, folder: str, tree: str) -> list[tuple[str, Any]]:
    stories = [("whole", [99], 0.01), ("parts", [1, 2, 99, 99], 0.01), ("parts", [1], 0.02)]
    for name, _, _ in stories:
        (Path(folder) / name).mkdir(exist_ok=True)
    return [_train_with_stops(group, f"{folder}/{name}", tree, stops, rate) for name, stops, rate in stories]


@pytest.mark.full
def test_a_stopped_training_goes_on_to_the_same_bits_and_never_from_another_recipe(tmp_path: Path) -> None:
    (((said_whole, whole), (said_parts, parts), (said_other, _)),) = run_ranks(
        _stories, 1, str(tmp_path), str(make_tree(tmp_path / "voc"))
    )
    assert "goes on" not in said_whole
    assert [f"resumes at iteration {done}" in said_parts for done in (1, 2, 3, 4)] == [True, False, True, True]
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert "another backbone, recipe or images: training starts again" in said_other
