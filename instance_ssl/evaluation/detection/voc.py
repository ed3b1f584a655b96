"""Reads PASCAL VOC's layout: photographs, an XML file of boxes for each, and lists of names.

    root/VOC2007/JPEGImages/000025.jpg   Annotations/000025.xml   ImageSets/Main/trainval.txt

Boxes are (x1, y1, x2, y2), continuous and 0-based: VOC's pixels xmin … xmax, 1-based and inclusive, become
xmin - 1 … xmax (detectron2, detectron2/data/datasets/pascal_voc.py).
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from torch import Tensor

from instance_ssl.data.decode import AS_SHOWN, Rendering, open_image, upright_size
from instance_ssl.data.folders import escape
from instance_ssl.data.image_sources import FileImages
from instance_ssl.errors import UserError, reason, tried
from instance_ssl.files.name_lists import read_names

_KEY = "evaluation.detection"
_TRUTHS = {"": False, "false": False, "no": False, "true": True, "yes": True}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
# 0-based tools write boxes up to this far beyond the edge; these are clipped.
_TOLERATED_PIXELS = 1.0


class Annotation(NamedTuple):
    """The objects of one image of `width` x `height` pixels.

    Boxes (m, 4) float32, classes (m,) int64 from 0, `difficult` (m,) bool.
    """

    width: int
    height: int
    boxes_m4: Tensor
    classes_m: Tensor
    difficult_m: Tensor


@dataclass(frozen=True)
class VocImages:
    """The images of some lists, in their order, and their objects.

    Attributes:
        images: the photographs; their names are relative to the root.
        annotations: of each image.
    """

    images: FileImages
    annotations: list[Annotation]

    def __len__(self) -> int:
        return len(self.annotations)


def open_voc(
    root: Path | None, lists: Sequence[str], class_names: Sequence[str], rendering: Rendering = AS_SHOWN
) -> VocImages:
    """Reads lists of a VOCdevkit and every annotation that they name.

    Args:
        root: the folder that holds VOC2007 and the like.
        lists: such as "VOC2007/trainval": root/VOC2007/ImageSets/Main/trainval.txt.
        class_names: in order of their index; any other class in an annotation is an error.
        rendering: of the images; boxes refer to the upright image.

    Raises:
        UserError: names the key and the file: a missing list or image, an image named twice, an unreadable XML file, a
            size that differs from the image's, a box outside its image, an unknown class, or a class whose objects are
            all difficult.
    """
    if root is None or not os.path.isdir(root):
        where = "is not set" if root is None else f"{tried(root)} is not a folder"
        raise UserError(f"{_KEY}.root {where}: give the folder that holds VOC2007 and its like")
    if root.name in {entry.partition("/")[0] for entry in lists} and not os.path.isdir(root / root.name):
        raise UserError(f"{_KEY}.root {tried(root)}: give the folder that holds {root.name}, which is its parent")
    names = [name for entry in lists for name in _read_list(root, entry)]
    twice = next((name for name, following in pairwise(sorted(names)) if name == following), None)
    if twice is not None:
        raise UserError(f"{_KEY}: {twice} is named twice by {', '.join(lists)}")
    absent = next((name for name in names if not os.path.isfile(root / name)), None)
    if absent is not None:
        raise UserError(f"{_KEY}: there is no image {root / absent}, which one of {', '.join(lists)} names")
    images = FileImages(root, names, None, None, rendering=rendering)
    known = {name: index for index, name in enumerate(class_names)}
    with ThreadPoolExecutor() as pool:
        annotations = list(pool.map(lambda name: _read_annotation(root, name, known, rendering), names))
    easy = torch.cat([annotation.classes_m[~annotation.difficult_m] for annotation in annotations])
    for name, count in zip(class_names, easy.bincount(minlength=len(class_names)).tolist(), strict=True):
        if count == 0:
            raise UserError(
                f"{_KEY}: class {name} is empty, no object of {', '.join(lists)} is one; give other lists, or "
                f"{_KEY}.classes without it"
            )
    return VocImages(images, annotations)


def _read_list(root: Path, entry: str) -> list[str]:
    """Image paths, relative to the root, of a list such as "VOC2007/trainval"."""
    year, slash, name = entry.rpartition("/")
    if not slash:
        raise UserError(f"{_KEY}: list {entry!r}: expected folder/list, such as VOC2007/trainval")
    path = root / year / "ImageSets" / "Main" / f"{name}.txt"

    def is_known(word: str) -> bool:
        return os.path.isfile(root / year / "JPEGImages" / f"{word}.jpg")

    names = []
    try:
        for number, word in read_names(path, is_known):
            if len(word.split()) > 1 and not is_known(word):
                raise UserError(f"{path}, line {number}: expected one image name, found {word!r}")
            names.append(f"{year}/JPEGImages/{word}.jpg")
    except (OSError, ValueError) as error:
        raise UserError(f"{_KEY}: list {path} cannot be read: {reason(error)}") from None
    if not names:
        raise UserError(f"{path} names no image")
    return names


def _read_annotation(root: Path, name: str, known: dict[str, int], rendering: Rendering) -> Annotation:
    path = (root / name).parent.parent / "Annotations" / f"{Path(name).stem}.xml"
    try:
        tree = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_PlainTreeBuilder()))
        with open_image(root / name) as image:
            size, stored = upright_size(image, rendering), image.size
        _check_size(tree, size, stored, name)
        rows = [_read_object(element, known, size) for element in tree.findall("object")]
    except Exception as error:  # PIL's parsers raise OSError, SyntaxError, ValueError, struct.error and more
        raise UserError(f"annotation {path}: {reason(error)}") from None
    boxes, classes, difficult = zip(*rows, strict=True) if rows else ((), (), ())
    return Annotation(
        *size,
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(classes, dtype=torch.int64),
        torch.tensor(difficult, dtype=torch.bool),
    )


def _check_size(tree: ElementTree.Element, size: tuple[int, int], stored: tuple[int, int], name: str) -> None:
    """Checks the annotation's size, where it gives one, against the image's.

    Raises:
        ValueError: naming both sizes.
    """
    texts = [(tree.findtext(f"size/{side}") or "").strip() for side in ("width", "height")]
    try:
        declared = [float(text) if text else side for text, side in zip(texts, size, strict=True)]
    except ValueError:
        raise ValueError(f"its <size> {' x '.join(texts)} is not two numbers") from None
    if declared != list(size):
        turned = f" once it is turned upright (data.exif; {stored[0]} x {stored[1]} as stored)" * (size != stored)
        raise ValueError(
            f"its <size> is {declared[0]:g} x {declared[1]:g} pixels, but {escape(name)} has "
            f"{size[0]} x {size[1]}{turned}"
        )


class _PlainTreeBuilder(ElementTree.TreeBuilder):
    """Refuses a document type, and with it entities, which may expand without bound."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Called before any entity is expanded."""
        raise ValueError("it declares a document type (DOCTYPE), which no annotation needs")


def _read_object(
    element: ElementTree.Element, known: dict[str, int], size: tuple[int, int]
) -> tuple[tuple[float, ...], int, bool]:
    """Returns the box, the class and whether the object is difficult.

    Raises:
        ValueError: when one of them is missing or invalid.
    """
    name = (element.findtext("name") or "").strip()
    if name not in known:
        what = f"unknown class {name!r}" if name else "an object without a class"
        raise ValueError(f"{what}; {_KEY}.classes knows {', '.join(known)}")
    try:
        corners = [float(element.findtext(f"bndbox/{corner}") or "") for corner in _CORNERS]
    except ValueError:
        raise ValueError(f"a {name} has no bndbox of four numbers {', '.join(_CORNERS)}") from None
    width, height = size
    box = [corners[0] - 1, corners[1] - 1, corners[2], corners[3]]
    cut = [min(max(value, 0.0), float(edge)) for value, edge in zip(box, (width, height, width, height), strict=True)]
    inside = all(abs(value - kept) <= _TOLERATED_PIXELS for value, kept in zip(box, cut, strict=True))
    shown = " ".join(f"{value:g}" for value in corners)
    if not inside:  # NaN included
        raise ValueError(f"a {name}'s box {shown} lies outside its image of {width} x {height} pixels")
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        raise ValueError(f"a {name}'s box {shown} is empty")
    text = (element.findtext("difficult") or "").strip().lower()
    try:
        difficult = _TRUTHS[text] if text in _TRUTHS else float(text)
    except ValueError:
        difficult = math.nan
    if difficult not in (0, 1):
        raise ValueError(f"a {name} has difficult {text!r}, expected 0 or 1")
    return tuple(cut), known[name], difficult == 1
