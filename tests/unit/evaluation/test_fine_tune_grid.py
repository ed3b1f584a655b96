"""SimCLR's grid, what it is compared on, and which point is taken."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.data.image_sources import ArrayImages
from instance_ssl.errors import UserError
from instance_ssl.evaluation.frozen_encoder import LabelledImages
from instance_ssl.stages import evaluate_fine_tune

STAGE: Any = SimpleNamespace(config=ExperimentConfig())


def images() -> LabelledImages:
    labels = torch.arange(200) % 4
    source = ArrayImages(np.zeros((200, 2, 2, 3), np.uint8), [f"{i}" for i in range(200)], labels, list("abcd"))
    return LabelledImages(source, source, labels, labels, 4)


def test_the_held_out_part_is_the_data_sets_own_or_as_many_of_each_class() -> None:
    labelled = images()
    fitted, held_out = evaluate_fine_tune._split(STAGE, labelled)
    assert labelled.train_labels[held_out.ids].bincount().tolist() == [5, 5, 5, 5]
    assert sorted([*fitted.ids.tolist(), *held_out.ids.tolist()]) == list(range(200))
    labelled.train.held_out = torch.tensor([3, 50, 199])
    fitted, held_out = evaluate_fine_tune._split(STAGE, labelled)
    assert held_out.ids.tolist() == [3, 50, 199]
    assert sorted([*fitted.ids.tolist(), 3, 50, 199]) == list(range(200))


def test_the_grid_has_every_pair_and_decay_is_divided_by_the_rate() -> None:
    grid = evaluate_fine_tune._grid(STAGE, "trained")
    assert len(grid) == 7 * 8
    assert (grid[0].classifier_learning_rate, grid[0].weight_decay) == (1e-4, 0)
    assert (grid[1].backbone_learning_rate, grid[1].weight_decay) == (1e-4, pytest.approx(1e-2))
    assert (grid[-1].backbone_learning_rate, grid[-1].weight_decay) == (0.1, pytest.approx(1e-2))
    assert {options.steps for options in grid} == {20_000}
    assert {options.steps for options in evaluate_fine_tune._grid(STAGE, "random")} == {40_000}


def test_the_best_point_is_the_first_of_equals_and_diverged_ones_never() -> None:
    points = [{"held_out_top1": value} for value in (None, 0.0, 7.0, 7.0)]
    assert evaluate_fine_tune._best(points, "top1") == 2
    assert evaluate_fine_tune._best(points[:2], "top1") == 1
    with pytest.raises(UserError, match="every point"):
        evaluate_fine_tune._best(points[:1], "top1")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {},
            ["fine-tuning (trained): 57 trainings, 1,140,000 steps in all", "540 images 9,481 times; --set evaluation"],
        ),
        ({"learning_rates": [0.1], "weight_decays": [0]}, ["1 training, 20,000 steps", "preset=small"]),
        ({"preset": "small"}, ["4 trainings, 2,000 steps in all"]),
        ({"steps": 1000}, ["57 trainings, 57,000 steps"]),
    ],
)
def test_the_total_is_said_first_and_the_preset_where_the_set_is_small(
    settings: dict[str, Any], expected: list[str]
) -> None:
    said: list[str] = []
    config = ExperimentConfig.model_validate({"evaluation": {"fine_tune": settings}})
    stage: Any = SimpleNamespace(config=config, log=SimpleNamespace(say=said.append))
    evaluate_fine_tune._announce(stage, {"trained": evaluate_fine_tune._grid(stage, "trained")}, 540)
    assert len(said) == len(expected)
    assert all(text in line for text, line in zip(expected, said, strict=True))
