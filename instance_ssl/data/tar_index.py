"""Indexes tar shards: where each image lies, and its label. The index is made from headers alone and kept in a file.

Nothing is unpacked: a member's name is only a name, and whatever is not a plain file is not an image.

Labels belong to images by name, anywhere in the shard. A stem is a name up to its last dot, folder included. The label
of `a.b.jpg` is `a.b.cls`, or else `a.cls`, as WebDataset's samples go up to the first dot. In the same way `a.seg.png`
belongs to the sample of `a.jpg`, and only `a.jpg` is an image of the data set.
"""

import os
import posixpath
import tarfile
import zipfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from instance_ssl.data.decode import open_image
from instance_ssl.data.folders import SUFFIXES
from instance_ssl.data.name_table import NameTable, pack_names, packed
from instance_ssl.errors import UserError, escape, reason
from instance_ssl.files.atomic import whole_file

_VERSION = 2  # 1 joined labels to neighbours, and kept every image of a sample
_NO_LABEL = -1
_MAX_IMAGE_BYTES = 1 << 30
_MAX_LABEL_BYTES = 32
_CHUNK_BYTES = 1 << 20
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COLUMNS = ("offsets", "sizes", "labels")


@dataclass(frozen=True)
class Remark:
    """Something that the user should know of `count` members; `example` is the first of them, escaped."""

    count: int = 0
    example: str = ""


@dataclass(frozen=True)
class ShardIndex:
    """The n images of a shard, in the order of its members.

    Attributes:
        names: of the members.
        offsets: (n,) int64, of each image's first byte.
        sizes: (n,) int64, in bytes.
        labels: (n,) int64; -1 where there is none.
        problems: row → what is wrong, for images whose header cannot be read.
        shard_bytes: size of the shard.
        remarks: .cls members that no image has; images excluded because their sample has one of its very name (`a.jpg`
            beside `a.seg.png`); images that share a sample without such a one (`a.jpg`, `a.png`) and are all taken.
    """

    names: NameTable
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    problems: dict[int, str]
    shard_bytes: int
    remarks: tuple[Remark, Remark, Remark]


class _Members:
    """Collects a shard's images and labels, archive by archive where `cat` has joined several archives."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._stems: list[str] = []
        self._offsets, self._sizes, self._archive_of = array("q"), array("q"), array("q")
        self._problems: dict[int, str] = {}
        self._labels: list[dict[str, int]] = []  # by archive and stem
        self._images: set[tuple[int, str]] = set()

    def begin_archive(self) -> None:
        """Starts another archive, in which names may occur again."""
        self._labels.append({})

    def add_image(self, member: tarfile.TarInfo, stem: str, problem: str | None) -> None:
        """Adds the next image."""
        if problem is not None:
            self._problems[len(self.names)] = problem
        self.names.append(member.name)
        self._offsets.append(member.offset_data)
        self._sizes.append(member.size if problem is None else 0)
        self._stems.append(stem)
        self._archive_of.append(len(self._labels) - 1)

    def add_label(self, stem: str, label: int) -> bool:
        """Adds a label, unless the stem has one in this archive already; returns whether it did."""
        is_first = stem not in self._labels[-1]
        self._labels[-1].setdefault(stem, label)
        return is_first

    def join(self, shard_bytes: int) -> ShardIndex:
        """Decides which images are taken and which label each has.

        Raises:
            ValueError: an image has no label in its own archive, and several in others.
        """
        if len(self._labels) > 1:
            self._images = set(zip(self._archive_of, self._stems, strict=True))
        first_with = {stem: place for place, stem in reversed(list(enumerate(self._stems)))}
        first_of: dict[tuple[int, str], int] = {}
        places, labels, further, alike = [], [], [], []
        used: set[tuple[int, str]] = set()
        for place, stem in enumerate(self._stems):
            key = self._find_label(place)
            shorter = [beginning for beginning in _beginnings(stem) if beginning != stem]
            if key is None or key[1] != stem:
                owner = next((first_with[beginning] for beginning in shorter if beginning in first_with), None)
                if owner is not None:
                    further.append((place, owner))
                    continue
            if key is not None:
                used.add(key)
            places.append(place)
            labels.append(_NO_LABEL if key is None else self._labels[key[0]][key[1]])
            sample = key or (self._archive_of[place], [stem, *shorter][-1])
            if (first := first_of.setdefault(sample, place)) != place:
                alike.append((place, first))
        rows = np.array(places, np.int64)
        return ShardIndex(
            packed(self.names[place] for place in places),
            np.array(self._offsets, np.int64)[rows],
            np.array(self._sizes, np.int64)[rows],
            np.array(labels, np.int64),
            {row: self._problems[place] for row, place in enumerate(places) if place in self._problems},
            shard_bytes,
            (self._unmatched(used), self._remark(further, "beside"), self._remark(alike, "and")),
        )

    def _find_label(self, place: int) -> tuple[int, str] | None:
        """Archive and stem of an image's label: the longest beginning that has one, preferably in its own archive.

        Another archive's label counts where that archive has no image of its own for it.
        """
        own = self._archive_of[place]
        for stem in _beginnings(self._stems[place]):
            if stem in self._labels[own]:
                return own, stem
            others = [n for n, labels in enumerate(self._labels) if stem in labels and (n, stem) not in self._images]
            if len(others) > 1:
                raise ValueError(f"holds {escape(stem)}.cls {len(others)} times: a sample has one label")
            if others:
                return others[0], stem
        return None

    def _unmatched(self, used: set[tuple[int, str]]) -> Remark:
        count = sum(map(len, self._labels)) - len(used)
        keys = ((archive, stem) for archive, labels in enumerate(self._labels) for stem in labels)
        return Remark(count, f"{escape(next(key for key in keys if key not in used)[1])}.cls") if count else Remark()

    def _remark(self, pairs: list[tuple[int, int]], word: str) -> Remark:
        if not pairs:
            return Remark()
        first, other = (escape(self.names[place]) for place in pairs[0])
        return Remark(len(pairs), f"{first} {word} {other}")


def _beginnings(stem: str) -> Iterator[str]:
    """The stem, then what precedes each dot of its last part, the longest first."""
    yield stem
    start = stem.rfind("/") + 1
    while (dot := stem.rfind(".", start + 1)) > 0:
        stem = stem[:dot]
        yield stem


def index_shard(shard: Path, *, every_member: bool) -> ShardIndex:
    """The index of a shard, from its index file if that fits the shard's size and time, otherwise from a scan.

    The index file lies beside the shard, or below ~/.cache/instance_ssl where the shard's folder is read-only.

    Args:
        every_member: whether all members but .cls are images, as in packed sets; otherwise the suffix decides.

    Raises:
        UserError: the shard cannot be read, is compressed, truncated or damaged, or a .cls is not a class index.
    """
    try:
        status = shard.stat()
        for path in _index_files(shard):
            if (known := _read(path, status, every_member)) is not None:
                return known
        index = _scan(shard, every_member)
    except OSError as error:
        raise UserError(f"data.root: {escape(str(shard))} cannot be read: {reason(error)}") from error
    for path in _index_files(shard):
        if _write(index, path, status, every_member=every_member):
            break
    return index


def _write(index: ShardIndex, path: Path, status: os.stat_result, *, every_member: bool) -> bool:
    """Writes an index file for a shard of this status, whole or not at all; returns whether that was possible."""
    content: dict[str, Any] = {
        "version": _VERSION,
        "shard": np.array([status.st_size, status.st_mtime_ns, every_member], np.int64),
        **pack_names(index.names),
        **{name: getattr(index, name) for name in _COLUMNS},
        "remark_counts": np.array([remark.count for remark in index.remarks], np.int64),
        **{f"remark_{key}": value for key, value in pack_names(r.example for r in index.remarks).items()},
        "broken": np.array(list(index.problems), np.int64),
        **{f"problem_{key}": value for key, value in pack_names(index.problems.values()).items()},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, several_writers=True) as temporary, temporary.open("xb") as file:
            np.savez(file, **content)
    except OSError:
        return False
    return True


def _index_files(shard: Path) -> list[Path]:
    tag = sha256(os.fsencode(shard.absolute())).hexdigest()[:32]
    beside = shard.with_name(shard.name + ".index")
    try:
        return [beside, Path.home() / ".cache/instance_ssl" / f"{tag}.index"]
    except RuntimeError:  # the user has no home directory
        return [beside]


def _read(path: Path, status: os.stat_result, every_member: bool) -> ShardIndex | None:
    """The index in a file; None where there is none, or it does not fit the shard as it is now."""
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        stamp = [status.st_size, status.st_mtime_ns, every_member]
        if content["version"] != _VERSION or content["shard"].tolist() != stamp:
            return None
        names = NameTable.checked(content["names"], content["name_ends"])
        problems = NameTable.checked(content["problem_names"], content["problem_name_ends"])
        columns = {name: content[name].astype(np.int64, casting="safe") for name in _COLUMNS}
        fits = (columns["sizes"] >= 0) & (columns["sizes"] <= status.st_size) & (columns["offsets"] >= 0)
        fits &= columns["offsets"] <= status.st_size - columns["sizes"]
        if any(len(column) != len(names) for column in columns.values()) or not fits.all():
            return None
        broken = dict(zip(content["broken"].tolist(), problems, strict=True))
        examples = NameTable.checked(content["remark_names"], content["remark_name_ends"])
        unmatched, further, alike = map(Remark, content["remark_counts"].tolist(), examples)
        remarks = unmatched, further, alike
        return ShardIndex(names, **columns, problems=broken, shard_bytes=status.st_size, remarks=remarks)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _scan(shard: Path, every_member: bool) -> ShardIndex:
    shown = f"data.root: {escape(str(shard))}"
    with shard.open("rb") as file:
        start = os.pread(file.fileno(), 8, 0)
        kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
        if kind is not None:
            raise UserError(f"{shown} is compressed by {kind}, and images are read in place: decompress it")
        size, found = os.fstat(file.fileno()).st_size, _Members()
        begin: int | None = 0
        while begin is not None:  # more than once where `cat` has joined archives
            end = _scan_archive(file, begin, found, every_member, shown)
            begin = _end_of_zeros(file, end)
    try:
        return found.join(size)
    except ValueError as error:
        raise UserError(f"{shown} {error}") from None


def _scan_archive(file: BinaryIO, begin: int, found: _Members, every_member: bool, shown: str) -> int:
    """Collects the members of the archive at byte `begin` of a shard; returns where its end mark is."""
    found.begin_archive()
    file.seek(begin)
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or it would keep them all
                # A sparse file takes fewer bytes in the tar than its size says.
                end = tar.offset if member.issparse() else member.offset_data + member.size
                if member.size < 0 or end > size:
                    raise UserError(f"{shown} ends within {escape(member.name)}: it is truncated; replace it")
                _take(found, tar, member, every_member, shown)
            mark = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)
    except UserError:
        raise
    except Exception as error:  # tarfile raises its own, and ValueError, OverflowError and more for odd headers
        raise UserError(f"{shown} is truncated or not a tar archive ({reason(error)}); replace it") from error
    if begin and tar.offset == begin:
        raise UserError(f"{shown} has bytes that are not a tar archive after its end mark, from byte {begin} on")
    if mark != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{shown} is truncated or damaged: it has no end mark at byte {tar.offset}; replace it")
    return tar.offset


def _end_of_zeros(file: BinaryIO, begin: int) -> int | None:
    """The place of the first byte from `begin` on that is not 0; None: there is none."""
    while chunk := os.pread(file.fileno(), _CHUNK_BYTES, begin):
        if rest := chunk.lstrip(b"\0"):
            return begin + len(chunk) - len(rest)
        begin += len(chunk)
    return None


def _take(found: _Members, tar: tarfile.TarFile, member: tarfile.TarInfo, every_member: bool, shown: str) -> None:
    """Adds a member if it is an image or the class index of one."""
    name = posixpath.normpath(member.name)  # ./a.cls is the label of a.jpg
    if member.isdir() or (posixpath.basename(name).startswith(".") and not every_member):
        return
    stem, suffix = posixpath.splitext(name)
    place = len(found.names)
    if suffix.lower() == ".cls":
        label = _read_label(tar, member, shown)
        # A packed set has each label right after its image, whatever their names.
        if not found.add_label(str(place - 1) if every_member else stem, label):
            raise UserError(f"{shown} holds {escape(member.name)} twice: a sample has one label")
    elif every_member or suffix.lower() in SUFFIXES:
        found.add_image(member, str(place) if every_member else stem, _problem(tar, member))


def _why_not_plain(member: tarfile.TarInfo) -> str | None:
    if member.issparse():
        return "it is stored as a sparse file: make the tar without --sparse"
    if member.issym():
        return f"it is a symbolic link to {escape(member.linkname)}: make the tar with --dereference"
    if member.islnk():
        return f"it is a hard link to {escape(member.linkname)}: make the tar with --hard-dereference"
    return None if member.isreg() else "it is a device or a pipe"


def _problem(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
    """What the header says is wrong with an image; None: nothing."""
    if (problem := _why_not_plain(member)) is not None:
        return problem
    if member.size == 0:
        return "the file is empty"
    if member.size > _MAX_IMAGE_BYTES:
        return f"{member.size} bytes are more than an image file may have"
    try:
        with _bytes_of(tar, member) as file, open_image(file):
            return None
    except Exception as error:  # PIL's parsers raise OSError, SyntaxError, ValueError, struct.error and more
        return reason(error)


def _read_label(tar: tarfile.TarFile, member: tarfile.TarInfo, shown: str) -> int:
    if (problem := _why_not_plain(member)) is not None:
        raise UserError(f"{shown}: {escape(member.name)} is not a class index: {problem}")
    if member.size > _MAX_LABEL_BYTES:
        raise UserError(f"{shown}: {escape(member.name)} holds {member.size} bytes, not a class index from 0 on")
    with _bytes_of(tar, member) as file:
        text = file.read()
    try:
        label = int(text)
    except ValueError:
        label = -1
    if not 0 <= label < 2**63:
        raise UserError(f"{shown}: {escape(member.name)} holds {text!r}, not a class index from 0 on")
    return label


def _bytes_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    """A view of a plain member's bytes in the shard; despite the method's name nothing is extracted."""
    return cast(BinaryIO, tar.extractfile(member))
