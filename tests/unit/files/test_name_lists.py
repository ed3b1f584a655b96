"""Lists of names: any name that is written is read again by every reader, and others' lists mean what they say."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_files import encoded
from voc_tree import CLASSES, add_image, object_xml

from instance_ssl.data.datasets import open_source
from instance_ssl.data.image_sources import read_instances, write_instances
from instance_ssl.errors import UserError, unescape
from instance_ssl.evaluation.detection.voc import open_voc
from instance_ssl.evaluation.label_lists import read_label_list, write_label_list
from instance_ssl.files.name_lists import list_line, read_lines, read_names, write_names

HOSTILE = [
    "plain.png", "new\nline.png", "cr\rin it", "cr at the end\r", "line\u2028separator.png", "next\x85line", "feed\x0c",
    "\x0cfeed", "all\x0b\x1c\x1d\x1e\u2029of them", " lead.png", "trail.png ", " both ", "both", "\ttabs\t",
    "#hash.png",
    "# comment.png", " #", "#", "back\\slash.png", "a\\nb.png", "a\nb.png", "a\\\\nb.png", "\\x20.png", "\\", "\\#",
    "\udcff\udcfe.png", "\ufeffmark.png", "mark\ufeff", "\x1b[31mred", "space\u00a0", "\u3000wide", "ünï/語.png",
    "\U0001f600.png", "a: b.png", "two  words.png", "turned\u202e.png", "\x7f", "~", "x/#y", "x/ y",
]  # fmt: skip
# Those that no other program could list in another way, as they stand.
RAW = [
    name for name in HOSTILE
    if "\n" not in name and not name.strip().startswith("#") and not name.endswith("\r")
    and (unescape(name) == name or unescape(name) not in HOSTILE)
]  # fmt: skip
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-with-mark", "utf-16-be-with-mark"]


def as_bytes(text: str, encoding: str) -> bytes:
    if encoding.endswith("-with-mark"):
        return ("\ufeff" + text).encode(encoding.removesuffix("-with-mark"))
    return text.encode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")


def read(path: Path, known: Callable[[str], bool]) -> list[str]:
    return [name for _, name in read_names(path, known)]


def test_any_name_comes_back_from_a_line_that_all_programs_take_for_one(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    write_names(HOSTILE, path)
    assert list(read_lines(path)) == HOSTILE
    assert read(path, HOSTILE.__contains__) == HOSTILE
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    assert [unescape(line.strip()) for line in text.splitlines()] == HOSTILE
    assert not any(line.startswith("#") for line in text.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["list.txt"]


def test_what_was_written_before_is_read_as_it_was_meant(tmp_path: Path) -> None:
    """Earlier instances.txt escaped backslashes and the ends of lines alone."""
    before = [name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") + "\n" for name in HOSTILE]
    path = tmp_path / "instances.txt"
    path.write_bytes("".join(before).encode("utf-8", "surrogateescape"))
    assert list(read_instances(path)) == HOSTILE


def test_a_list_of_others_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("".join(f"{name}\n" for name in RAW).encode("utf-8", "surrogateescape"))
    assert read(path, RAW.__contains__) == RAW


def make_images(tmp_path: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, ".png"))
    return tmp_path / "images"


def test_a_data_set_by_its_list_or_by_the_instances_of_another_run(tmp_path: Path) -> None:
    root = make_images(tmp_path, HOSTILE)
    write_names(HOSTILE, tmp_path / "list.txt")
    source = open_source("list", "train", root=root, list_file=tmp_path / "list.txt", limit=None)
    assert source.names == HOSTILE
    write_instances(source, tmp_path / "instances.txt")
    again = open_source("list", "train", root=root, list_file=tmp_path / "instances.txt", limit=None)
    assert again.names == HOSTILE
    (tmp_path / "raw.txt").write_bytes("\n".join(RAW).encode("utf-8", "surrogateescape"))
    assert open_source("list", "train", root=root, list_file=tmp_path / "raw.txt", limit=None).names == RAW


@pytest.mark.parametrize("folder", ["", "one/", "#/ "])
def test_label_lists(tmp_path: Path, folder: str) -> None:
    names = [folder + name for name in HOSTILE]
    ids = torch.arange(1, len(names))
    write_label_list(tmp_path / "list.txt", names, ids)
    assert read_label_list(tmp_path / "list.txt", names).tolist() == ids.tolist()


def test_a_label_list_of_names_that_lie_in_the_root_and_in_a_folder(tmp_path: Path) -> None:
    names = ["x.png", "a/x.png", "b/y.png"]
    for ids in ([0], [1], [0, 1, 2]):
        write_label_list(tmp_path / "list.txt", names, torch.tensor(ids))
        assert read_label_list(tmp_path / "list.txt", names).tolist() == ids


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_list_may_have_any_encoding_that_it_names(tmp_path: Path, encoding: str, end: str) -> None:
    words = ["ü 1", "\u2028b", "c\x85d"]
    text = as_bytes("".join(f" {word}.jpg \t{end}{end}" for word in words) + f"# so far{end}", encoding)
    images = tmp_path / "VOC2007/JPEGImages"
    for number, word in enumerate(words):
        boxes = object_xml("cat", (1, 1, 4, 4)), object_xml("dog", (1, 1, 4, 4))
        add_image(tmp_path, word, torch.full((8, 8, 3), number, dtype=torch.uint8).numpy(), *boxes)
    (tmp_path / "list.txt").write_bytes(text)
    names = [f"{word}.jpg" for word in words]
    source = open_source("list", "train", root=images, list_file=tmp_path / "list.txt", limit=None)
    assert source.names == names
    assert read_label_list(tmp_path / "list.txt", names).tolist() == [0, 1, 2]
    voc = as_bytes("".join(f" {word} \t{end}" for word in words), encoding)
    (tmp_path / "VOC2007/ImageSets/Main/train.txt").write_bytes(voc)
    assert open_voc(tmp_path, ["VOC2007/train"], CLASSES).images.names == [f"VOC2007/JPEGImages/{n}" for n in names]
    labels = tmp_path / "dtd/dtd/labels"
    labels.mkdir(parents=True)
    (tmp_path / "dtd/dtd/images").mkdir()
    (images.rename(tmp_path / "dtd/dtd/images/c"))
    for part, word in zip(("train", "val", "test"), words, strict=True):
        (labels / f"{part}1.txt").write_bytes(as_bytes(f"c/{word}.jpg{end}", encoding))
    dtd = open_source("dtd", "train", root=tmp_path, list_file=None, limit=None)
    assert sorted(dtd.names) == sorted(f"dtd/dtd/images/c/{name}" for name in names[:2])


def test_a_comment_that_is_the_name_of_an_image_is_refused(tmp_path: Path) -> None:
    root = make_images(tmp_path, ["#a.png", "b.png"])
    (root / "list.txt").write_text("# all\nb.png\n #a.png\n")
    with pytest.raises(UserError, match=r"list\.txt, line 3 is a comment.* file #a\.png: write \\x23a\.png"):
        open_source("list", "train", root=None, list_file=root / "list.txt", limit=None)
    with pytest.raises(UserError, match=r"line 3 is a comment"):
        read_label_list(root / "list.txt", ["#a.png", "b.png"])
    (root / "list.txt").write_text("# all\nb.png\n\\x23a.png\n")
    source = open_source("list", "train", root=None, list_file=root / "list.txt", limit=None)
    assert source.names == ["b.png", "#a.png"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a.png\n".encode("utf-16-le"), "zero byte: save the list as UTF-8"),
        ("a.png\n".encode("utf-16")[:-1], "truncated data"),
        ("a.png\n".encode("utf-32"), "zero byte"),
    ],
)
def test_what_is_not_text_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    root = make_images(tmp_path, ["a.png"])
    (root / "list.txt").write_bytes(content)
    for opened in (
        lambda: open_source("list", "train", root=None, list_file=root / "list.txt", limit=None),
        lambda: read_label_list(root / "list.txt", ["a.png"]),
    ):
        with pytest.raises(UserError, match=words) as caught:
            opened()
        assert "list.txt" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_ordinary_names_stand_as_they_are() -> None:
    for name in ("a.png", "train/n01/x (2).JPEG", "ünï/語.png", "a#b c.png"):
        assert list_line(name) == name
