"""VOC's layout is read as detectron2 reads it, and every mistake is one line that names its file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from voc_tree import CLASSES, add_image, make_tree, object_xml, write_list

from instance_ssl.config.choices import VOC_CLASSES
from instance_ssl.data.decode import AS_STORED
from instance_ssl.errors import UserError
from instance_ssl.evaluation.detection.batches import Resizing, single_images
from instance_ssl.evaluation.detection.voc import open_voc

SHARED = Path(__file__).parents[3].parent / "shared/data/voc2007_subset.tar"
GREY = np.full((40, 60, 3), 90, np.uint8)
CAT, DOG = object_xml("cat", (1, 1, 60, 40)), object_xml("dog", (11, 5, 20, 14), difficult=False)


def one_image(root: Path, *objects: str) -> Path:
    add_image(root, "a", GREY, *objects)
    write_list(root, "some", ["a"])
    return root


def refused(root: Path | None, *words: str, lists: tuple[str, ...] = ("VOC2007/some",)) -> None:
    with pytest.raises(UserError) as raised:
        open_voc(root, lists, CLASSES)
    message = str(raised.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_boxes_are_continuous_and_0_based(tmp_path: Path) -> None:
    data = open_voc(one_image(tmp_path, CAT, DOG, object_xml("dog", (2, 3, 2, 3), True)), ["VOC2007/some"], CLASSES)
    (annotation,) = data.annotations
    assert (annotation.width, annotation.height) == (60, 40)
    assert annotation.boxes_m4.tolist() == [[0, 0, 60, 40], [10, 4, 20, 14], [1, 2, 2, 3]]
    assert annotation.boxes_m4.dtype == torch.float32
    assert annotation.classes_m.tolist() == [0, 1, 1]
    assert annotation.difficult_m.tolist() == [False, False, True]
    assert data.images.names == ["VOC2007/JPEGImages/a.jpg"]
    assert data.images.load(0).size == (60, 40)


def test_lists_of_several_years_follow_each_other(tmp_path: Path) -> None:
    one_image(tmp_path, CAT)
    add_image(tmp_path, "a", GREY, DOG, folder="VOC2012")
    write_list(tmp_path, "own_choice", ["a"], folder="VOC2012")
    data = open_voc(tmp_path, ["VOC2012/own_choice", "VOC2007/some"], CLASSES)
    assert data.images.names == ["VOC2012/JPEGImages/a.jpg", "VOC2007/JPEGImages/a.jpg"]
    assert [a.classes_m.tolist() for a in data.annotations] == [[1], [0]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", True), ("true", True), (" True\n", True), ("1.0", True), ("yes", True), ("0", False), ("False", False),
     ("0.0", False), ("", False), (" ", False)],
)  # fmt: skip
def test_difficult_as_people_write_it(tmp_path: Path, text: str, expected: bool) -> None:
    odd = DOG.replace("<difficult>0</difficult>", f"<difficult>{text}</difficult>")
    (annotation,) = open_voc(one_image(tmp_path, CAT, DOG, odd), ["VOC2007/some"], CLASSES).annotations
    assert annotation.difficult_m.tolist() == [False, False, expected]


@pytest.mark.parametrize("text", ["2", "-1", "nan", "maybe", "0.5"])
def test_difficult_that_says_neither_is_refused(tmp_path: Path, text: str) -> None:
    odd = DOG.replace("<difficult>0</difficult>", f"<difficult>{text}</difficult>")
    refused(one_image(tmp_path, CAT, odd), "a.xml", "a dog has difficult", text)


def test_an_image_without_objects_and_parts_of_objects_are_fine(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>99</xmin></bndbox></part></object>"
    one_image(tmp_path, CAT, DOG.replace("</object>", part))
    add_image(tmp_path, "b", GREY)
    write_list(tmp_path, "some", ["a", "b"])
    assert [len(a.boxes_m4) for a in open_voc(tmp_path, ["VOC2007/some"], CLASSES).annotations] == [2, 0]


@pytest.mark.parametrize("box", [(0, 1, 60, 40), (1, 0, 10, 10), (30, 1, 61, 20)])
def test_a_pixel_over_the_edge_is_cut(tmp_path: Path, box: tuple[int, ...]) -> None:
    data = open_voc(one_image(tmp_path, object_xml("cat", box), DOG), ["VOC2007/some"], CLASSES)
    first = data.annotations[0].boxes_m4[0]
    assert first.min() >= 0
    assert (first <= torch.tensor([60.0, 40, 60, 40])).all()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (object_xml("cat", (1, 1, 63, 40)), ("cat's box 1 1 63 40", "outside its image of 60 x 40")),
        (object_xml("cat", (-4, 1, 6, 40)), ("outside",)),
        (object_xml("cat", (1, 1, 6, float("nan"))), ("outside",)),
        (object_xml("cat", (20, 1, 10, 40)), ("empty",)),
        (object_xml("unicorn", (1, 1, 6, 40)), ("unknown class 'unicorn'", "cat, dog")),
        (object_xml("", (1, 1, 6, 40)), ("without a class",)),
        (object_xml("cat", (1, 1, 6, 40)).replace("xmax", "x"), ("cat", "bndbox", "xmax")),
        ("<object>", ("mismatched tag",)),
    ],
)
def test_a_wrong_object_is_named_with_its_file(tmp_path: Path, wrong: str, words: tuple[str, ...]) -> None:
    refused(one_image(tmp_path, CAT, DOG, wrong), "Annotations/a.xml", *words)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_refused_before_they_expand(tmp_path: Path, encoding: str) -> None:
    one_image(tmp_path, CAT, DOG)
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    bomb = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [<!ENTITY e0 "x">{levels}]><a>&e11;</a>'
    (tmp_path / "VOC2007/Annotations/a.xml").write_bytes(bomb.encode(encoding))
    refused(tmp_path, "Annotations/a.xml", "DOCTYPE")


def with_size(root: Path, *texts: str) -> None:
    path = root / "VOC2007/Annotations/a.xml"
    width, height = texts
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    path.write_text(f"<annotation>{size}{CAT}{DOG}</annotation>")


@pytest.mark.parametrize("texts", [("60", "40"), (" 60.0 ", "40"), ("", "40"), ("", "")])
def test_the_image_s_own_size_passes_and_so_does_none(tmp_path: Path, texts: tuple[str, str]) -> None:
    with_size(one_image(tmp_path, CAT, DOG), *texts)
    (annotation,) = open_voc(tmp_path, ["VOC2007/some"], CLASSES).annotations
    assert (annotation.width, annotation.height) == (60, 40)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (("40", "60"), ("40 x 60", "a.jpg has 60 x 40")),
        (("600", "40"), ("600 x 40", "a.jpg has 60 x 40")),
        (("0", "0"), ("0 x 0", "60 x 40")),
        (("", "41"), ("60 x 41", "60 x 40")),
        (("wide", "40"), ("wide x 40", "not two numbers")),
    ],
)
def test_another_size_than_the_image_s_is_refused_with_both(
    tmp_path: Path, texts: tuple[str, str], words: tuple[str, ...]
) -> None:
    with_size(one_image(tmp_path, CAT, DOG), *texts)
    refused(tmp_path, "Annotations/a.xml", *words)


def test_boxes_lie_on_the_upright_photograph(tmp_path: Path) -> None:
    boxes = object_xml("cat", (1, 51, 40, 60)), object_xml("dog", (1, 1, 40, 50))
    one_image(tmp_path, *boxes)
    stored = np.zeros((40, 60, 3), np.uint8)
    stored[:, 50:] = 250  # the cat: at the right as stored, at the bottom as shown
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(stored).save(tmp_path / "VOC2007/JPEGImages/a.jpg", quality=95, exif=exif)
    data = open_voc(tmp_path, ["VOC2007/some"], CLASSES)
    (annotation,) = data.annotations
    assert (annotation.width, annotation.height) == (40, 60)
    pixels, (left, top, right, bottom) = np.asarray(data.images.load(0)), annotation.boxes_m4[0].int().tolist()
    assert pixels[top + 2 : bottom, left:right].min() > 200
    assert pixels[: top - 2].max() < 50
    for texts in (("40", "60"), ("60", "40")):
        size = f"<size><width>{texts[0]}</width><height>{texts[1]}</height></size>"
        (tmp_path / "VOC2007/Annotations/a.xml").write_text(f"<annotation>{size}{''.join(boxes)}</annotation>")
        if texts == ("40", "60"):
            open_voc(tmp_path, ["VOC2007/some"], CLASSES)
        else:
            refused(tmp_path, "60 x 40", "has 40 x 60", "data.exif")
    with pytest.raises(UserError, match="cat's box 1 51 40 60 lies outside"):
        open_voc(tmp_path, ["VOC2007/some"], CLASSES, AS_STORED)


def test_resized_images_and_boxes_are_of_the_upright_photograph(tmp_path: Path) -> None:
    one_image(tmp_path, object_xml("cat", (1, 51, 40, 60)), object_xml("dog", (1, 1, 40, 50)))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    Image.fromarray(GREY).save(tmp_path / "VOC2007/JPEGImages/a.jpg", exif=exif)
    data = open_voc(tmp_path, ["VOC2007/some"], CLASSES)
    (image,) = single_images(data, Resizing((80,), 1000, flip=False), 0, range(1))
    assert image.shape == (3, 120, 80)


def test_an_empty_class_is_refused(tmp_path: Path) -> None:
    refused(one_image(tmp_path, CAT), "class dog is empty", "VOC2007/some", "evaluation.detection.classes")
    refused(one_image(tmp_path, CAT, object_xml("dog", (1, 1, 9, 9), difficult=True)), "class dog is empty")


def test_absent_files_are_named(tmp_path: Path) -> None:
    refused(None, "evaluation.detection.root")
    refused(tmp_path / "none", "evaluation.detection.root", "none")
    one_image(tmp_path, CAT, DOG)
    refused(tmp_path, "ImageSets/Main/none.txt", "No such file", lists=("VOC2007/none",))
    refused(tmp_path, "'VOC2007'", "VOC2007/trainval", lists=("VOC2007",))
    (tmp_path / "VOC2007/Annotations/a.xml").unlink()
    refused(tmp_path, "Annotations/a.xml", "No such file")
    (tmp_path / "VOC2007/JPEGImages/a.jpg").unlink()
    refused(tmp_path, "JPEGImages/a.jpg", "no image")


def test_wrong_lists_are_refused(tmp_path: Path) -> None:
    one_image(tmp_path, CAT, DOG)
    refused(tmp_path, "a.jpg is named twice", lists=("VOC2007/some", "VOC2007/some"))
    write_list(tmp_path, "some", ["a  -1"])
    refused(tmp_path, "some.txt, line 1", "one image name")
    write_list(tmp_path, "some", ["", " "])
    refused(tmp_path, "names no image")


def test_a_file_that_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    one_image(tmp_path, CAT, DOG)
    (tmp_path / "VOC2007/JPEGImages/a.jpg").write_bytes(b"not an image")
    refused(tmp_path, "JPEGImages/a.jpg", "not a JPEG")


def test_the_tests_own_tree_is_whole(tmp_path: Path) -> None:
    data = open_voc(make_tree(tmp_path), ["VOC2007/train", "VOC2007/test"], CLASSES)
    assert len(data) == 11
    box = data.annotations[2].boxes_m4[0].int().tolist()
    pixels = np.asarray(data.images.load(2))
    assert pixels[box[1] + 2 : box[3] - 2, box[0] + 2 : box[2] - 2, 0].min() > 200


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data/voc2007_subset.tar")
def test_real_annotations_are_read(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(SHARED) as archive:
        archive.extractall(tmp_path, filter="data")
    data = open_voc(tmp_path / "VOCdevkit", ["VOC2007/train", "VOC2007/val"], VOC_CLASSES)
    assert len(data) == 616
    counts = torch.cat([a.classes_m for a in data.annotations]).bincount(minlength=20)
    assert counts.min() >= 40
