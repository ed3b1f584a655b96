"""Folders that are labels: which ones are found, what they are read as, and the part that evaluations hold out."""

import os
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded

from instance_ssl.data.datasets import open_source
from instance_ssl.data.folders import find_layout
from instance_ssl.data.held_out import split_by_class
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.errors import UserError


def folder_of(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    return root


def opened(root: Path, kind: str = "class_folders", split: str = "train") -> ImageSource:
    return open_source(kind, split, root=root, list_file=None, limit=None)


@pytest.mark.parametrize(
    ("names", "kind", "why"),
    [
        (["cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "dog/b.jpg"], "class_folders", "the images lie in 2 class folders"),
        (
            ["cat/x/a.jpg", "cat/y/b.jpg", "dog/a.jpg", "dog/b.jpg"],
            "class_folders",
            "the images lie in 2 class folders",
        ),
        (["train/c/a.jpg", "train/d/a.jpg", "val/c/a.jpg", "val/d/a.jpg"], "tree", "train and val hold the same 2"),
        (["train/c/a.jpg", "train/d/a.jpg", "test/c/a.jpg", "test/d/a.jpg"], "tree", "train and test hold the same 2"),
        (["train/c/a.jpg", "train/d/a.jpg", "val/c/a.jpg", "val/e/a.jpg"], "folder", "hold different class folders"),
        (["train/c/a.jpg", "train/d/a.jpg", "val/a.jpg", "val/b.jpg"], "folder", "hold different class folders"),
        (["train/a.jpg", "train/b.jpg", "test/a.jpg", "test/b.jpg"], "folder", "there are no class folders"),
        (["a.jpg", "b.jpg"], "folder", "a.jpg lies in no class folder"),
        (["cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "dog/b.jpg", "z.jpg"], "folder", "z.jpg lies in no class folder"),
        (["cat/a.jpg", "cat/b.jpg"], "folder", "all images lie in one folder, cat"),
        (["cat/a.jpg", "dog/a.jpg", "emu/a.jpg"], "folder", "the 3 folders hold an image each"),
        (["cat/a.jpg", "cat/b.jpg", "dog/a.jpg"], "folder", "hold an image each, which leaves none to hold out"),
        ([], "folder", "there are no class folders"),
    ],
)
def test_folders_are_labels_or_the_reason_why_not_is_given(
    tmp_path: Path, names: list[str], kind: str, why: str
) -> None:
    found, reason = find_layout(folder_of(tmp_path, *names))
    assert found == kind, reason
    assert why in reason


def test_runs_hidden_folders_and_empty_ones_are_no_classes(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "cat/a.jpg", "cat/b.jpg", ".hidden/a.jpg", ".hidden/b.jpg", "run/a.jpg", "run/b.jpg")
    for name in ("instances.txt", "data.json"):
        (root / "run" / name).write_text("")
    (root / "empty").mkdir()
    assert find_layout(root)[1] == "no labels: all images lie in one folder, cat"


def test_odd_names_are_escaped(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\n\x1b[31m\xff b")
    assert "a\\n\\x1b[31m\\udcff b" in find_layout(folder_of(tmp_path, f"{name}/1.jpg", f"{name}/2.jpg"))[1]


def test_the_first_folder_on_the_way_to_an_image_is_its_class(tmp_path: Path) -> None:
    source = opened(folder_of(tmp_path, "b/1.jpg", "b c/1.jpg", "b/x/y.jpg", "a\n/2.jpg", "b c/0.jpg"))
    assert source.class_names == ["a\n", "b", "b c"]
    assert source.labels is not None
    by_name = dict(zip(source.names, source.labels.tolist(), strict=True))
    assert by_name == {"a\n/2.jpg": 0, "b/1.jpg": 1, "b/x/y.jpg": 1, "b c/1.jpg": 2, "b c/0.jpg": 2}
    assert list(source.names) == list(opened(tmp_path, "folder").names)


def test_an_image_beside_the_class_folders_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loose\.jpg lies in no class folder; move it into one, or set data.kind"):
        opened(folder_of(tmp_path, "a/1.jpg", "b/1.jpg", "loose.jpg"))


def test_there_is_no_test_split_to_open(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no test split of its own"):
        opened(folder_of(tmp_path, "a/1.jpg", "b/1.jpg"), split="test")


def test_a_fifth_of_each_class_is_held_out_and_never_all(tmp_path: Path) -> None:
    sizes = {"a": 1, "b": 2, "c": 5, "d": 14}
    source = opened(folder_of(tmp_path, *(f"{name}/{i}.jpg" for name, size in sizes.items() for i in range(size))))
    train, test = split_by_class(source, seed=0)
    assert set(train.names) | set(test.names) == set(source.names)
    assert not set(train.names) & set(test.names)
    assert train.labels is not None
    assert test.labels is not None
    assert np.bincount(test.labels, minlength=4).tolist() == [0, 1, 1, 2]
    assert np.bincount(train.labels, minlength=4).tolist() == [1, 1, 4, 12]
    assert train.class_names == test.class_names == source.class_names
    for part in (train, test):
        assert part.labels is not None
        for index, name in enumerate(part.names):
            assert part.class_names is not None
            assert name.startswith(part.class_names[part.labels[index]])
            assert part.load(index).size == (8, 8)
    again, other = split_by_class(source, seed=0)[1], split_by_class(source, seed=1)[1]
    assert list(again.names) == list(test.names)
    assert list(other.names) != list(test.names)
