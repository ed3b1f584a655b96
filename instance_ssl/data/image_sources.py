"""Sources of images. An image's index is its instance id, the class that the instance classifier learns for it."""

import copy
import hashlib
import io
import logging
import mmap
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image

from instance_ssl.data.decode import (
    AS_SHOWN,
    AS_STORED,
    ChooseReduction,
    Rendering,
    convert_to_rgb,
    decode_pixels,
    image_pixels,
    open_image,
)
from instance_ssl.data.name_table import NameTable, pack_names, take_rows
from instance_ssl.data.unreadable_images import REFUSE, OnBroken, check_files
from instance_ssl.errors import RankError, escape, reason
from instance_ssl.files.name_lists import list_line, read_lines, write_names

logger = logging.getLogger(__name__)

_PROBED_FILES = 64
# A byte shared with all forked processes: whether one of them has warned that PIL reads what torchvision refuses.
_HAS_WARNED = mmap.mmap(-1, 1)


class ImageSource(ABC):
    """N images in a fixed order; the position of an image is its instance id.

    Everything with an entry per image is in `columns`, so that all processes of a machine can map the same files of it;
    the rest of a source pickles to a few bytes.

    Args:
        columns: arrays with an entry per image: what `pack_names` returns, `labels` (N,) int64 where there are any, and
            what an implementation adds.

    Attributes:
        names: N names: for files the path relative to the root, for arrays such as "digits/train/17".
        class_names: the name of each class index; None without `labels`.
        digest: SHA-256 in hexadecimal; each implementation says what it covers.
        held_out: (n,) int64, ids of the training images that the data set reserves for choosing parameters; None where
            it has no such part.
        left_out: a line for each image that could not be read and so has no id, with its name and the reason.
        remarks: what the user should know of the data set, a line each.
        rendering: how orientation and transparency of files are treated.
    """

    names: Sequence[str]
    class_names: list[str] | None
    digest: str
    held_out: torch.Tensor | None = None
    left_out: Sequence[str] = ()
    remarks: Sequence[str] = ()
    rendering: Rendering = AS_STORED

    def __init__(self, columns: Mapping[str, np.ndarray], class_names: list[str] | None, digest: str) -> None:
        self.columns = columns
        self.names = NameTable(columns)
        self.class_names, self.digest = class_names, digest

    @property
    def labels(self) -> torch.Tensor | None:
        """(N,) int64 class indices, read-only; None where the images have no labels."""
        if "labels" not in self.columns:
            return None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.columns["labels"])

    def __len__(self) -> int:
        return len(self.names)

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> Self:
        """A copy of this source on other columns."""
        changed = copy.copy(self)
        changed.columns, changed.names = columns, NameTable(columns)
        return changed

    @property
    def shard_starts(self) -> np.ndarray | None:
        """(S,) int64, ascending from 0: the first image of each run of images in one shard; None without shards."""
        return None

    def probes(self) -> list[tuple[Path, int]]:
        """Files and their sizes in bytes, by which another machine can tell whether it has the same images."""
        return []

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Image `index` in RGB mode.

        Raises:
            RankError: the image is gone, truncated or otherwise undecodable; one line that names the file.
        """

    def load_pixels(self, index: int, choose_reduction: ChooseReduction) -> torch.Tensor:
        """Image `index` as (3, H, W) uint8, RGB, smaller by up to the chosen factor where its format allows that.

        Args:
            choose_reduction: called once with the image's width and height, before pixels are decoded.

        Raises:
            RankError: the image cannot be read; one line that names the file.
        """
        image = self.load(index)
        choose_reduction(*image.size)
        return image_pixels(image)


class ArrayImages(ImageSource):
    """Images held in memory as one array; `digest` covers the raw pixels and the array's shape, not the labels.

    Args:
        pixels: (N, H, W, 3) uint8.
        names: N names.
        labels: (N,) int64, or None.
        class_names: the name of each label, or None.
    """

    def __init__(
        self, pixels: np.ndarray, names: Sequence[str], labels: torch.Tensor | None, class_names: list[str] | None
    ) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or len(pixels) != len(names):
            raise ValueError(f"expected {len(names)} uint8 RGB images, got {pixels.dtype} of shape {pixels.shape}")
        pixels = np.ascontiguousarray(pixels)
        digest = hashlib.sha256(repr(pixels.shape).encode())
        digest.update(pixels.reshape(-1).data)
        columns = {**pack_names(names), "pixels": pixels, **_label_column(labels)}
        super().__init__(columns, class_names, digest.hexdigest())

    def load(self, index: int) -> Image.Image:
        """Image `index` in RGB mode, a copy."""
        return Image.fromarray(self.columns["pixels"][index])


class EncodedImages(ImageSource):
    """JPEG, PNG or WebP files, wherever their bytes lie, decoded on demand.

    `digest` covers the names and the sizes in bytes, in order, and the rendering.

    Args:
        columns: include `sizes` (N,) int64, in bytes.
    """

    def __init__(
        self, columns: Mapping[str, np.ndarray], class_names: list[str] | None, rendering: Rendering = AS_SHOWN
    ) -> None:
        super().__init__(columns, class_names, digest_of(NameTable(columns), columns["sizes"], rendering))
        self.rendering = rendering

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of image `index`'s file.

        Raises:
            OSError: it cannot be read.
        """

    @abstractmethod
    def where(self, index: int) -> str:
        """The name of image `index`'s file in messages, escaped."""

    def load(self, index: int) -> Image.Image:
        """Image `index` in RGB mode, turned and composed as `rendering` says; 16-bit grey keeps its upper 8 bits."""
        try:
            with open_image(io.BytesIO(self.read(index))) as image:
                return convert_to_rgb(image, self.rendering)
        except Exception as error:
            raise self._undecodable(index, error) from error

    def load_pixels(self, index: int, choose_reduction: ChooseReduction) -> torch.Tensor:
        """Image `index` as (3, H, W) uint8, RGB; a JPEG is smaller by the chosen factor."""
        try:
            return decode_pixels(self.read(index), choose_reduction, self.rendering, partial(self._warn_once, index))
        except Exception as error:
            raise self._undecodable(index, error) from error

    def _warn_once(self, index: int, error: Exception) -> None:
        if not _HAS_WARNED[0]:
            _HAS_WARNED[0] = 1
            why = reason(error).rpartition(", ")[2]  # without the line in torchvision's sources
            where = self.where(index)
            logger.warning("%s: torchvision's decoder refuses it (%s), so Pillow's reads it and its like", where, why)

    def _undecodable(self, index: int, error: Exception) -> RankError:
        return RankError(
            f"cannot decode {self.where(index)} (image {index}): {reason(error)}; repair or replace the file"
        )


class FileImages(EncodedImages):
    """JPEG, PNG and WebP files under one root, decoded on demand.

    `digest` does not cover the contents, as reading a large data set whole at each start costs too much. A file
    replaced by another of the same size goes unnoticed.

    The constructor reads every header once, so empty and foreign files show before the training. Files that are
    excluded then get no id; the next file takes it.

    Args:
        root: folder that the names are relative to.
        names: relative POSIX paths.
        labels: one int64 for each name, or None.
        class_names: the name of each label, or None.
        on_broken: what to do about a file that is missing, empty, too large, or not a JPEG, PNG or WebP image.
        held_out: for each name whether it is in the data set's own held-out part, or None.
        rendering: how orientation and transparency are treated.

    Raises:
        UserError: where `on_broken` refuses a file.
    """

    def __init__(
        self,
        root: Path,
        names: Iterable[str],
        labels: torch.Tensor | None,
        class_names: list[str] | None,
        on_broken: OnBroken = REFUSE,
        held_out: torch.Tensor | None = None,
        rendering: Rendering = AS_SHOWN,
    ) -> None:
        self.root = root
        columns = pack_names(names)
        listed = NameTable(columns)
        columns["sizes"], problems = check_files(root, listed, on_broken)
        columns |= _label_column(labels)
        if problems:
            self.left_out = [f"{list_line(listed[index])}: {why}" for index, why in problems.items()]
            kept = np.delete(np.arange(len(listed)), list(problems))
            columns = take_rows(columns, kept)
            held_out = None if held_out is None else held_out[torch.from_numpy(kept)]
        super().__init__(columns, class_names, rendering)
        if held_out is not None:
            self.held_out = held_out.nonzero()[:, 0]

    def probes(self) -> list[tuple[Path, int]]:
        """Some files, evenly spread, and their sizes."""
        places = range(0, len(self), max(1, len(self) // _PROBED_FILES))
        return [(self.root / self.names[i], int(self.columns["sizes"][i])) for i in places]

    def read(self, index: int) -> bytes:
        """The bytes of image `index`'s file."""
        # With a Path and a buffer it would take 42 µs instead of 32.
        with open(os.path.join(self.root, self.names[index]), "rb", buffering=0) as file:
            return file.read()

    def where(self, index: int) -> str:
        """The file's path, escaped."""
        return escape(str(self.root / self.names[index]))


def _label_column(labels: torch.Tensor | None) -> dict[str, np.ndarray]:
    return {} if labels is None else {"labels": labels.numpy()}


def digest_of(names: Iterable[str], sizes: np.ndarray, rendering: Rendering) -> str:
    """SHA-256 of as many names as sizes in bytes, in order: equal for the same files in folders and in tars."""
    digest = hashlib.sha256()
    for name, size in zip(names, sizes.tolist(), strict=True):
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0%d\0" % size)
    if rendering != AS_STORED:  # older digests are of images as stored
        digest.update(repr(rendering).encode())
    return digest.hexdigest()


def write_instances(source: ImageSource, path: Path) -> None:
    """Writes the N names to `path`, whole or not at all: image i's in line i, from 0; see name_lists.py."""
    write_names(source.names, path)


def read_instances(path: Path) -> Iterator[str]:
    """Reads the names that `write_instances` wrote, in order; raises OSError where there is no such file."""
    return read_lines(path)
