"""A folder given that is not the one meant: a level too deep or too high, a file, or relative to somewhere else."""

from pathlib import Path

import pytest

from instance_ssl.config.data import DataConfig
from instance_ssl.errors import UserError
from instance_ssl.evaluation.detection.voc import open_voc
from instance_ssl.run.images import open_split

LAYOUTS = {
    "tree": ["train/cat/1.png", "val/cat/2.png"],
    "sun397": ["SUN397/ClassName.txt"],
    "dtd": ["dtd/dtd/labels/train1.txt", "dtd/dtd/images/a.jpg"],
    "inaturalist2018": ["train2018.json", "train_val2018/Aves/1.jpg"],
}


def error_of(kind: str, root: str | Path, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        open_split(DataConfig(kind=kind, root=root), split)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("tree", "set/train"),
        ("tree", "set/val"),
        ("tree", "set/train/cat"),
        ("tree", "."),
        ("sun397", "set/SUN397"),
        ("sun397", "."),
        ("dtd", "set/dtd"),
        ("dtd", "set/dtd/dtd"),
        ("inaturalist2018", "set/train_val2018"),
        ("inaturalist2018", "set/train_val2018/Aves"),
    ],
)
def test_a_level_too_deep_or_too_high_names_the_folder_that_is_meant(tmp_path: Path, kind: str, given: str) -> None:
    for name in LAYOUTS[kind]:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    assert f"but {tmp_path}/set has one: give that folder" in error_of(kind, tmp_path / given)


def test_shards_of_a_split_beside_the_root_are_named(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").touch()
    assert f"holds no test shard, but {tmp_path} does" in error_of("tar", tmp_path / "train", "test")
    (tmp_path / "empty").mkdir()
    assert f"holds no train shard, but {tmp_path} does" in error_of("tar", tmp_path / "empty")


def test_cifar_s_own_folder_is_not_its_root(tmp_path: Path) -> None:
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    assert "give the folder that holds cifar-10-batches-py" in error_of("cifar10", root)
    assert list(root.iterdir()) == []  # nothing is downloaded into it


def test_voc_s_year_is_not_its_root(tmp_path: Path) -> None:
    (tmp_path / "VOC2007/ImageSets/Main").mkdir(parents=True)
    with pytest.raises(UserError, match="give the folder that holds VOC2007, which is its parent"):
        open_voc(tmp_path / "VOC2007", ["VOC2007/trainval"], ["cat"])


@pytest.mark.parametrize("kind", ["tree", "folder", "tar", "dtd"])
def test_a_relative_root_is_told_with_the_one_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"data.root images (tried {tmp_path}/images) is not a folder" in error_of(kind, "images")


def test_a_relative_list_and_voc_folder_are_told_with_the_one_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"data.list_file my.txt .tried {tmp_path}/my.txt. cannot be read"):
        open_split(DataConfig(kind="list", list_file=Path("my.txt")), "train")
    with pytest.raises(UserError, match=f"evaluation.detection.root voc .tried {tmp_path}/voc. is not a folder"):
        open_voc(Path("voc"), ["VOC2007/trainval"], ["cat"])
    with pytest.raises(UserError, match="root is not set"):
        open_voc(None, ["VOC2007/trainval"], ["cat"])


@pytest.mark.parametrize(
    ("name", "key"), [("a.tar", "data.shards"), ("a.txt", "data.list_file"), ("a.jpg", "holds it")]
)
def test_a_file_given_as_the_root_is_said_to_be_one(tmp_path: Path, name: str, key: str) -> None:
    (tmp_path / name).touch()
    message = error_of("folder", tmp_path / name)
    assert "is a file: give the folder that holds it" in message
    assert key in message
