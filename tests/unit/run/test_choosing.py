"""What the rules of `auto` are given, and the micro-batch by the planner's memory."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from instance_ssl.config.deepspeed import read_ds_file
from instance_ssl.config.draft import load_draft
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.data.image_sources import ArrayImages, FileImages
from instance_ssl.errors import RankError
from instance_ssl.run.choosing import _short_side, choose_micro_batch, completed_here, largest_fitting, view_flops
from instance_ssl.run.plan_request import PlanRequest
from instance_ssl.run.planner import Planner

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).parents[3]


def config_of(image_size: int = 16, **optimization: int) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "data": {"image_size": image_size},
            "model": {"backbone": "small_cnn", "embedding_dim": 8},
            "classifier": {"num_hard_classes": 5},
            "optimization": optimization,
        }
    )


@pytest.fixture
def request_for(tmp_path: Path) -> PlanRequest:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto"}))
    return PlanRequest(config_of(global_batch_size=96), read_ds_file(path), num_instances=500, world_size=2)


@pytest.mark.parametrize("sizes", [[1], [1, 7], [1, 2, 3, 4, 6, 8, 12, 16, 24, 48], list(range(1, 14))])
def test_the_largest_size_that_fits_is_found(sizes: list[int]) -> None:
    asked: list[int] = []

    def peak(size: int) -> int:
        asked.append(size)
        return 10 * size

    for limit in range(10 * sizes[-1] + 11):
        asked.clear()
        expected = max((size for size in sizes if 10 * size <= limit), default=sizes[0])
        assert largest_fitting(sizes, peak, limit) == (expected, 10 * expected)
        assert len(asked) == len(set(asked)) <= 1 + len(sizes).bit_length()


def test_the_planner_decides_to_the_byte(request_for: PlanRequest) -> None:
    """Of a part of 4 images a rank."""
    request = replace(request_for, config=config_of(global_batch_size=8))
    needed = Planner(replace(request, micro_batch_size=4), GPU).training(2).plan("sharded").peak
    assert choose_micro_batch(request, GPU, needed).value == 4
    assert choose_micro_batch(request, GPU, needed - 1).value == 2


@pytest.mark.full
def test_without_enough_memory_one_image_is_tried_and_it_is_said(request_for: PlanRequest) -> None:
    choice = choose_micro_batch(request_for, GPU, 0)
    assert choice.value == 1
    assert "too much, but there is no smaller one" in choice.reason


def test_a_cpu_gets_no_more_than_is_fast(request_for: PlanRequest) -> None:
    plenty = 2**50
    large = replace(request_for, config=config_of(global_batch_size=4096), num_instances=5000)
    assert choose_micro_batch(large, CPU, plenty).value == 64
    assert choose_micro_batch(large, GPU, plenty).value == 2048


def test_a_view_is_counted_as_the_network_computes_it() -> None:
    assert 3.9 < view_flops(config_of(32)) / view_flops(config_of(16)) <= 4


def test_the_short_side_is_that_of_a_typical_image(tmp_path: Path) -> None:
    for number, size in enumerate([(400, 30), (40, 500), (40, 40), (60, 80), (1000, 1000)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    names = [f"{number}.png" for number in range(5)]
    source = FileImages(tmp_path, names, None, None)
    assert _short_side(source) == 40
    for name in names[:4]:  # breaks after it was opened
        (tmp_path / name).write_bytes(b"")
    assert _short_side(source) == 1000
    (tmp_path / names[4]).write_bytes(b"")
    with pytest.raises(RankError, match=r"4\.png"):
        _short_side(source)


def test_a_tool_outside_a_run_chooses_as_a_run_on_one_rank_would(capsys: pytest.CaptureFixture[str]) -> None:
    source = ArrayImages(np.zeros((20, 40, 33, 3), np.uint8), [str(number) for number in range(20)], None, None)
    draft = load_draft(ROOT / "runners/configs/pipeline_folder.yaml", ["data.kind=folder", "model.backbone=small_cnn"])
    config = completed_here(draft, source)
    assert config.data.image_size == 32
    assert config.optimization.global_batch_size == 4
    assert "auto: data.image_size = 32 (short sides are about 33 px" in capsys.readouterr().out
