"""Sources of images whose index is a stable instance id, and so the class that the instance classifier learns."""

import hashlib
import io
import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from instance_ssl.data.decoding import convert_to_rgb, open_image
from instance_ssl.data.folders import escape, reason
from instance_ssl.errors import RankError, UserError

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


class EncodedImages(ImageSource):
    """Images that lie somewhere as the bytes of a JPEG, PNG or WebP file, decoded when asked for."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The file of image `index`, as it is.

        Raises:
            OSError: it cannot be read.
        """

    @abstractmethod
    def where(self, index: int) -> str:
        """What a message calls the file of image `index`, in one line."""

    def load(self, index: int) -> Image.Image:
        """Image `index` in RGB mode: transparency is dropped, 16-bit grey keeps its upper 8 bits.

        The EXIF orientation is left alone, as torchvision's ImageFolder does.

        Raises:
            RankError: the file is gone, truncated or otherwise undecodable.
        """
        try:
            with open_image(io.BytesIO(self.read(index))) as image:
                return convert_to_rgb(image)
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error and more
            raise RankError(
                f"cannot decode {self.where(index)} (image {index}): {reason(error)}; repair or replace the file"
            ) from error


class FileImages(EncodedImages):
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

    def read(self, index: int) -> bytes:
        """The file of image `index`, as it is."""
        return (self.root / self.names[index]).read_bytes()

    def where(self, index: int) -> str:
        """The file's path."""
        return escape(str(self.root / self.names[index]))


def write_instances(source: ImageSource, path: Path) -> None:
    r"""Writes the name of image i to line i, counted from 0, of `path`: N lines, all or nothing.

    Newlines, carriage returns and backslashes within a name are written as \n, \r and \\.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        file.writelines(escape(name) + "\n" for name in source.names)
    os.replace(temporary, path)


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
