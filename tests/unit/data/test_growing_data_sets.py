"""Lists that have changed: every image keeps its id; and steps go on being counted where epochs become longer."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded
from PIL import Image

from instance_ssl.data.datasets import open_source
from instance_ssl.data.folders import missing_here
from instance_ssl.data.image_sources import EncodedImages, FileImages
from instance_ssl.data.list_changes import digest_of_first, places_of, rearranged
from instance_ssl.training.schedules import EpochClock


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
    import instance_ssl.data.list_changes as rearrangement

    monkeypatch.setattr(rearrangement, "_hashes", lambda names: np.zeros(len(names), np.int64))
    assert places_of(["b", "x", "a"], ["a", "c", "b"]).tolist() == [2, -1, 0]


def test_images_keep_their_ids_and_new_ones_come_behind(tmp_path: Path) -> None:
    before = folder_of(tmp_path / "images", ["b.png", "d.png", "f.png"])
    sizes, names = before.columns["sizes"].copy(), list(before.names)
    (tmp_path / "images/d.png").unlink()
    now = folder_of(tmp_path / "images", ["a.png", "e.png", "z.png"])
    assert list(now.names) == ["a.png", "b.png", "e.png", "f.png", "z.png"]
    after = rearranged(now, names, sizes, places_of(names, now.names), {1: "gone"})
    assert list(after.names) == ["b.png", "d.png", "f.png", "a.png", "e.png", "z.png"]
    assert [after.load(index).width for index in (0, 2, 3, 4, 5)] == [ord(name) for name in "bfaez"]
    assert digest_of_first(after, 3) == before.digest
    assert digest_of_first(after, 6) == after.digest
    assert after.digest not in (before.digest, now.digest)
    assert missing_here(after.probes()) is None
    assert dict(after.absent) == {1: "gone"}


def test_labels_go_with_their_images(tmp_path: Path) -> None:
    for name in ("train/x/1.png", "train/y/2.png", "val/x/1.png", "val/y/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    before = open_source("tree", "train", root=tmp_path, list_file=None, limit=None)
    Image.new("L", (4, 4)).save(tmp_path / "train/x/3.png")
    now = open_source("tree", "train", root=tmp_path, list_file=None, limit=None)
    names = list(before.names)
    after = rearranged(now, names, before.columns["sizes"], places_of(names, now.names), {})
    assert after.labels is not None
    assert after.labels.tolist() == [0, 1, 0]


def test_one_length_of_epoch_is_plain_division() -> None:
    clock = EpochClock(((0, 0, 5),))
    for step in range(-1, 16):
        assert clock.place(step) == divmod(step, 5)
        assert clock.scheduled(step) == step
        if step >= 0:
            assert clock.done(step) == divmod(step, 5)
    assert clock.total_steps(3) == 15


def test_epochs_that_become_longer_go_on_from_where_they_are() -> None:
    clock = EpochClock(((0, 0, 5),)).longer(10, 6)
    assert clock.total_steps(3) == 16
    assert [clock.place(step) for step in (4, 9, 10, 15, 16)] == [(0, 4), (1, 4), (2, 0), (2, 5), (3, 0)]
    assert [clock.done(step) for step in (5, 10, 11, 16)] == [(1, 0), (2, 0), (2, 1), (3, 0)]
    assert clock.scheduled(10) == 12  # of the 18 steps that three such epochs are
    assert clock.scheduled(16) == 18


def test_an_epoch_that_was_begun_begins_again() -> None:
    clock = EpochClock(((0, 0, 5),)).longer(7, 6)
    assert clock.total_steps(3) == 19
    assert clock.place(7) == (1, 0)
    assert clock.done(7) == (1, 2)
    assert clock.done(13) == (2, 0)
    again = clock.longer(13, 7)
    assert again.place(13) == (2, 0)
    assert again.done(5) == (1, 0)
    assert again.total_steps(3) == 20


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
    names, sizes = list(before.names), before.columns["sizes"].copy()
    write_tar(tmp_path / "a.tar", range(10, 12))
    now = open_source("tar", "train", root=tmp_path, list_file=None, limit=None)
    assert list(now.names) == ["010.jpg", "011.jpg", *names]
    after = rearranged(now, names, sizes, places_of(names, now.names), {})
    assert isinstance(after, EncodedImages)
    assert [after.read(index) for index in range(5)] == [encoded(number) for number in (0, 1, 2, 10, 11)]
    assert "a.tar" in after.where(3)
    assert digest_of_first(after, 3) == before.digest
