"""Sources of images whose index is a stable instance id, and so the class that the instance classifier learns."""

import hashlib
import io
import logging
import mmap
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from instance_ssl.data.columns import Columns
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
from instance_ssl.data.folders import differs_here, escape
from instance_ssl.data.name_table import NameTable, pack_names
from instance_ssl.data.unreadable_images import REFUSE, OnBroken, check_files
from instance_ssl.errors import RankError, reason
from instance_ssl.files.name_lists import list_line, read_lines, write_names

logger = logging.getLogger(__name__)

_PROBED_FILES = 64
# A byte that all processes forked from this one share: whether one has said that PIL reads what torchvision refuses.
_SAID = mmap.mmap(-1, 1)


class ImageSource(ABC):
    """N images in a fixed order; the position of an image is its instance id.

    All that has an entry an image lies in `columns`, so a source pickles cheaply once those lie in a file, and one rank
    can open it and hand it to the others.

    Args:
        columns: of N entries each: what `pack_names` gives, `labels` (N,) int64 where there are any, and what an
            implementation keeps there.

    Attributes:
        names: one name an image: the path relative to the root for files, such as "digits/train/17" for arrays.
        class_names: the name of each class index, or None with `labels`.
        digest: SHA-256 in hexadecimal; what it covers, each implementation says.
        held_out: ids, (n,) int64, of the training images that the data set itself keeps for the choice of parameters;
            None where it has no such part.
        left_out: the images that cannot be read and have no id, a line each with the name and the reason.
        remarks: what the user should know of the data set, a line each.
        rendering: how files become pixels.
    """

    names: Sequence[str]
    class_names: list[str] | None
    digest: str
    held_out: torch.Tensor | None = None
    left_out: Sequence[str] = ()
    remarks: Sequence[str] = ()
    rendering: Rendering = AS_STORED

    def __init__(self, columns: Mapping[str, np.ndarray], class_names: list[str] | None, digest: str) -> None:
        self.columns = Columns(columns)
        self.names = NameTable(self.columns)
        self.class_names, self.digest = class_names, digest

    @property
    def labels(self) -> torch.Tensor | None:
        """(N,) int64 class indices, not to be written to; None where the images have no labels."""
        if "labels" not in self.columns:
            return None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.columns["labels"])

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shard_starts(self) -> np.ndarray | None:
        """(S,) int64, ascending from 0: the first image of each stretch that lies in one shard; None without shards."""
        return None

    def missing_here(self) -> str | None:
        """What this machine lacks of the images, after another machine has opened them; None when nothing."""
        return None

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Image `index` in RGB mode.

        Raises:
            RankError: the image cannot be read; one line that names the file.
        """

    def load_pixels(self, index: int, choose_reduction: ChooseReduction) -> torch.Tensor:
        """Image `index` as (3, H, W) uint8, RGB; by up to the factor chosen smaller, where its format allows that.

        `choose_reduction` gets the image's width and height and is called once, before anything is decoded.

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
        columns = {**pack_names(names), "pixels": pixels, **label_column(labels)}
        super().__init__(columns, class_names, digest.hexdigest())

    @property
    def pixels(self) -> np.ndarray:
        """(N, H, W, 3) uint8, not to be written to."""
        return self.columns["pixels"]

    def load(self, index: int) -> Image.Image:
        """Image `index` in RGB mode, a copy."""
        return Image.fromarray(self.pixels[index])


class EncodedImages(ImageSource):
    """Images that lie somewhere as the bytes of a JPEG, PNG or WebP file, decoded when asked for.

    `digest` covers the names, the sizes in bytes, in order, and the rendering.

    Args:
        columns: with `sizes`, (N,) int64, in bytes.
    """

    def __init__(
        self, columns: Mapping[str, np.ndarray], class_names: list[str] | None, rendering: Rendering = AS_SHOWN
    ) -> None:
        super().__init__(columns, class_names, names_digest(columns, rendering))
        self.rendering = rendering

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
        """Image `index` in RGB mode, turned and composed as `rendering` says; 16-bit grey keeps its upper 8 bits.

        Raises:
            RankError: the file is gone, truncated or otherwise undecodable.
        """
        with self._named(index), open_image(io.BytesIO(self.read(index))) as image:
            return convert_to_rgb(image, self.rendering)

    def load_pixels(self, index: int, choose_reduction: ChooseReduction) -> torch.Tensor:
        """Image `index` as (3, H, W) uint8, RGB; a JPEG smaller by the factor chosen.

        Raises:
            RankError: the file is gone, truncated or otherwise undecodable.
        """
        with self._named(index):
            return decode_pixels(
                self.read(index), choose_reduction, self.rendering, lambda error: self._say_refused(index, error)
            )

    def _say_refused(self, index: int, error: Exception) -> None:
        """Says once that there are files like this one."""
        if not _SAID[0]:
            _SAID[0] = 1
            why = reason(error).rpartition(", ")[2]  # the place in torchvision's sources comes before
            where = self.where(index)
            logger.warning("%s: torchvision's decoder refuses it (%s), so Pillow's reads it and its like", where, why)

    @contextmanager
    def _named(self, index: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise RankError(
                f"cannot decode {self.where(index)} (image {index}): {reason(error)}; repair or replace the file"
            ) from error


class FileImages(EncodedImages):
    """JPEG, PNG and WebP files under one root, decoded when asked for.

    `digest` does not cover the contents: reading a large data set whole at each start costs too much. A file replaced
    by another of the same size goes unnoticed.

    Every header is read once here, so an empty or foreign file is found before training rather than in its midst. Those
    that are left out have no id: the next one has it.

    Args:
        root: folder that the names are relative to.
        names: relative POSIX paths.
        labels: one int64 for each, or None.
        class_names: the name of each label, or None.
        on_broken: what becomes of a file that is missing, empty, too large, or no JPEG, PNG or WebP image.
        held_out: for each whether it is in the data set's own held-out part, or None.
        rendering: how the files become pixels.

    Raises:
        UserError: where `on_broken` does not let a file pass.
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
        packed = pack_names(names)
        listed = NameTable(Columns(packed))
        sizes, problems = check_files(root, listed, on_broken)
        columns = {**packed, "sizes": sizes, **label_column(labels)}
        if problems:
            self.left_out = [f"{list_line(listed[index])}: {why}" for index, why in problems.items()]
            kept = np.delete(np.arange(len(listed)), list(problems))
            columns = {**pack_names(listed[int(i)] for i in kept), "sizes": sizes[kept], **label_column(labels, kept)}
            held_out = None if held_out is None else held_out[torch.from_numpy(kept)]
        super().__init__(columns, class_names, rendering)
        if held_out is not None:
            self.held_out = held_out.nonzero()[:, 0]

    def missing_here(self) -> str | None:
        """The first of some files, evenly spread, that is absent or of another size on this machine."""
        for index in range(0, len(self), max(1, len(self) // _PROBED_FILES)):
            problem = differs_here(self.root / self.names[index], int(self.columns["sizes"][index]))
            if problem is not None:
                return problem
        return None

    def read(self, index: int) -> bytes:
        """The file of image `index`, as it is."""
        # A Path and a buffer would make 42 µs of 32.
        with open(os.path.join(self.root, self.names[index]), "rb", buffering=0) as file:
            return file.read()

    def where(self, index: int) -> str:
        """The file's path."""
        return escape(str(self.root / self.names[index]))


def label_column(labels: torch.Tensor | None, kept: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The labels as a column, those of the `kept` rows alone where given; nothing where there are none."""
    if labels is None:
        return {}
    return {"labels": labels.numpy() if kept is None else labels.numpy()[kept]}


def names_digest(columns: Mapping[str, np.ndarray], rendering: Rendering) -> str:
    """SHA-256 of the names and the sizes in bytes, in order: the same for the same files, in folders or in tars."""
    return digest_of(NameTable(Columns(columns)), columns["sizes"], rendering)


def digest_of(names: Iterable[str], sizes: np.ndarray, rendering: Rendering) -> str:
    """`names_digest` of names and as many sizes."""
    digest = hashlib.sha256()
    for name, size in zip(names, sizes.tolist(), strict=True):
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0%d\0" % size)
    if rendering != AS_STORED:  # of which digests from before there was a choice are
        digest.update(repr(rendering).encode())
    return digest.hexdigest()


def write_instances(source: ImageSource, path: Path) -> None:
    """Writes the name of image i to line i, counted from 0, of `path`: N lines, all or nothing; see name_lists.py."""
    write_names(source.names, path)


def read_instances(path: Path) -> Iterator[str]:
    """The names that `write_instances` wrote, in order; raises OSError where there is no such file."""
    return read_lines(path)
