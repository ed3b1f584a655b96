"""Sources of images whose index is a stable instance id, and so the class that the instance classifier learns."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from instance_ssl.data.folders import (
    SUFFIXES,
    class_folders,
    escape,
    existing_root,
    reason,
    required_root,
    scan_images,
)
from instance_ssl.data.transfer_sets import LabelledFiles, find_dtd, find_inaturalist2018, find_sun397
from instance_ssl.errors import RankError, UserError

# Only these decoders are ever run, whatever a file's name says.
_FORMATS = ("JPEG", "PNG", "WEBP")
_DIGITS_TEST_SIZE = 360
_HEADERS_PER_TASK = 256
_PROBED_FILES = 64


class ImageSource(ABC):
    """N images in a fixed order; the position of an image is its instance id.

    A source pickles cheaply (names and labels, and pixels only if they are in memory anyway), so that one rank can
    open it and hand it to the others.

    Attributes:
        names: one name an image: the path relative to the root for files, such as "digits/train/17" for arrays.
        labels: (N,) int64 class indices, or None where the images have no labels.
        class_names: the name of each class index, or None with `labels`.
        digest: SHA-256 in hexadecimal; what it covers, each implementation says.
        held_out: ids, (n,) int64, of the training images that the data set itself keeps for the choice of parameters;
            None where it has no such part.
    """

    names: list[str]
    labels: torch.Tensor | None
    class_names: list[str] | None
    digest: str
    held_out: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    def missing_here(self) -> str | None:
        """What this machine lacks of the images, after another machine has opened them; None when nothing."""
        return None

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Image `index` in RGB mode.

        Raises:
            RankError: the image cannot be read; one line that names the file.
        """


class ArrayImages(ImageSource):
    """Images held in memory as one array; `digest` covers the raw pixels and the array's shape, not the labels.

    Args:
        pixels: (N, H, W, 3) uint8.
        names: N names.
        labels: (N,) int64, or None.
        class_names: the name of each label, or None.
    """

    def __init__(
        self, pixels: np.ndarray, names: list[str], labels: torch.Tensor | None, class_names: list[str] | None
    ) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or len(pixels) != len(names):
            raise ValueError(f"expected {len(names)} uint8 RGB images, got {pixels.dtype} of shape {pixels.shape}")
        self.pixels = np.ascontiguousarray(pixels)
        self.names, self.labels, self.class_names = names, labels, class_names
        digest = hashlib.sha256(repr(pixels.shape).encode())
        digest.update(self.pixels.reshape(-1).data)
        self.digest = digest.hexdigest()

    def load(self, index: int) -> Image.Image:
        """Image `index` in RGB mode, a copy."""
        return Image.fromarray(self.pixels[index])


class FileImages(ImageSource):
    """JPEG, PNG and WebP files under one root, decoded when asked for.

    `digest` covers the relative paths and the sizes in bytes, in order, but not the contents: reading a large data set
    whole at each start costs too much. A file replaced by another of the same size goes unnoticed.

    Every header is read once here, so an empty or foreign file is refused before training rather than in its midst.

    Args:
        root: folder that the names are relative to.
        names: N relative POSIX paths.
        labels: (N,) int64, or None.
        class_names: the name of each label, or None.

    Raises:
        UserError: a file is missing, empty, too large, or no JPEG, PNG or WebP image.
    """

    def __init__(
        self, root: Path, names: list[str], labels: torch.Tensor | None, class_names: list[str] | None
    ) -> None:
        self.root = root
        self.names, self.labels, self.class_names = names, labels, class_names
        digest, sizes = hashlib.sha256(), _check_headers(root, names)
        for name, size in zip(names, sizes, strict=True):
            digest.update(os.fsencode(name) + b"\0%d\0" % size)
        self.digest = digest.hexdigest()
        step = max(1, len(names) // _PROBED_FILES)
        self._probes = list(zip(names[::step], sizes[::step], strict=True))

    def missing_here(self) -> str | None:
        """The first of some files, evenly spread, that is absent or of another size on this machine."""
        for name, size in self._probes:
            path = self.root / name
            try:
                found = path.stat().st_size
            except OSError as error:
                return f"{escape(str(path))}: {reason(error)}"
            if found != size:
                return f"{escape(str(path))} has {found} bytes, not {size} as on rank 0"
        return None

    def load(self, index: int) -> Image.Image:
        """Image `index` in RGB mode: transparency is dropped, 16-bit grey keeps its upper 8 bits.

        The EXIF orientation is left alone, as torchvision's ImageFolder does.

        Raises:
            RankError: the file is gone, truncated or otherwise undecodable.
        """
        path = self.root / self.names[index]
        try:
            with open_image(path) as image:
                return _convert_to_rgb(image)
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error and more
            raise RankError(
                f"cannot decode {escape(str(path))} (image {index}): {reason(error)}; repair or replace the file"
            ) from error


def open_source(kind: str, split: str, *, root: Path | None, list_file: Path | None, limit: int | None) -> ImageSource:
    """Opens a data set.

    Files are taken in the plain string order of their relative POSIX paths, so ids do not depend on the order in which
    a file system lists them. Hidden files are skipped and each folder is visited once, symbolic links included.

    Args:
        kind: "digits" (scikit-learn's, split here), "cifar10" or "cifar100" (downloaded if absent), "tree" (ImageNet's
            layout: root/train/<class>/ and root/val/<class>/, or root/test), "sun397", "dtd", "inaturalist2018" (see
            transfer_sets.py), "folder" (images without labels, nested or not), "list" (a text file of paths).
        split: "train" or "test"; "folder" and "list" have no test split.
        root: `data.root`. Paths of a list are relative to it, or to the list file's folder where it is None.
        list_file: `data.list_file`: one path a line, in the order wanted; blank lines and # comments are ignored.
        limit: keeps image floor(i * N / limit) for i = 0 ... limit - 1; None keeps all N.

    Raises:
        UserError: one line that names the key and the path at fault.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}")
    match kind:
        case "digits":
            return _open_digits(split, limit)
        case "cifar10":
            return _open_cifar(CIFAR10, kind, split, required_root(root, kind), limit)
        case "cifar100":
            return _open_cifar(CIFAR100, kind, split, required_root(root, kind), limit)
        case "tree":
            return _open_tree(split, existing_root(root, kind), limit)
        case "sun397":
            return _open_listed(find_sun397, split, existing_root(root, kind), limit)
        case "dtd":
            return _open_listed(find_dtd, split, existing_root(root, kind), limit)
        case "inaturalist2018":
            return _open_listed(find_inaturalist2018, split, existing_root(root, kind), limit)
        case "folder":
            _refuse_test_split(kind, split)
            return _open_folder(existing_root(root, kind), limit)
        case "list":
            _refuse_test_split(kind, split)
            return _open_list(root, list_file, limit)
    raise ValueError(f"unknown kind of data set {kind!r}")


def write_instances(source: ImageSource, path: Path) -> None:
    r"""Writes the name of image i to line i, counted from 0, of `path`: N lines, all or nothing.

    Newlines, carriage returns and backslashes within a name are written as \n, \r and \\.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        file.writelines(escape(name) + "\n" for name in source.names)
    os.replace(temporary, path)


def _open_digits(split: str, limit: int | None) -> ArrayImages:
    """The 1797 8x8 digits of scikit-learn as 1437 training and 360 test images.

    The split is that of train_test_split(test_size=360, random_state=0); within it, images keep the file's order.
    Writers are on both sides of it, so it says less about strangers' digits than about the method. Names carry the
    row in load_digits.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("data.kind 'digits' needs scikit-learn: pip install 'instance_ssl[demo]'") from error
    grey, targets = load_digits(return_X_y=True)
    # RandomState's stream is frozen by NumPy's compatibility policy, so the split outlives upgrades.
    shuffled = np.random.RandomState(0).permutation(len(targets))
    rows = np.sort(shuffled[:_DIGITS_TEST_SIZE] if split == "test" else shuffled[_DIGITS_TEST_SIZE:])
    rows = rows[_kept_indices(len(rows), limit, split)]
    pixels = np.rint(grey[rows] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1).repeat(3, axis=3)
    labels = torch.from_numpy(targets[rows].astype(np.int64))
    return ArrayImages(pixels, [f"digits/{split}/{row}" for row in rows], labels, [str(digit) for digit in range(10)])


def _open_cifar(dataset: type[CIFAR10], kind: str, split: str, root: Path, limit: int | None) -> ArrayImages:
    folder = root / dataset.base_folder
    absent = not folder.exists()
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
    kept = _kept_indices(len(images.data), limit, split)
    labels = torch.tensor(images.targets, dtype=torch.int64)[torch.from_numpy(kept)]
    return ArrayImages(images.data[kept], [f"{kind}/{split}/{i}" for i in kept], labels, list(images.classes))


def _open_tree(split: str, root: Path, limit: int | None) -> FileImages:
    train_classes = class_folders(root, "train")
    folder = "train"
    if split == "test":
        folder = "val" if (root / "val").is_dir() else "test"
        if not (root / folder).is_dir():
            raise UserError(f"data.root {escape(str(root))}: there is neither a val nor a test folder in it")
        if (classes := class_folders(root, folder)) != train_classes:
            first = min(set(classes) ^ set(train_classes))
            other = folder if first in train_classes else "train"
            raise UserError(
                f"data.root {escape(str(root))}: train and {folder} must hold the same class folders, "
                f"but {escape(first)!r} is not in {other}"
            )
    names = [f"{folder}/{name}" for name in scan_images(root / folder)]
    class_index = {name: index for index, name in enumerate(train_classes)}
    for name in names:
        if name.count("/") < 2:
            raise UserError(f"data.root: {escape(str(root / name))} lies in no class folder; move it into one")
    labels = torch.tensor([class_index[name.split("/")[1]] for name in names], dtype=torch.int64)
    for class_name, size in zip(train_classes, labels.bincount(minlength=len(train_classes)), strict=True):
        if size == 0:
            raise UserError(f"data.root: class folder {escape(str(root / folder / class_name))} holds no image")
    kept = _kept_indices(len(names), limit, split)
    return FileImages(root, [names[i] for i in kept], labels[torch.from_numpy(kept)], train_classes)


def _open_listed(find: Callable[[Path, str], LabelledFiles], split: str, root: Path, limit: int | None) -> FileImages:
    files = find(root, split)
    kept = _kept_indices(len(files.names), limit, split)
    labels = torch.tensor(files.labels, dtype=torch.int64)[torch.from_numpy(kept)]
    source = FileImages(root, [files.names[i] for i in kept], labels, files.class_names)
    if files.held_out is not None:
        source.held_out = torch.tensor(files.held_out)[torch.from_numpy(kept)].nonzero()[:, 0]
    return source


def _open_folder(root: Path, limit: int | None) -> FileImages:
    names = scan_images(root)
    if not names:
        raise UserError(f"data.root {escape(str(root))} holds no {', '.join(sorted(SUFFIXES))} file")
    return FileImages(root, [names[i] for i in _kept_indices(len(names), limit, "train")], None, None)


def _open_list(root: Path | None, list_file: Path | None, limit: int | None) -> FileImages:
    if list_file is None:
        raise UserError("data.list_file is not set; data.kind 'list' needs a text file of image paths")
    root = list_file.parent if root is None else existing_root(root, "list")
    shown = f"data.list_file {escape(str(list_file))}"
    try:
        lines = list_file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {reason(error)}") from error
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        name = os.path.normpath(entry)
        if name in line_of:
            raise UserError(f"{shown}, line {number}: {escape(entry)} is on line {line_of[name]} already")
        if not os.path.isfile(root / name):
            raise UserError(f"{shown}, line {number}: there is no file {escape(str(root / name))}")
        line_of[name] = number
    if not line_of:
        raise UserError(f"{shown} lists no image")
    names = list(line_of)
    return FileImages(root, [names[i] for i in _kept_indices(len(names), limit, "train")], None, None)


def _refuse_test_split(kind: str, split: str) -> None:
    if split == "test":
        raise UserError(
            f"data.kind '{kind}' has no labels and so no test split; digits, cifar10, cifar100, tree, sun397, dtd and "
            "inaturalist2018 have one"
        )


def _kept_indices(count: int, limit: int | None, split: str) -> np.ndarray:
    """(limit,) int64: the images that a limit keeps, evenly spaced over 0 ... count - 1."""
    if limit is None:
        return np.arange(count, dtype=np.int64)
    if not 1 <= limit <= count:
        raise UserError(f"data.limit_{split} is {limit}, but the {split} split has {count} images: take 1 to {count}")
    return np.arange(limit, dtype=np.int64) * count // limit


def _check_headers(root: Path, names: list[str]) -> list[int]:
    """Sizes in bytes of the files, in order, after each one's header has been read; the first bad file is raised."""

    def check(start: int) -> list[int]:
        return [_check_header(root / name) for name in names[start : start + _HEADERS_PER_TASK]]

    with ThreadPoolExecutor() as pool:
        return [size for sizes in pool.map(check, range(0, len(names), _HEADERS_PER_TASK)) for size in sizes]


def _check_header(path: Path) -> int:
    try:
        size = path.stat().st_size
        if size == 0:
            raise ValueError("the file is empty")
        with open_image(path):
            return size
    except Exception as error:  # PIL's parsers raise OSError, SyntaxError, ValueError, struct.error and more
        raise UserError(f"cannot read image {escape(str(path))}: {reason(error)}; repair or remove it") from error


def open_image(path: Path) -> Image.Image:
    """The image of a file whose header has been read, by the decoders that are allowed, and within PIL's bound.

    Raises:
        OSError, ValueError, SyntaxError and others of PIL's, for what cannot be read.
    """
    image = Image.open(path, formats=_FORMATS)
    # PIL only warns up to twice the bound.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels exceed PIL's bound of {Image.MAX_IMAGE_PIXELS}"
        )
    return image


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    # PIL clips 16-bit grey at 255, which leaves a white image.
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
