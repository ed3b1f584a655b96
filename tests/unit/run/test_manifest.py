"""What a run directory says of its images, and what is refused when the list has changed."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from instance_ssl.config.data import DataConfig
from instance_ssl.data.datasets import open_source
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.errors import UserError
from instance_ssl.run import manifest

NAMES = ["a\nb.png", "back\\nslash.png", "c\udcff.png"]


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run directory beside its images, with an initialised classifier."""
    (tmp_path / "images").mkdir()
    for number, name in enumerate(NAMES):
        Image.new("L", (2 + 9 * number, 3)).save(tmp_path / "images" / name)
    manifest._write(opened(tmp_path), tmp_path / "run")
    (tmp_path / "run/initialize_classifier/checkpoints/step_000000000").mkdir(parents=True)
    (tmp_path / "run/initialize_classifier/checkpoints/step_000000000/MANIFEST.json").write_text("{}")
    return tmp_path


def opened(place: Path) -> ImageSource:
    return open_source("folder", "train", root=place / "images", list_file=None, limit=None)


def arranged(place: Path, **data: bool) -> ImageSource:
    return manifest.as_known(place / "run", DataConfig(**data))(opened(place))


def test_any_names_are_known_again(begun: Path) -> None:
    os.rename(begun / "images" / NAMES[2], begun / "images/kept")
    with pytest.raises(UserError, match=r"c\\udcff\.png has gone"):
        arranged(begun)
    os.rename(begun / "images/kept", begun / "images" / NAMES[2])
    Image.new("L", (40, 3)).save(begun / "images/0.png")
    images = arranged(begun)
    assert list(images.names) == [*NAMES, "0.png"]
    assert [images.load(index).width for index in range(4)] == [2, 11, 20, 40]


def test_a_file_of_another_size_is_named(begun: Path) -> None:
    with (begun / "images" / NAMES[0]).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"a\\nb.png has another size"):
        arranged(begun, allow_lost=True)


def test_images_do_not_come_before_there_is_a_classifier(begun: Path) -> None:
    Image.new("L", (40, 3)).save(begun / "images/0.png")
    (begun / "run/initialize_classifier/checkpoints/step_000000000/MANIFEST.json").unlink()
    (begun / "run/initialize_classifier/checkpoints/step_000000000").rmdir()
    with pytest.raises(UserError, match=r"0\.png has come, and there is no classifier yet"):
        arranged(begun)


@pytest.mark.parametrize("name", ["data.json", "instances.txt", "instance_sizes.npy"])
def test_a_damaged_record_is_said(begun: Path, name: str) -> None:
    Image.new("L", (40, 3)).save(begun / "images/0.png")
    path = begun / "run" / name
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError, match=f"{name} (is damaged.*|has 2 names of 3): restore it"):
        arranged(begun)


def test_a_run_from_before_there_were_sizes_refuses_any_change(begun: Path) -> None:
    (begun / "run/instance_sizes.npy").unlink()
    assert list(arranged(begun).names) == NAMES
    Image.new("L", (40, 3)).save(begun / "images/0.png")
    with pytest.raises(UserError, match=r"data\.json has another digest"):
        arranged(begun)


def test_growth_is_written_down_once(begun: Path) -> None:
    Image.new("L", (40, 3)).save(begun / "images/0.png")
    for _ in range(2):
        manifest._write(arranged(begun), begun / "run")
    changes = [json.loads(line) for line in (begun / "run/data_changes.jsonl").read_text().splitlines()]
    assert [(change["before"]["num_instances"], change["now"]["num_instances"]) for change in changes] == [(3, 4)]
    assert (begun / "run/instances.txt").read_bytes().count(b"\n") == 4
