"""The picture of the views shows what a training gets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import main_of

from instance_ssl.config.experiment import load_config
from instance_ssl.data.datasets import open_source
from instance_ssl.data.loaders import view_loader
from instance_ssl.data.sampler import BatchKeys
from instance_ssl.data.view_grid import pixels_of, view_grid
from instance_ssl.run.build import training_views
from instance_ssl.run.console import printable
from instance_ssl.training.step import flatten_views

main = main_of("show_views")
CONFIG = Path(__file__).parents[2] / "runners/configs/pipeline_cifar10_resnet18.yaml"
SIZE, NAMES = 96, ("a\nb.png", "b語.png", "c.png", "d.png")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    noise = np.random.RandomState(0)
    (tmp_path / "images").mkdir()
    for name in NAMES:
        Image.fromarray(noise.randint(0, 256, (120, 90, 3), np.uint8)).save(tmp_path / "images" / name)
    data = ["data.kind=folder", f"data.root={tmp_path}/images", f"data.image_size={SIZE}"]
    return ["--config", str(CONFIG), "--set", *data, "--out", str(tmp_path / "views.png")]


@pytest.mark.parametrize("augment_on", ["cpu", "device"])
def test_views_are_those_of_the_training(words: list[str], augment_on: str, tmp_path: Path) -> None:
    chosen = f"data.augment_on={augment_on}"
    assert main([*words, "--set", chosen, "--images", "2", "--epoch", "3"]) == 0
    config = load_config(CONFIG, [*words[3:6], chosen])
    source = open_source("folder", "train", root=tmp_path / "images", list_file=None, limit=None)
    [batch] = view_loader(training_views(config, source), BatchKeys([[0, 2]], epoch=3), num_workers=1)
    images, ids = flatten_views(batch, torch.device("cpu"))
    assert ids.tolist() == [0, 2, 0, 2]
    with Image.open(tmp_path / "views.png") as picture:
        row = SIZE + 22
        assert picture.size == (3 * (SIZE + 4) + 4, 2 * row + 4)
        for place, view in enumerate(images):
            left, top = 4 + (1 + place // 2) * (SIZE + 4), 4 + place % 2 * row
            tile = picture.crop((left, top, left + SIZE, top + SIZE))
            assert np.array_equal(np.asarray(tile), np.asarray(pixels_of(view)))


def test_names_are_said_whatever_is_in_them(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--images", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["0: a\\nb.png", "1: b語.png", "2: c.png", "3: d.png"]
    assert printable("b語.png", "ascii") == "b\\u8a9e.png"


@pytest.mark.parametrize("wrong", [["--images", "5"], ["--images", "0"], ["--epoch", "-1"], ["--out", "/absent/v"]])
def test_mistakes_are_one_line(words: list[str], wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--images", "4", *wrong]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {wrong[0]}")
    assert said.count("\n") == 1


def test_small_images_are_enlarged_whole() -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    grid = view_grid([image], torch.zeros(1, 1, 3, 4, 4), ["one"])
    assert np.array_equal(np.asarray(grid.crop((4, 4, 100, 100)))[::24, ::24], np.asarray(image))
