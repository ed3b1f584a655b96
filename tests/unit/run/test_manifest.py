"""What a run directory says of its images, and what is refused when the list has changed."""

import os
from pathlib import Path

import pytest
from PIL import Image

from instance_ssl.config.data import DataConfig
from instance_ssl.data.datasets import open_source
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.errors import UserError
from instance_ssl.run import manifest
from instance_ssl.run.broken_record import Broken, append_broken, left_out_path

NAMES = ["a\nb.png", "back\\nslash.png", "c\udcff.png"]


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run directory beside its images, with an initialised classifier."""
    (tmp_path / "images").mkdir()
    for number, name in enumerate(NAMES):
        Image.new("L", (2 + 9 * number, 3)).save(tmp_path / "images" / name)
    manifest.write_manifest(opened(tmp_path), tmp_path / "run")
    (tmp_path / "run/initialize_classifier/checkpoints/step_000000000").mkdir(parents=True)
    (tmp_path / "run/initialize_classifier/checkpoints/step_000000000/MANIFEST.json").write_text("{}")
    return tmp_path


def opened(place: Path) -> ImageSource:
    return open_source("folder", "train", root=place / "images", list_file=None, limit=None)


def arranged(place: Path, stage: str = "pretrain", **data: bool) -> ImageSource:
    return manifest.as_known(place / "run", DataConfig(**data), [stage])(opened(place))


def add_image(place: Path, name: str = "0.png") -> None:
    Image.new("L", (40, 3)).save(place / "images" / name)


def test_any_names_are_known_again(begun: Path) -> None:
    os.rename(begun / "images" / NAMES[2], begun / "images/kept")
    with pytest.raises(UserError, match=r"c\\udcff\.png has gone"):
        arranged(begun)
    os.rename(begun / "images/kept", begun / "images" / NAMES[2])
    add_image(begun)
    images = arranged(begun)
    assert list(images.names) == [*NAMES, "0.png"]
    assert [images.load(index).width for index in range(4)] == [2, 11, 20, 40]


def test_a_file_of_another_size_is_named(begun: Path) -> None:
    with (begun / "images" / NAMES[0]).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"a\\nb.png has another size"):
        arranged(begun, allow_lost=True)


@pytest.mark.parametrize("stage", ["evaluate_knn", "initialize_classifier", "export"])
def test_only_stages_that_update_the_run_take_new_images(begun: Path, stage: str) -> None:
    add_image(begun)
    with pytest.raises(UserError, match=r"0\.png has come, and only .*runners/update_images\.py add them"):
        arranged(begun, stage)


def test_a_list_is_free_before_there_is_a_classifier(begun: Path) -> None:
    add_image(begun)
    (begun / "run/initialize_classifier/checkpoints/step_000000000/MANIFEST.json").unlink()
    (begun / "run/initialize_classifier/checkpoints/step_000000000").rmdir()
    assert list(arranged(begun, "initialize_classifier").names) == [*NAMES, "0.png"]
    with pytest.raises(UserError, match=r"0\.png has come, and the classifier is not initialised"):
        arranged(begun)


def test_lost_images_have_no_id_any_more_and_the_others_keep_their_order(begun: Path) -> None:
    os.remove(begun / "images" / NAMES[0])
    add_image(begun)
    with pytest.raises(UserError, match=r"a\\nb\.png has gone.*data\.allow_lost"):
        arranged(begun)
    assert list(arranged(begun, allow_lost=True).names) == [*NAMES[1:], "0.png"]


def test_broken_images_lose_their_ids_when_the_run_is_updated_and_repaired_ones_are_new(begun: Path) -> None:
    size = (begun / "images" / NAMES[1]).stat().st_size
    append_broken(begun / "run", {NAMES[1]: Broken(size, "cut short"), "gone.png": Broken(3, "gone")})
    assert list(arranged(begun).names) == NAMES  # nothing has changed: a training goes on
    assert list(arranged(begun, "evaluate_knn").names) == NAMES
    updated = arranged(begun, "update_images")
    assert list(updated.names) == [NAMES[0], NAMES[2]]
    assert updated.left_out == ["back\\\\nslash.png: cut short"]
    add_image(begun)
    assert list(arranged(begun).names) == [NAMES[0], NAMES[2], "0.png"]  # a training updates the list, and drops it too
    with (begun / "images" / NAMES[1]).open("ab") as file:
        file.write(b"\0")
    assert list(arranged(begun).names) == [NAMES[0], NAMES[2], "0.png", NAMES[1]]


def test_a_broken_image_that_has_lost_its_id_is_not_a_new_one(begun: Path) -> None:
    size = (begun / "images" / NAMES[1]).stat().st_size
    append_broken(begun / "run", {NAMES[1]: Broken(size, "cut short")})
    manifest.write_manifest(arranged(begun, "update_images"), begun / "run")
    for stage in ("pretrain", "evaluate_knn", "update_images"):
        assert list(arranged(begun, stage).names) == [NAMES[0], NAMES[2]]


def test_what_an_earlier_version_left_out_is_dropped_by_the_next_training(begun: Path) -> None:
    left_out_path(begun / "run").write_text("2\t5\tcannot decode it\tc.png\n")
    assert list(arranged(begun).names) == NAMES[:2]
    assert list(arranged(begun, "evaluate_knn").names) == NAMES


@pytest.mark.parametrize("name", ["data.json", "instances.txt", "instance_sizes.npy"])
def test_a_damaged_record_is_said(begun: Path, name: str) -> None:
    add_image(begun)
    path = begun / "run" / name
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError, match=f"{name} (is damaged.*|has 2 names of 3): restore it"):
        arranged(begun)


def test_a_run_from_before_there_were_sizes_refuses_any_change(begun: Path) -> None:
    (begun / "run/instance_sizes.npy").unlink()
    assert list(arranged(begun).names) == NAMES
    add_image(begun)
    with pytest.raises(UserError, match=r"data\.json has another digest"):
        arranged(begun)
