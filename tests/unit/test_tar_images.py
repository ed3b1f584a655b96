"""Tar shards are read in place: ids as of the same files in folders, and nothing that a tar holds is believed."""

import gzip
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import broken_files, encoded, write_tar

from instance_ssl.data import tar_index
from instance_ssl.data.broken import OnBroken
from instance_ssl.data.datasets import open_source
from instance_ssl.data.sources import EncodedImages
from instance_ssl.data.tar_images import TarImages
from instance_ssl.errors import RankError, UserError

ODD_NAMES = ["new\nline.jpg", "\udcff\udcfe.jpg", "ünï/語.png", "a" * 200 + ".jpeg"]


def open_tar(root: Path | None, split: str = "train", **keywords: Any) -> TarImages:
    source = open_source("tar", split, root=root, **({"list_file": None, "limit": None} | keywords))
    assert isinstance(source, TarImages)
    return source


def refused(*words: str, root: Path | None, **keywords: Any) -> None:
    with pytest.raises(UserError) as caught:
        open_tar(root, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def samples(*numbers: int) -> list[tuple[str, bytes]]:
    """Images and their class indices, as WebDataset has them."""
    members = []
    for number in numbers:
        members += [(f"s{number}.jpg", encoded(number)), (f"s{number}.cls", str(number % 3).encode())]
        members.append((f"s{number}.json", b"{}"))
    return members


def test_images_come_by_shard_and_place_with_their_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-1.tar", samples(9, 3))
    write_tar(tmp_path / "train-0.tar", samples(5, 7, 1))
    write_tar(tmp_path / "val-0.tar", samples(2))
    train, test = open_tar(tmp_path), open_tar(tmp_path, "test")
    assert train.names == ["s5.jpg", "s7.jpg", "s1.jpg", "s9.jpg", "s3.jpg"]
    assert train.shard_of.tolist() == [0, 0, 0, 1, 1]
    assert train.shard_starts.tolist() == [0, 3]
    assert train.labels is not None
    assert train.labels.tolist() == [2, 1, 1, 0, 0]
    assert train.class_names == test.class_names == ["0", "1", "2"]
    assert test.names == ["s2.jpg"]
    for index in (4, 0, 3):
        number = int(train.names[index][1])
        assert train.read(index) == encoded(number)
        assert train.load(index).size == (8, 8)
    assert train.where(3) == f"{tmp_path}/train-1.tar: s9.jpg"


def test_the_same_files_in_a_folder_a_list_and_tars_have_the_same_ids(tmp_path: Path) -> None:
    names = sorted([*ODD_NAMES, "b/1.jpg", "b-c/2.png", "b.jpg", "c/d/3.webp"])
    files = {name: encoded(number, os.path.splitext(name)[1]) for number, name in enumerate(names)}
    for name, content in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    for place, part in enumerate((names[:3], names[3:])):
        write_tar(tmp_path / f"tars/{place}.tar", [(name, files[name]) for name in part])
    listed = [name for name in names if "\n" not in name]
    (tmp_path / "folder/list.txt").write_text("\n".join(listed), errors="surrogateescape")
    folder = open_source("folder", "train", root=tmp_path / "folder", list_file=None, limit=None)
    by_list = open_source("list", "train", root=None, list_file=tmp_path / "folder/list.txt", limit=None)
    tars = open_tar(tmp_path / "tars")
    assert folder.names == names == tars.names
    assert folder.digest == tars.digest
    assert tars.labels is None
    assert by_list.names == listed
    assert isinstance(folder, EncodedImages)
    assert [tars.read(i) for i in range(len(names))] == [folder.read(i) for i in range(len(names))]


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_survive_both_formats(tmp_path: Path, format_: int) -> None:
    names = [*ODD_NAMES, "/absolute.jpg", "../../outside.jpg", "d/" * 120 + "deep.png"]
    write_tar(tmp_path / "0.tar", [(name, encoded(i)) for i, name in enumerate(names)], format=format_)
    source = open_tar(tmp_path)
    assert source.names == names
    assert [source.read(i) for i in range(len(names))] == [encoded(i) for i in range(len(names))]
    assert "\n" not in source.where(0)


def test_names_lead_nowhere_and_what_is_no_plain_file_is_no_image(tmp_path: Path) -> None:
    def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
        member = tarfile.TarInfo()
        member.type, member.linkname = kind, target
        return member

    members: list[tuple[str, bytes | tarfile.TarInfo]] = [
        ("../escape.jpg", encoded(1)),
        ("link.jpg", special(tarfile.SYMTYPE, "/etc/passwd")),
        ("hard.jpg", special(tarfile.LNKTYPE, "../escape.jpg")),
        ("device.jpg", special(tarfile.CHRTYPE)),
        ("pipe.jpg", special(tarfile.FIFOTYPE)),
        ("folder.jpg", special(tarfile.DIRTYPE)),
        ("._hidden.jpg", b"a Macintosh's"),
        ("notes.txt", b"no image"),
        ("link.cls", special(tarfile.SYMTYPE, "/etc/passwd")),
    ]
    write_tar(tmp_path / "tars/0.tar", members)
    refused("link.jpg", "0.tar", "data.on_broken", root=tmp_path / "tars")
    source = open_tar(tmp_path / "tars", on_broken=OnBroken(skip=True, max_share=0.9))
    assert source.names == ["../escape.jpg"]
    assert [line.split(":")[0] for line in source.left_out] == ["link.jpg", "hard.jpg", "device.jpg", "pipe.jpg"]
    assert source.read(0) == encoded(1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", "0.tar.index", "tars"]


def test_names_that_come_again_have_ids_of_their_own(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", encoded(0)), ("a.jpg", encoded(1)), ("b.jpg", encoded(2))])
    write_tar(tmp_path / "1.tar", [("a.jpg", encoded(3))])
    source = open_tar(tmp_path)
    assert source.names == ["a.jpg", "a.jpg#2", "b.jpg", "a.jpg#3"]
    assert [source.read(i) for i in range(4)] == [encoded(i) for i in range(4)]


def test_a_label_belongs_to_its_sample(tmp_path: Path) -> None:
    members = [("x/a.cls", b"1\n"), ("x/a.jpg", encoded(0)), ("x/a.left.jpg", encoded(1)), ("y/a.jpg", encoded(2))]
    members += [("y/a.cls", b" 2"), ("y/b.c.jpg", encoded(3)), ("y/b.cls", b"0"), ("y/b.d.jpg", encoded(4))]
    write_tar(tmp_path / "0.tar", members)
    labels = open_tar(tmp_path).labels
    assert labels is not None
    assert labels.tolist() == [1, 1, 2, 0, 0]
    write_tar(tmp_path / "0.tar", [*members, ("z.jpg", encoded(5))])
    refused("z.jpg", ".cls", root=tmp_path)
    for content in (b"cat", b"-1", b"", b"9" * 30):
        write_tar(tmp_path / "0.tar", [("z.jpg", encoded(5)), ("z.cls", content)])
        refused("z.cls", "class index", root=tmp_path)
    write_tar(tmp_path / "train-0.tar", samples(0, 1))
    write_tar(tmp_path / "val-0.tar", samples(5))
    refused("class 2", root=tmp_path, split="test")


def test_truncated_damaged_and_compressed_shards_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.jpg", encoded(0)), ("b.jpg", encoded(1, side=40))])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1]
    damaged = bytearray(whole)
    damaged[second.offset : second.offset + 100] = b"#" * 100
    huge = bytearray(whole)
    huge[second.offset + 124 : second.offset + 136] = b"\x80" + (1 << 62).to_bytes(11, "big")
    negative = bytearray(whole)
    negative[second.offset + 124 : second.offset + 136] = b"\xff" + (-4096).to_bytes(11, "big", signed=True)
    for member in (huge, negative):
        member[second.offset + 148 : second.offset + 156] = b" " * 8
        checksum = sum(member[second.offset : second.offset + 512])
        member[second.offset + 148 : second.offset + 156] = b"%06o\0 " % checksum
    cases = {
        "within a member": (whole[: second.offset_data + 100], "b.jpg"),
        "in a header": (whole[: second.offset + 100], "truncated"),
        "between members": (whole[: second.offset], "end mark"),
        "damaged": (bytes(damaged), "damaged"),
        "huge": (bytes(huge), "truncated"),
        "negative": (bytes(negative), "truncated"),
        "empty": (b"", "truncated"),
        "text": (b"no tar at all" * 100, "no tar"),
        "compressed": (gzip.compress(whole), "gzip"),
    }
    for content, word in cases.values():
        path.write_bytes(content)
        refused("data.root", "0.tar", word, root=tmp_path)


def test_the_index_is_read_instead_of_the_shard_until_the_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[str] = []
    scan = tar_index._scan

    def counting(shard: Path, every_member: bool) -> tar_index.ShardIndex:
        scans.append(shard.name)
        return scan(shard, every_member)

    monkeypatch.setattr(tar_index, "_scan", counting)
    members = [*samples(0, 1, 2), ("bad.jpg", b""), ("bad.cls", b"1")]
    path = write_tar(tmp_path / "0.tar", members)
    policy = OnBroken(skip=True, max_share=0.5)
    first = open_tar(tmp_path, on_broken=policy)
    again = open_tar(tmp_path, on_broken=policy)
    assert scans == ["0.tar"]
    assert again.names == first.names == ["s0.jpg", "s1.jpg", "s2.jpg"]
    assert again.left_out == first.left_out == ["bad.jpg: the file is empty"]
    assert again.digest == first.digest
    assert again.labels is not None
    assert first.labels is not None
    assert again.labels.tolist() == first.labels.tolist() == [0, 1, 2]
    os.utime(path, ns=(1, 1))
    open_tar(tmp_path, on_broken=policy)
    assert len(scans) == 2
    for damage in (b"", b"PK\x03\x04", (tmp_path / "0.tar.index").read_bytes()[:-300]):
        (tmp_path / "0.tar.index").write_bytes(damage)
        assert open_tar(tmp_path, on_broken=policy).names == first.names
    assert len(scans) == 5


def test_where_nothing_may_be_written_the_index_goes_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_tar(tmp_path / "tars/0.tar", samples(0, 1))
    (tmp_path / "tars/0.tar.index").mkdir()  # nobody, not even root, can put a file there
    names = open_tar(tmp_path / "tars").names
    (kept,) = (tmp_path / "home/.cache/instance_ssl").iterdir()
    monkeypatch.setattr(tar_index, "_scan", None)
    assert open_tar(tmp_path / "tars").names == names
    assert [path.name for path in (tmp_path / "tars").iterdir() if path.is_file()] == ["0.tar"]
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    kept.unlink()
    (tmp_path / "home/.cache/instance_ssl").rmdir()
    (tmp_path / "home/.cache/instance_ssl").write_text("in the way")
    assert open_tar(tmp_path / "tars").names == names


def test_shards_are_chosen_by_place_glob_or_braces(tmp_path: Path) -> None:
    for place, name in enumerate(("train-000.tar", "train-001.tar", "train-002.tar", "val.tar", "other.tar")):
        write_tar(tmp_path / "flat" / name, [(f"{place}.jpg", encoded(place))])
    for place, name in enumerate(("train/b.tar", "train/a.tar", "test/c.tar")):
        write_tar(tmp_path / "nested" / name, [(f"{place}.jpg", encoded(place))])
    write_tar(tmp_path / "plain/0.tar", [("0.jpg", encoded(0))])
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/0.tar").symlink_to(tmp_path / "flat/other.tar")
    flat, nested = tmp_path / "flat", tmp_path / "nested"
    assert open_tar(flat).names == ["0.jpg", "1.jpg", "2.jpg"]
    assert open_tar(flat, "test").names == ["3.jpg"]
    assert open_tar(nested).names == ["1.jpg", "0.jpg"]
    assert open_tar(nested, "test").names == ["2.jpg"]
    assert open_tar(tmp_path / "plain").names == ["0.jpg"]
    assert open_tar(tmp_path / "linked").names == ["4.jpg"]
    assert open_tar(flat, shards="train-{000..001}.tar").names == ["0.jpg", "1.jpg"]
    assert open_tar(flat, shards="{other,train-002}.tar").names == ["4.jpg", "2.jpg"]
    assert open_tar(None, shards=f"{flat}/train-00[12].tar").names == ["1.jpg", "2.jpg"]
    assert open_tar(flat, shards="train-*.tar", limit=2).names == ["0.jpg", "1.jpg"]
    refused("data.shards", "none-*.tar", root=flat, shards="none-*.tar")
    refused("train-009.tar", "No such file", root=flat, shards="train-{009..009}.tar")
    refused("data.root", "no test shard", root=tmp_path / "plain", split="test")
    refused("data.root", "not set", root=None)
    refused("data.limit_train", root=flat, limit=4)
    write_tar(tmp_path / "empty/0.tar", [("notes.txt", b"")])
    refused("empty", "without any image", root=tmp_path / "empty")


def test_broken_images_are_refused_or_left_out_by_name(tmp_path: Path) -> None:
    members = [(f"{i}.jpg", encoded(i)) for i in range(5)] + list(broken_files().items())
    write_tar(tmp_path / "0.tar", members)
    refused("0.tar: bomb.png", "pixels", "data.on_broken", root=tmp_path)
    refused("5 of 10", "data.max_broken_share 0.4", "empty.jpg", root=tmp_path, on_broken=OnBroken(True, 0.4))
    source = open_tar(tmp_path, on_broken=OnBroken(True, 0.5))
    assert source.names == [f"{i}.jpg" for i in range(5)]
    assert [line.split(":")[0] for line in source.left_out] == list(broken_files())


def test_a_shard_that_changes_during_the_run_is_said_and_pickling_opens_it_anew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [(f"{i}.jpg", encoded(i)) for i in range(3)])
    source = open_tar(tmp_path)
    assert source.read(0) == encoded(0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(1) == encoded(1)
    assert source.missing_here() is None
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    with pytest.raises(RankError, match=r"0\.tar: 2\.jpg.*shard ends"):
        source.load(2)
    with pytest.raises(RankError, match=r"0\.tar: 2\.jpg.*has changed"):
        pickle.loads(pickle.dumps(source)).load(2)
    assert "1000 bytes" in str(source.missing_here())
    path.unlink()
    with pytest.raises(RankError, match=r"0\.tar: 2\.jpg.*No such file"):
        pickle.loads(pickle.dumps(source)).load(2)


def test_more_shards_than_may_be_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instance_ssl.data.tar_images._OPEN_SHARDS", 2)
    for i in range(5):
        write_tar(tmp_path / f"{i}.tar", [(f"{i}.jpg", encoded(i))])
    source = open_tar(tmp_path)
    order = np.random.RandomState(0).randint(0, 5, 50).tolist()
    before = len(os.listdir("/proc/self/fd"))
    assert [source.read(i) for i in order] == [encoded(i) for i in order]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
