"""Lists that have changed: known images are found by name, and chosen ones are taken with all that belongs to them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded
from PIL import Image

from instance_ssl.data.datasets import open_source
from instance_ssl.data.folders import missing_here
from instance_ssl.data.image_sources import EncodedImages, FileImages
from instance_ssl.data.list_changes import places_of, taken


def folder_of(folder: Path, names: list[str]) -> FileImages:
    """Images of different sizes in bytes."""
    folder.mkdir(exist_ok=True)
    for name in names:
        if not (folder / name).exists():
            Image.new("L", (ord(name[0]), 3)).save(folder / name)
    source = open_source("folder", "train", root=folder, list_file=None, limit=None)
    assert isinstance(source, FileImages)
    return source


def test_every_known_name_is_found_and_no_other() -> None:
    known, listed = ["b", "x\n", "c", "\udcff", "a"], ["a", "c", "d", "\udcff", "b"]
    assert places_of(known, listed).tolist() == [4, -1, 1, 3, 0]
    assert places_of([], listed).tolist() == []
    assert places_of(known, []).tolist() == [-1] * 5


def test_names_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instance_ssl.data.list_changes.hashes_of", lambda names: np.zeros(len(names), np.int64))
    assert places_of(["b", "x", "a"], ["a", "c", "b"]).tolist() == [2, -1, 0]


def test_images_are_taken_in_any_order(tmp_path: Path) -> None:
    before = folder_of(tmp_path / "images", ["b.png", "d.png", "f.png"])
    (tmp_path / "images/d.png").unlink()
    now = folder_of(tmp_path / "images", ["a.png", "e.png", "z.png"])
    assert list(now.names) == ["a.png", "b.png", "e.png", "f.png", "z.png"]
    after = taken(now, np.array([1, 3, 0, 2, 4]))
    assert list(after.names) == ["b.png", "f.png", "a.png", "e.png", "z.png"]
    assert [after.load(index).width for index in range(5)] == [ord(name) for name in "bfaez"]
    assert after.digest not in (before.digest, now.digest)
    assert taken(after, np.array([2, 0, 3, 1, 4])).digest == now.digest
    assert missing_here(after.probes()) is None


def test_images_that_are_held_out_stay_so(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "images", ["a.png", "b.png", "c.png", "d.png"])
    source.held_out = torch.tensor([0, 3])
    after = taken(source, np.array([3, 1, 0]))
    assert after.held_out is not None
    assert after.held_out.tolist() == [0, 2]


def test_labels_go_with_their_images(tmp_path: Path) -> None:
    for name in ("train/x/1.png", "train/y/2.png", "val/x/1.png", "val/y/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    before = open_source("tree", "train", root=tmp_path, list_file=None, limit=None)
    Image.new("L", (4, 4)).save(tmp_path / "train/x/3.png")
    now = open_source("tree", "train", root=tmp_path, list_file=None, limit=None)
    after = taken(now, np.append(places_of(before.names, now.names), 1))
    assert after.labels is not None
    assert after.labels.tolist() == [0, 1, 0]


def write_tar(path: Path, numbers: range) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            content = encoded(number)
            member = tarfile.TarInfo(f"{number:03d}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_images_of_a_shard_that_comes_first_are_put_behind(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", range(3))
    before = open_source("tar", "train", root=tmp_path, list_file=None, limit=None)
    assert isinstance(before, EncodedImages)
    names = list(before.names)
    write_tar(tmp_path / "a.tar", range(10, 12))
    now = open_source("tar", "train", root=tmp_path, list_file=None, limit=None)
    assert list(now.names) == ["010.jpg", "011.jpg", *names]
    after = taken(now, np.append(places_of(names, now.names), [0, 1]))
    assert isinstance(after, EncodedImages)
    assert [after.read(index) for index in range(5)] == [encoded(number) for number in (0, 1, 2, 10, 11)]
    assert "a.tar" in after.where(3)
    assert taken(after, np.arange(3)).digest == before.digest
