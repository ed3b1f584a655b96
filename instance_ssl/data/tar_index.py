"""Where the images of a tar shard lie in it: found once, from the headers alone, and kept in a file beside the shard.

Nothing is ever unpacked: whatever a member is called, its name is only a name, and what is no plain file is no image.
"""

import contextlib
import os
import secrets
import tarfile
import zipfile
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from instance_ssl.data.decoding import open_image
from instance_ssl.data.folders import SUFFIXES, escape, reason
from instance_ssl.data.name_table import NameTable, pack_names, packed
from instance_ssl.errors import UserError

_VERSION = 1
_MAX_IMAGE_BYTES = 1 << 30
_NO_LABEL = -1
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COLUMNS = ("offsets", "sizes", "labels")


@dataclass(frozen=True)
class ShardIndex:
    """The n images of a shard, in the order of its members.

    Attributes:
        names: of the members.
        offsets: (n,) int64, of each image's first byte.
        sizes: (n,) int64, in bytes.
        labels: (n,) int64; -1 where there is none.
        problems: by place, what is wrong with images whose header cannot be read.
        shard_bytes: of the shard itself.
    """

    names: NameTable
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    problems: dict[int, str]
    shard_bytes: int


@dataclass
class _Found:
    """What a scan has found so far. A sample is a run of members with one name up to the first dot of the file's."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)
    sample: str | None = None
    label: int = _NO_LABEL
    unlabelled: list[int] = field(default_factory=list)

    def enter(self, sample: str) -> None:
        if sample != self.sample:
            self.sample, self.label, self.unlabelled = sample, _NO_LABEL, []

    def add_image(self, member: tarfile.TarInfo, problem: str | None) -> None:
        place = len(self.names)
        self.names.append(member.name)
        self.offsets.append(member.offset_data)
        self.sizes.append(member.size if problem is None else 0)
        self.labels.append(self.label)
        self.unlabelled.append(place)
        if problem is not None:
            self.problems[place] = problem

    def add_label(self, label: int) -> None:
        """Of the images of this sample before it that have none of their own yet, or else of those after it."""
        for place in self.unlabelled:
            self.labels[place] = label
        self.label, self.unlabelled = label, []


def index_shard(shard: Path, *, every_member: bool) -> ShardIndex:
    """The index of a shard: its file where that is of this very shard (by size and time), otherwise a scan.

    The file is written beside the shard, or below ~/.cache/instance_ssl where that may not be written to.

    Args:
        every_member: whether all members but .cls are images, as in packed sets; otherwise the suffix decides.

    Raises:
        UserError: the shard cannot be read, is compressed, truncated or damaged, or a .cls is no class index.
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


def _index_file(shard: Path) -> Path:
    """Where the index of a shard lies, if its folder may be written to."""
    return shard.with_name(shard.name + ".index")


def _write(index: ShardIndex, path: Path, status: os.stat_result, *, every_member: bool) -> bool:
    """Writes an index file, whole or not at all; whether that was possible.

    Args:
        status: of the shard that it is of.
    """
    content: dict[str, Any] = {
        "version": _VERSION,
        "shard": np.array([status.st_size, status.st_mtime_ns, every_member], np.int64),
        **pack_names(index.names),
        **{name: getattr(index, name) for name in _COLUMNS},
        "broken": np.array(list(index.problems), np.int64),
        **{f"problem_{key}": value for key, value in pack_names(index.problems.values()).items()},
    }
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            np.savez(file, **content)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False
    return True


def _index_files(shard: Path) -> list[Path]:
    tag = sha256(os.fsencode(shard.absolute())).hexdigest()[:32]
    try:
        return [_index_file(shard), Path.home() / ".cache/instance_ssl" / f"{tag}.index"]
    except RuntimeError:  # nobody's home
        return [_index_file(shard)]


def _read(path: Path, status: os.stat_result, every_member: bool) -> ShardIndex | None:
    """The index in a file; None where there is none, or not of the shard as it is now."""
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        if content["version"] != _VERSION:
            return None
        if content["shard"].tolist() != [status.st_size, status.st_mtime_ns, every_member]:
            return None
        names = NameTable.of(content["names"], content["name_ends"])
        problems = NameTable.of(content["problem_names"], content["problem_name_ends"])
        columns = {name: content[name].astype(np.int64, casting="safe") for name in _COLUMNS}
        fits = (columns["sizes"] >= 0) & (columns["sizes"] <= status.st_size) & (columns["offsets"] >= 0)
        fits &= columns["offsets"] <= status.st_size - columns["sizes"]
        if any(len(column) != len(names) for column in columns.values()) or not fits.all():
            return None
        broken = dict(zip(content["broken"].tolist(), problems, strict=True))
        return ShardIndex(names, **columns, problems=broken, shard_bytes=status.st_size)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _scan(shard: Path, every_member: bool) -> ShardIndex:
    shown = f"data.root: {escape(str(shard))}"
    with shard.open("rb") as file:
        start = os.pread(file.fileno(), 8, 0)
        kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
        if kind is not None:
            raise UserError(f"{shown} is compressed by {kind}, and images are read in place: decompress it")
        size, found = os.fstat(file.fileno()).st_size, _Found()
        try:
            with tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # or it would remember them all
                    if member.size < 0 or member.offset_data + member.size > size:
                        raise UserError(f"{shown} ends within {escape(member.name)}: it is truncated; replace it")
                    _take(found, tar, member, every_member, shown)
                end = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)
        except UserError:
            raise
        except Exception as error:  # tarfile raises its own, and ValueError, OverflowError and more for odd headers
            raise UserError(f"{shown} is truncated or no tar archive ({reason(error)}); replace it") from error
    if end != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{shown} is truncated or damaged: it has no end mark at byte {tar.offset}; replace it")
    offsets, sizes, labels = (np.array(getattr(found, name), np.int64) for name in _COLUMNS)
    return ShardIndex(packed(found.names), offsets, sizes, labels, found.problems, size)


def _take(found: _Found, tar: tarfile.TarFile, member: tarfile.TarInfo, every_member: bool, shown: str) -> None:
    """Adds a member if it is an image or the class index of one."""
    folder, _, base = member.name.rpartition("/")
    if member.isdir() or (base.startswith(".") and not every_member):
        return
    suffix = os.path.splitext(base)[1].lower()
    found.enter(f"{folder}/{base.partition('.')[0]}")
    if suffix == ".cls" and member.isreg():
        found.add_label(_read_label(tar, member, shown))
    elif every_member or suffix in SUFFIXES:
        found.add_image(member, _problem(tar, member))


def _problem(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
    """What is wrong with an image, as far as its header tells."""
    if not member.isreg() or member.issparse():
        return "a link, a device or a sparse file in a tar is not an image"
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
    with _bytes_of(tar, member) as file:
        text = file.read(32)
    try:
        label = int(text)
    except ValueError:
        label = _NO_LABEL
    if not 0 <= label < 2**31:
        raise UserError(f"{shown}: {escape(member.name)} holds {text!r}, no class index from 0 on")
    return label


def _bytes_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    """A view of a plain member's bytes, where they lie; nothing is written, whatever the method is called."""
    return cast(BinaryIO, tar.extractfile(member))
