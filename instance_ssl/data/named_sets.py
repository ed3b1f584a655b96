"""Data sets with official lists, as their authors and torchvision lay them out: SUN397, DTD and iNaturalist 2018.

None is downloaded. Images are ordered by their names as plain strings.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from instance_ssl.errors import UserError, escape, reason
from instance_ssl.files.name_lists import read_names
from instance_ssl.files.structured import MalformedError, parse_json

# What each list of iNaturalist's holds, and the keys of its entries.
_INATURALIST_KEYS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str},
    "annotations": {"image_id": int, "category_id": int},
    "categories": {"id": int, "name": str},
}
# What no file's name holds: zero, and the halves of characters that do not stand for a byte (surrogateescape).
_IMPOSSIBLE = re.compile(r"[\0\ud800-\udc7f\udd00-\udfff]")


@dataclass(frozen=True)
class ListedFiles:
    """The N files of a split.

    Attributes:
        root: folder that the names are relative to.
        names: relative POSIX paths, in order of instance id.
        labels: (N,) class indices; None: there are no labels.
        class_names: the name of each class index; None without labels.
        held_out: whether each file is in the official held-out part; None where there is no such part.
        remarks: what the user should know of the data set, a line each.
    """

    root: Path
    names: Sequence[str]
    labels: Sequence[int] | np.ndarray | None = None
    class_names: list[str] | None = None
    held_out: list[bool] | None = None
    remarks: Sequence[str] = ()


def find_sun397(root: Path, split: str) -> ListedFiles:
    """Partition 1 of SUN397: 50 images a class to train on, 50 to test.

    torchvision's layout, root/SUN397/a/abbey/*.jpg and root/SUN397/ClassName.txt, with Training_01.txt and
    Testing_01.txt (of Partitions.zip) beside it, in it, or in a folder Partitions in either.

    Raises:
        UserError: a list is missing, or names a class that ClassName.txt does not.
    """
    folder = root / "SUN397"

    def is_there(name: str) -> bool:
        return (folder / name.lstrip("/")).exists()

    class_names = [line.lstrip("/") for line in _lines(folder / "ClassName.txt", "SUN397", is_there)]
    places = [place / inner for place in (root, folder) for inner in ("", "Partitions")]
    name = {"train": "Training_01.txt", "test": "Testing_01.txt"}[split]
    path = next((place / name for place in places if (place / name).is_file()), root / name)
    entries = [line.lstrip("/") for line in _lines(path, "SUN397 (its Partitions.zip)", is_there)]
    return _labelled(root, path, sorted(entries), class_names, "SUN397/")


def find_dtd(root: Path, split: str) -> ListedFiles:
    """Partition 1 of DTD, the Describable Textures: train and val together, val being the held-out part, and test.

    torchvision's layout: root/dtd/dtd/images/<class>/*.jpg and root/dtd/dtd/labels/train1.txt, val1.txt, test1.txt.

    Raises:
        UserError: a list is missing.
    """
    base = Path("dtd/dtd")

    def is_there(name: str) -> bool:
        return (root / base / "images" / name).exists()

    files = {part: root / base / "labels" / f"{part}1.txt" for part in ("train", "val", "test")}
    parts = {part: _lines(path, "DTD", is_there) for part, path in files.items()}
    class_names = sorted({_folder(entry) for entries in parts.values() for entry in entries})
    if split == "test":
        return _labelled(root, files["test"], sorted(parts["test"]), class_names, f"{base}/images/")
    held_out = set(parts["val"])
    entries = sorted([*parts["train"], *held_out])
    found = _labelled(root, files["train"], entries, class_names, f"{base}/images/")
    return replace(found, held_out=[entry in held_out for entry in entries])


def find_inaturalist2018(root: Path, split: str) -> ListedFiles:
    """iNaturalist 2018 by its lists, root/train2018.json and root/val2018.json; val is the test split.

    The images lie where the lists say, root/train_val2018/Aves/2820/*.jpg, or as torchvision's INaturalist unpacks
    them, root/2018/Aves/2820/*.jpg. Classes are the categories of train2018.json, by id.

    Raises:
        UserError: a list is missing or malformed, or has a category that train2018.json lacks.
    """
    train = _read_inaturalist(root / "train2018.json")
    names_by_category = {category["id"]: str(category["name"]) for category in train["categories"]}
    ids = sorted(names_by_category)
    class_names = [names_by_category[category] for category in ids]
    path = root / {"train": "train2018.json", "test": "val2018.json"}[split]
    content = train if split == "train" else _read_inaturalist(path)
    class_of = {category: index for index, category in enumerate(ids)}
    category_of = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
    unpacked_by_torchvision = not (root / "train_val2018").is_dir() and (root / "2018").is_dir()
    rows = []
    for image in content["images"]:
        name, category = image["file_name"], category_of.get(image["id"])
        if _IMPOSSIBLE.search(name):
            raise UserError(f"data.root: {escape(str(path))} names {escape(name)}, which no file can be called")
        if category not in class_of:
            raise UserError(f"data.root: {escape(str(path))} gives {escape(name)} no category of train2018.json")
        if unpacked_by_torchvision:
            name = "2018/" + name.removeprefix("train_val2018/")
        rows.append((name, class_of[category]))
    rows.sort()
    return ListedFiles(root, [name for name, _ in rows], [label for _, label in rows], class_names)


def _lines(path: Path, what: str, is_there: Callable[[str], bool]) -> list[str]:
    try:
        return [name for _, name in read_names(path, is_there)]
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.root: {escape(str(path))} cannot be read: {reason(error)}; unpack {what} as torchvision does"
        ) from error


def _labelled(root: Path, path: Path, entries: list[str], class_names: list[str], prefix: str) -> ListedFiles:
    """The files that the list at `path` names, each in the folder of its class."""
    class_index = {name: index for index, name in enumerate(class_names)}
    labels = [class_index.get(_folder(entry), -1) for entry in entries]
    if -1 in labels:
        entry = entries[labels.index(-1)]
        raise UserError(f"data.root: {escape(str(path))} names {escape(entry)}, which lies in no class's folder")
    if not entries:
        raise UserError(f"data.root: {escape(str(path))} names no image")
    return ListedFiles(root, [prefix + entry for entry in entries], labels, class_names)


def _folder(entry: str) -> str:
    return entry.rpartition("/")[0]


def _read_inaturalist(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes(), is_large=True)
        if isinstance(content, dict) and all(_are_entries(content.get(k), v) for k, v in _INATURALIST_KEYS.items()):
            return content
    except (OSError, MalformedError) as error:
        raise UserError(f"data.root: {escape(str(path))} cannot be read: {reason(error)}") from error
    keys = "; ".join(f"{name} with {' and '.join(inner)}" for name, inner in _INATURALIST_KEYS.items())
    raise UserError(f"data.root: {escape(str(path))} is not a list of iNaturalist's: it must hold {keys}")


def _are_entries(rows: Any, keys: dict[str, type]) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, dict) and all(type(row.get(key)) is kind for key, kind in keys.items()) for row in rows
    )
