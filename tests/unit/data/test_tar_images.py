"""Tar shards are read in place: ids as of the same files in folders, and nothing that a tar holds is believed."""

import gzip
import os
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import broken_files, encoded, write_tar

from instance_ssl.data import tar_index
from instance_ssl.data.datasets import open_source
from instance_ssl.data.folders import missing_here
from instance_ssl.data.image_sources import EncodedImages
from instance_ssl.data.tar_images import TarImages
from instance_ssl.data.unreadable_images import OnBroken
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
    assert train.columns["shards"].tolist() == [0, 0, 0, 1, 1]
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


def labels_of(tmp_path: Path, *names: str, **options: Any) -> dict[str, int]:
    """What the images of a tar of empty samples are labelled; `x.cls=3` is a label, all else an image."""
    members = []
    for number, name in enumerate(names):
        name, equals, label = name.partition("=")
        members.append((name, label.encode() if equals else encoded(number, os.path.splitext(name)[1].lower())))
    write_tar(tmp_path / "0.tar", members, **options)
    source = open_tar(tmp_path)
    labels, classes = source.labels, source.class_names
    if labels is None or classes is None:
        return dict.fromkeys(source.names, -1)
    return {name: int(classes[label]) for name, label in zip(source.names, labels.tolist(), strict=True)}


DOTTED = ["22.00.cls=0", "22.00.png", "22.01.cls=1", "22.01.png", "22.02.png", "22.02.cls=0"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (DOTTED, {"22.00.png": 0, "22.01.png": 1, "22.02.png": 0}),
        (DOTTED[::-1], {"22.00.png": 0, "22.01.png": 1, "22.02.png": 0}),
        (["a.b.c.jpg", "a.b.d.jpg", "a.b.d.cls=5", "a.b.c.cls=4"], {"a.b.c.jpg": 4, "a.b.d.jpg": 5}),
        (["a.b.cls=1", "a.b.c.jpg", "a.cls=2", "a.d.jpg"], {"a.b.c.jpg": 1, "a.d.jpg": 2}),  # WebDataset's keys
        (["a.jpg", "b.jpg", "x/a.jpg", "a.cls=1", "x/a.cls=3", "b.cls=2"], {"a.jpg": 1, "b.jpg": 2, "x/a.jpg": 3}),
        (["x.y/a.cls=1", "x.y/a.jpg", "x.z/a.cls=2", "x.z/a.jpg"], {"x.y/a.jpg": 1, "x.z/a.jpg": 2}),
        (["A.JPG", "A.CLS=1", "./b.jpg", "b.cls=0"], {"A.JPG": 1, "./b.jpg": 0}),
        (["a.jpg", "b.jpg", "a.jpg", "b.cls=0", "a.cls=1"], {"a.jpg": 1, "b.jpg": 0, "a.jpg#2": 1}),
    ],
)
def test_a_label_belongs_to_the_image_of_its_name_wherever_it_lies(
    tmp_path: Path, names: list[str], expected: dict[str, int]
) -> None:
    assert labels_of(tmp_path, *names) == expected


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_labels_of_long_and_odd_names(tmp_path: Path, format_: int) -> None:
    stems = ["d" * 150 + ".0", "d" * 150 + ".1", "e/" * 120 + "a.b", "ünï.\udcff.x"]
    names = [f"{stem}.cls={number}" for number, stem in enumerate(stems)] + [f"{stem}.jpg" for stem in stems]
    assert labels_of(tmp_path, *names, format=format_) == {f"{stem}.jpg": n for n, stem in enumerate(stems)}


@pytest.mark.parametrize(
    "names",
    [
        ["a.cls=1", "a.jpg", "a.cls=1"],
        ["a.cls=1", "a.jpg", "b.jpg", "b.cls=0", "a.cls=0", "a.jpg"],
        ["x/a.jpg", "x/a.cls=1", "./x/a.CLS=2"],
        ["7.a.cls=1", "7.b.cls=0", "7.a.jpg", "7.b.jpg", "7.a.cls=0"],
    ],
)
def test_two_labels_of_one_sample_are_refused_by_name(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(UserError, match=r"0\.tar holds \S*a\.(cls|CLS) twice: a sample has one label"):
        labels_of(tmp_path, *names)


def test_labels_that_no_image_has_are_counted_and_said(tmp_path: Path) -> None:
    labels_of(tmp_path, "a.jpg", "a.cls=1", "b.gif.cls=0", "c.cls=2", "x/a.cls=3")
    for _ in range(2):  # scanned, and from the index
        source = open_tar(tmp_path)
        assert source.class_names == ["1"]
        assert [line for line in source.remarks if ".cls" in line] == [
            f"labels without an image: 3, such as b.gif.cls in {tmp_path}/0.tar; a .cls has its image's name up to "
            "the last dot"
        ]
    write_tar(tmp_path / "0.tar", [("a.jpg", encoded(0)), ("b.jpg", encoded(1)), ("a.cls", b"1"), ("c.cls", b"1")])
    refused("b.jpg has no .cls", "labels without an image: 1, such as c.cls", root=tmp_path)
    write_tar(tmp_path / "0.tar", [("a.jpg", encoded(0)), ("c.cls", b"1")])
    assert open_tar(tmp_path).labels is None
    assert len(open_tar(tmp_path).remarks) == 1


def test_what_is_not_a_class_index_is_refused_by_name(tmp_path: Path) -> None:
    for content in (b"cat", b"-1", b"", b"9" * 30, b"0" * 40 + b"7"):
        write_tar(tmp_path / "0.tar", [("z.jpg", encoded(5)), ("z.cls", content)])
        refused("z.cls", "class index", root=tmp_path)
    for kind, word in ((tarfile.SYMTYPE, "--dereference"), (tarfile.LNKTYPE, "--hard-dereference")):
        link = tarfile.TarInfo()
        link.type, link.linkname = kind, "y.cls"
        write_tar(tmp_path / "0.tar", [("y.jpg", encoded(1)), ("y.cls", b"1"), ("z.jpg", encoded(5)), ("z.cls", link)])
        refused("z.cls", "y.cls", word, root=tmp_path)


def test_a_sample_has_the_image_of_its_very_name(tmp_path: Path) -> None:
    names = [
        "a.seg.png",
        "a.jpg",
        "a.cls=1",
        "b.jpg",
        "b.depth.left.png",
        "b.cls=0",
        "c.d.jpg",
        "c.d.seg.png",
        "c.cls=2",
    ]
    expected = {"a.jpg": 1, "b.jpg": 0, "c.d.jpg": 2}
    assert labels_of(tmp_path, *names) == expected
    (said,) = open_tar(tmp_path).remarks
    assert said.startswith("images ignored because their sample has one of its very name: 3, such as")
    assert "a.seg.png beside a.jpg in" in said
    assert list(labels_of(tmp_path, *(name for name in names if "=" not in name))) == list(expected)
    # A label of its own makes it a sample of its own; so does a folder.
    assert labels_of(tmp_path, "a.seg.png", "a.jpg", "a.cls=1", "a.seg.cls=2") == {"a.seg.png": 2, "a.jpg": 1}
    assert list(labels_of(tmp_path, "a.jpg", "seg/a.png", "a/x.seg.png")) == ["a.jpg", "seg/a.png", "a/x.seg.png"]
    assert open_tar(tmp_path).remarks == []


def test_an_unreadable_image_beside_the_one_of_its_sample_harms_nothing(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.seg.png", b""), ("a.jpg", encoded(1)), ("b.jpg", b"")])
    source = open_tar(tmp_path, on_broken=OnBroken(skip=True, max_share=0.5))
    assert source.names == ["a.jpg"]
    assert source.left_out == ["b.jpg: the file is empty"]


@pytest.mark.parametrize(
    "names", [["a.jpg", "a.png", "a.cls=0"], ["a.left.jpg", "a.right.jpg", "a.cls=0"], ["a.jpg", "a.png"]]
)
def test_images_of_one_sample_of_which_none_comes_first_are_all_taken_and_said(
    tmp_path: Path, names: list[str]
) -> None:
    images = [name for name in names if "=" not in name]
    assert list(labels_of(tmp_path, *names)) == images
    (said,) = open_tar(tmp_path).remarks
    assert said.startswith(f"images that share a sample with another: 1, such as {images[1]} and {images[0]} in")


def test_classes_are_the_labels_in_use(tmp_path: Path) -> None:
    big = 2**62
    expected = {"a.jpg": 7, "b.jpg": big, "c.jpg": 7, "d.jpg": 20_000_000}
    assert labels_of(tmp_path, *expected, *(f"{name[0]}.cls={label}" for name, label in expected.items())) == expected
    source = open_tar(tmp_path)
    assert source.class_names == ["7", "20000000", str(big)]
    assert source.remarks == [f"labels run from 7 to {big} with 3 in use, which are the classes"]
    assert labels_of(tmp_path, "a.jpg", "b.jpg", "a.cls=1", "b.cls=0") == {"a.jpg": 1, "b.jpg": 0}
    assert open_tar(tmp_path).remarks == []


def test_test_labels_are_classes_of_the_train_split(tmp_path: Path) -> None:
    train, val = tmp_path / "train-0.tar", tmp_path / "val-0.tar"
    sparse = [("a.jpg", encoded(0)), ("a.cls", b"30"), ("b.jpg", encoded(1)), ("b.cls", b"500")]
    write_tar(train, sparse)
    write_tar(val, [("v.jpg", encoded(2)), ("v.cls", b"500")])
    test = open_tar(tmp_path, "test")
    assert test.class_names == open_tar(tmp_path).class_names == ["30", "500"]
    assert test.labels is not None
    assert test.labels.tolist() == [1]
    for absent in (b"0", b"31", b"501"):
        write_tar(val, [("v.jpg", encoded(2)), ("v.cls", absent), ("w.jpg", encoded(3)), ("w.cls", b"30")])
        refused(f"class {absent.decode()}, which no training image has", root=tmp_path, split="test")
    write_tar(train, sparse[::2])
    refused("class 30, which no training image has", root=tmp_path, split="test")


def joined(path: Path, *archives: list[tuple[str, bytes | tarfile.TarInfo]], padding: int = 0) -> None:
    parts = [write_tar(path.with_name("part"), members).read_bytes() + bytes(padding) for members in archives]
    path.with_name("part").unlink()
    path.write_bytes(b"".join(parts))


@pytest.mark.parametrize("padding", [0, -1, 512, 100, 3 << 20])
def test_archives_joined_by_cat_are_read_to_the_end(tmp_path: Path, padding: int) -> None:
    if padding >= 0:
        joined(tmp_path / "0.tar", samples(1, 2), samples(3), [], samples(1, 4), padding=padding)
    else:  # end marks of a single block
        joined(tmp_path / "0.tar", samples(1, 2), samples(3), samples(1, 4))
        content = (tmp_path / "0.tar").read_bytes()
        (tmp_path / "0.tar").write_bytes(re.sub(rb"\0{1024,}(?=s\d\.)", bytes(1024), content))
    source = open_tar(tmp_path)
    assert source.names == ["s1.jpg", "s2.jpg", "s3.jpg", "s1.jpg#2", "s4.jpg"]
    assert source.labels is not None
    assert source.labels.tolist() == [1, 2, 0, 1, 1]
    assert [source.read(i) for i in range(5)] == [encoded(i) for i in (1, 2, 3, 1, 4)]


def test_labels_of_joined_archives_are_those_of_their_own_archive(tmp_path: Path) -> None:
    image, label = ("a.jpg", encoded(0)), ("a.cls", b"1")
    joined(tmp_path / "0.tar", [image, label], [image, ("a.cls", b"0")])
    labels = open_tar(tmp_path).labels
    assert labels is not None
    assert labels.tolist() == [1, 0]
    joined(tmp_path / "0.tar", [image], [label])  # the images, then the labels
    assert open_tar(tmp_path).labels is not None
    joined(tmp_path / "0.tar", [image, label], [image])  # another image by the same name
    refused("a.jpg has no .cls", root=tmp_path)
    joined(tmp_path / "0.tar", [image], [label], [label])
    refused("0.tar holds a.cls 2 times", root=tmp_path)


def test_what_follows_the_end_mark_and_is_not_an_archive_is_refused_with_its_place(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", samples(1))
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * 600)
    refused("0.tar", f"byte {len(whole)}", "not a tar archive", root=tmp_path)
    path.write_bytes(whole + whole[:700])
    refused("0.tar", "truncated", root=tmp_path)
    path.write_bytes(whole + whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512))
    refused("0.tar", "no end mark", root=tmp_path)


def sparse_member(name: str, version: str) -> bytes:
    """A sparse file of 4 MiB, as GNU tar stores it: 512 bytes of data, and where they lie."""
    data, size = b"d" * 512, 4 << 20
    member = tarfile.TarInfo(name)
    if version == "gnu":
        member.type, member.size = tarfile.GNUTYPE_SPARSE, len(data)
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        header[386:410] = b"%011o\0%011o\0" % (size - 512, 512)
        header[483:495] = b"%011o\0" % size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + data
    if version == "0.0":
        member.pax_headers = {"GNU.sparse.size": str(size), "GNU.sparse.numblocks": "1"}
        member.pax_headers |= {"GNU.sparse.offset": str(size - 512), "GNU.sparse.numbytes": "512"}
    elif version == "0.1":
        member.pax_headers = {"GNU.sparse.size": str(size), "GNU.sparse.map": f"{size - 512},512"}
    else:
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
        data = f"1\n{size - 512}\n512\n".encode().ljust(512, b"\0") + data
    member.size = len(data)
    return member.tobuf(tarfile.PAX_FORMAT) + data


@pytest.mark.parametrize("version", ["gnu", "0.0", "0.1", "1.0"])
def test_a_sparse_file_is_called_one_and_the_rest_is_read(tmp_path: Path, version: str) -> None:
    path = write_tar(tmp_path / "0.tar", samples(1)[:1])
    path.write_bytes(sparse_member("hole.jpg", version) + path.read_bytes())
    refused("hole.jpg", "sparse file", "--sparse", "data.on_broken", root=tmp_path)
    source = open_tar(tmp_path, on_broken=OnBroken(skip=True, max_share=0.5))
    assert source.names == ["s1.jpg"]
    assert source.read(0) == encoded(1)
    path.write_bytes(sparse_member("hole.jpg", version)[:-100])
    refused("0.tar", "truncated", root=tmp_path)


def test_an_index_of_an_earlier_version_is_not_believed(tmp_path: Path) -> None:
    labels_of(tmp_path, "a.0.cls=0", "a.0.jpg", "a.1.cls=1", "a.1.jpg")
    path = tmp_path / "0.tar.index"
    with np.load(path) as file:
        content = dict(file)
    with path.open("wb") as file:
        np.savez(file, **content | {"version": 1, "labels": content["labels"][::-1]})
    labels = open_tar(tmp_path).labels
    assert labels is not None
    assert labels.tolist() == [0, 1]


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
        "text": (b"no tar at all" * 100, "not a tar"),
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
    assert missing_here(source.probes()) is None
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    with pytest.raises(RankError, match=r"0\.tar: 2\.jpg.*shard ends"):
        source.load(2)
    with pytest.raises(RankError, match=r"0\.tar: 2\.jpg.*has changed"):
        pickle.loads(pickle.dumps(source)).load(2)
    assert "1000 bytes" in str(missing_here(source.probes()))
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
