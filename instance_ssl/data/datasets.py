"""Opens data sets: which files or arrays they are, and which image has which instance id."""

import os
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from instance_ssl.data.decode import AS_SHOWN, Rendering
from instance_ssl.data.folders import SUFFIXES, Ignored, class_folders, existing_root, required_root, scan_images
from instance_ssl.data.image_sources import ArrayImages, FileImages, ImageSource
from instance_ssl.data.name_table import packed, repetitions
from instance_ssl.data.named_sets import ListedFiles, find_dtd, find_inaturalist2018, find_sun397
from instance_ssl.data.tar_images import open_tar
from instance_ssl.data.unreadable_images import REFUSE, OnBroken
from instance_ssl.errors import UserError, escape, reason, tried
from instance_ssl.files.name_lists import read_names

_DIGITS_TEST_SIZE = 360


_NO_LABELS = (
    "has no labels and so no test split; digits, cifar10, cifar100, tree, tar, sun397, dtd and inaturalist2018 have one"
)
_WITHOUT_TEST_SPLIT = {
    "class_folders": "has no test split of its own: evaluations hold a part of its images out",
    "folder": _NO_LABELS,
    "list": _NO_LABELS,
}


def open_source(
    kind: str,
    split: str,
    *,
    root: Path | None,
    list_file: Path | None,
    limit: int | None,
    shards: str | None = None,
    on_broken: OnBroken = REFUSE,
    rendering: Rendering = AS_SHOWN,
) -> ImageSource:
    """Opens a data set.

    Files are ordered by their relative POSIX paths as plain strings, so ids do not depend on the order in which a file
    system lists them. Hidden files and the folders of runs are skipped. Each folder is visited once, however many
    symbolic links lead to it.

    Args:
        kind: "digits" (scikit-learn's, split here), "cifar10" or "cifar100" (downloaded if absent), "tree" (ImageNet's
            layout: root/train/<class>/ and root/val/<class>/, or root/test), "class_folders" (root/<class>/),
            "sun397", "dtd", "inaturalist2018" (see named_sets.py), "folder" (images without labels, nested or not),
            "list" (a text file of paths), "tar" (tar shards, see tar_images.py).
        split: "train" or "test"; "folder" and "list" have no test split, nor "class_folders" (see held_out.py).
        root: `data.root`. Paths of a list are relative to it, or to the list file's folder where it is None.
        list_file: `data.list_file`: one path a line, in the order wanted; see name_lists.py.
        limit: keep image floor(i * N / limit) for i = 0 ... limit - 1; None keeps all N.
        shards: `data.shards`, for "tar".
        on_broken: what to do about unreadable files among those that the limit keeps.
        rendering: how their orientation and transparency are treated.

    Raises:
        UserError: one line that names the key and the path at fault.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}")
    match kind:
        case "digits":
            return _open_digits(split, limit)
        case "cifar10" | "cifar100":
            dataset = CIFAR10 if kind == "cifar10" else CIFAR100
            return _open_cifar(dataset, kind, split, required_root(root, kind), limit)
        case "tar":
            return open_tar(root, shards, split, partial(kept_indices, limit, split), on_broken, rendering)
        case "class_folders" | "folder" | "list" if split == "test":
            raise UserError(f"data.kind '{kind}' {_WITHOUT_TEST_SPLIT[kind]}")
        case "class_folders":
            files = _find_class_folders(existing_root(root, kind))
        case "folder":
            files = _find_folder(existing_root(root, kind))
        case "list":
            files = _read_list(root, list_file, must_exist=not on_broken.skip)
        case "tree" | "sun397" | "dtd" | "inaturalist2018":
            find = {"tree": _find_tree, "sun397": find_sun397, "dtd": find_dtd, "inaturalist2018": find_inaturalist2018}
            files = find[kind](existing_root(root, kind), split)
        case _:
            raise ValueError(f"unknown kind of data set {kind!r}")
    return _open_files(files, kept_indices(limit, split, len(files.names)), on_broken, rendering)


def _open_digits(split: str, limit: int | None) -> ArrayImages:
    """The 1797 8x8 digits of scikit-learn as 1437 training and 360 test images.

    The split is that of train_test_split(test_size=360, random_state=0); within it, images keep the file's order. Both
    parts have digits of the same writers, so accuracy says little about new writers. Names give the row in load_digits.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError('data.kind digits needs scikit-learn: pip install -e ".[demo]"') from error
    grey, targets = load_digits(return_X_y=True)
    # RandomState's stream is frozen by NumPy's compatibility policy, so the split outlives upgrades.
    shuffled = np.random.RandomState(0).permutation(len(targets))
    rows = np.sort(shuffled[:_DIGITS_TEST_SIZE] if split == "test" else shuffled[_DIGITS_TEST_SIZE:])
    rows = rows[kept_indices(limit, split, len(rows))]
    pixels = np.rint(grey[rows] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1).repeat(3, axis=3)
    labels = torch.from_numpy(targets[rows].astype(np.int64))
    return ArrayImages(pixels, [f"digits/{split}/{row}" for row in rows], labels, [str(digit) for digit in range(10)])


def _open_cifar(dataset: type[CIFAR10], kind: str, split: str, root: Path, limit: int | None) -> ArrayImages:
    folder = root / dataset.base_folder
    absent = not folder.exists()
    if absent and root.name == dataset.base_folder:
        raise UserError(f"data.root {escape(tried(root))}: give the folder that holds {root.name}, which is its parent")
    try:
        # torchvision unpacks an archive that lies in root already, and downloads only if there is none.
        images = dataset(str(root), train=split == "train", download=absent)
    except Exception as error:  # URLError, OSError, RuntimeError for a checksum, UnpicklingError
        cure = (
            f"put {dataset.filename} from {dataset.url} into data.root, or unpack it there as {dataset.base_folder}/"
            if absent
            else f"delete {escape(str(folder))} to have it fetched again"
        )
        raise UserError(f"data.root {escape(str(root))}: no intact {kind} ({reason(error)}); {cure}") from error
    kept = kept_indices(limit, split, len(images.data))
    labels = torch.tensor(images.targets, dtype=torch.int64)[torch.from_numpy(kept)]
    return ArrayImages(images.data[kept], [f"{kind}/{split}/{i}" for i in kept], labels, list(images.classes))


def _find_tree(root: Path, split: str) -> ListedFiles:
    """ImageNet's layout: each class a folder."""
    classes, folder = class_folders(root, "train"), "train"
    if split == "test":
        folder = "val" if (root / "val").is_dir() else "test"
        if not (root / folder).is_dir():
            raise UserError(f"data.root {escape(str(root))}: there is neither a val nor a test folder in it")
        if (test_classes := class_folders(root, folder)) != classes:
            first = min(set(test_classes) ^ set(classes))
            other = folder if first in classes else "train"
            raise UserError(
                f"data.root {escape(str(root))}: train and {folder} must hold the same class folders, "
                f"but {escape(first)!r} is not in {other}"
            )
    class_index = {name: index for index, name in enumerate(classes)}
    labels, ignored = array("q"), Ignored()

    def labelled_names() -> Iterator[str]:
        for name in scan_images(root / folder, ignored):
            if "/" not in name:
                raise UserError(
                    f"data.root: {escape(str(root / folder / name))} lies in no class folder; move it into one"
                )
            labels.append(class_index[name.partition("/")[0]])
            yield f"{folder}/{name}"

    names, remarks = packed(labelled_names()), ignored.remarks(root / folder)
    labels_N = np.array(labels, np.int64)
    for label in np.flatnonzero(np.bincount(labels_N, minlength=len(classes)) == 0):
        nothing = f"data.root: class folder {escape(str(root / folder / classes[label]))} holds no image"
        raise UserError("; ".join([nothing, *remarks]))
    return ListedFiles(root, names, labels_N, classes, remarks=remarks)


def _find_folder(root: Path) -> ListedFiles:
    """All images below a folder, without labels."""
    ignored = Ignored()
    names, remarks = packed(scan_images(root, ignored)), ignored.remarks(root)
    if not names:
        nothing = f"data.root {escape(str(root))} holds no {', '.join(sorted(SUFFIXES))} file"
        raise UserError("; ".join([nothing, *remarks]))
    return ListedFiles(root, names, remarks=remarks)


def _find_class_folders(root: Path) -> ListedFiles:
    """All images below a folder; the first folder on the way to an image is its class."""
    files = _find_folder(root)
    numbers: dict[str, int] = {}  # of the class folders, as they come
    classes_of_N = (numbers.setdefault(class_of(name), len(numbers)) for name in files.names)
    numbers_N = np.fromiter(classes_of_N, np.int64, count=len(files.names))
    if "" in numbers:
        loose = escape(str(root / files.names[int((numbers_N == numbers[""]).argmax())]))
        raise UserError(f"data.root: {loose} lies in no class folder; move it into one, or set data.kind=folder")
    classes = sorted(numbers)
    class_index = {name: index for index, name in enumerate(classes)}
    labels_N = np.array([class_index[name] for name in numbers], np.int64)[numbers_N]
    return ListedFiles(root, files.names, labels_N, classes, remarks=files.remarks)


def class_of(name: str) -> str:
    """The class of an image of `class_folders`, from its name; empty where it lies in no folder."""
    return name.partition("/")[0] if "/" in name else ""


def _read_list(root: Path | None, list_file: Path | None, *, must_exist: bool) -> ListedFiles:
    """The images that a text file names, without labels; `must_exist` refuses absent ones with the line's number."""
    if list_file is None:
        raise UserError("data.list_file is not set; data.kind 'list' needs a text file of image paths")
    folder = list_file.parent if root is None else existing_root(root, "list")
    shown = f"data.list_file {escape(tried(list_file))}"
    lines = array("q")

    def listed_names() -> Iterator[str]:
        for number, name in read_names(list_file, lambda name: os.path.isfile(folder / name)):
            lines.append(number)
            yield os.path.normpath(name)

    try:
        names = packed(listed_names())
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise UserError(f"{shown}, {reason(error)}") from error
    if not names:
        raise UserError(f"{shown} lists no image")
    for place, first in repetitions(names).items():
        raise UserError(f"{shown}, line {lines[place]}: {escape(names[place])} is on line {lines[first]} already")
    for number, name in zip(lines, names, strict=True) if must_exist else ():
        if not os.path.isfile(folder / name):
            raise UserError(f"{shown}, line {number}: there is no file {escape(tried(folder / name))}")
    return ListedFiles(folder, names)


def _open_files(files: ListedFiles, kept: np.ndarray, on_broken: OnBroken, rendering: Rendering) -> FileImages:
    """The files at the places `kept`, (n,) int64."""
    rows, names = torch.from_numpy(kept), (files.names[i] for i in kept)
    labels = None if files.labels is None else torch.as_tensor(files.labels, dtype=torch.int64)[rows]
    held_out = None if files.held_out is None else torch.tensor(files.held_out)[rows]
    images = FileImages(files.root, names, labels, files.class_names, on_broken, held_out, rendering)
    images.remarks = files.remarks
    return images


def kept_indices(limit: int | None, split: str, count: int) -> np.ndarray:
    """(limit,) int64: the images that a limit keeps, evenly spaced over 0 ... count - 1."""
    if limit is None:
        return np.arange(count, dtype=np.int64)
    if not 1 <= limit <= count:
        raise UserError(f"data.limit_{split} is {limit}, but the {split} split has {count} images: take 1 to {count}")
    return np.arange(limit, dtype=np.int64) * count // limit
