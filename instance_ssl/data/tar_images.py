"""Images in tar shards of WebDataset's layout, read in place through an index of their offsets."""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np

from instance_ssl.data.decode import Rendering
from instance_ssl.data.folders import existing_root
from instance_ssl.data.image_sources import EncodedImages
from instance_ssl.data.name_table import NameTable, pack_names, repetitions, take_rows
from instance_ssl.data.pack import PackedSet, read_packed_set
from instance_ssl.data.tar_index import ShardIndex, index_shard
from instance_ssl.data.unreadable_images import OnBroken
from instance_ssl.errors import UserError, escape, tried
from instance_ssl.files.name_lists import list_line

_OPEN_SHARDS = 64
# Where the shards of a split are looked for below the root; the first pattern that matches counts.
_PLACES = {"train": ("train/*.tar", "train*.tar"), "test": ("val/*.tar", "val*.tar", "test/*.tar", "test*.tar")}
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_REMARKS = (
    "labels without an image: {count:,}, such as {example}; a .cls has its image's name up to the last dot",
    "images ignored because their sample has one of its very name: {count:,}, such as {example}",
    "images that share a sample with another: {count:,}, such as {example}; each is an instance of its own",
)


class TarImages(EncodedImages):
    """Images of tar shards: shards ordered by name, images by their place in the shard.

    Args:
        shards: S tar files.
        shard_bytes: size of each.
        columns: also `shards` (N,) int32, ascending, and `offsets` (N,) int64: where each image begins.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        shard_bytes: Sequence[int],
        columns: dict[str, np.ndarray],
        class_names: list[str] | None,
        rendering: Rendering,
    ) -> None:
        super().__init__(columns, class_names, rendering)
        self._shards, self._shard_bytes = list(shards), list(shard_bytes)
        self._open: dict[int, IO[bytes]] = {}

    @property
    def shard_starts(self) -> np.ndarray:
        """(S,) int64, ascending from 0: the first image of each stretch that lies in one shard."""
        return np.flatnonzero(np.diff(self.columns["shards"], prepend=-1))

    def probes(self) -> list[tuple[Path, int]]:
        """Every shard and its size."""
        return list(zip(self._shards, self._shard_bytes, strict=True))

    def read(self, index: int) -> bytes:
        """The bytes of image `index`. Forked processes may share open files: pread moves no position."""
        size = int(self.columns["sizes"][index])
        file = self._opened(int(self.columns["shards"][index]))
        content = os.pread(file.fileno(), size, int(self.columns["offsets"][index]))
        if len(content) != size:
            raise OSError("the tar shard ends within it")
        return content

    def where(self, index: int) -> str:
        """The shard's path and the image's name."""
        return _where(self._shards, self.columns, index)

    def _opened(self, shard: int) -> IO[bytes]:
        file = self._open.get(shard)
        if file is None:
            if len(self._open) >= _OPEN_SHARDS:
                self._open.pop(next(iter(self._open))).close()
            file = self._shards[shard].open("rb", buffering=0)
            if os.fstat(file.fileno()).st_size != self._shard_bytes[shard]:
                file.close()
                raise OSError("the tar shard has changed since it was indexed")
            self._open[shard] = file
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def open_tar(
    root: Path | None,
    pattern: str | None,
    split: str,
    keep: Callable[[int], np.ndarray],
    on_broken: OnBroken,
    rendering: Rendering,
) -> TarImages:
    """Opens those images of a split that are kept and can be read.

    The train split has the shards that `pattern` names, or root/train/*.tar, root/train*.tar or else all of root/*.tar;
    the test split root/val/*.tar, root/val*.tar, root/test/*.tar or root/test*.tar. In a packed set, which has a record
    in its folder, every member but .cls is an image.

    Args:
        root: `data.root`; may be None where `pattern` is given.
        pattern: `data.shards`, relative to the root: a path with *, ?, [a-z], {a,b} and {000..146} in it.
        keep: number of images, readable or not -> the places to keep, (n,) int64.

    Raises:
        UserError: one line that names the key and the path at fault, or an image that `on_broken` refuses.
    """
    shards = _find_shards(root, pattern, split)
    packed_set = _packed_set(shards, complete=pattern is None)
    indexes = _index_all(shards, packed_set)
    remarks = _remarks(indexes, shards)
    columns, class_names = _join(indexes, shards, remarks), None
    if "labels" in columns and packed_set is not None:
        class_names = packed_set.class_names or []
        if (highest := int(columns["labels"].max())) >= len(class_names):
            where = escape(str(shards[0].parent))
            raise UserError(
                f"data.root: {where} has images of class {highest}, but only {len(class_names)} class names"
            )
    elif "labels" in columns:
        values, class_names = _classes(indexes) if split == "train" else _train_classes(root, pattern)
        columns["labels"] = _numbered(columns["labels"], values, shards[0].parent)
        if (highest := int(class_names[-1])) >= len(class_names) and split == "train":
            remarks.append(
                f"labels run from {class_names[0]} to {highest} with {len(class_names):,} in use, which are the classes"
            )
    names = NameTable(columns)
    kept = keep(len(names))
    starts = accumulate((len(index.names) for index in indexes), initial=0)
    problems = {
        first + row: why for first, index in zip(starts, indexes, strict=False) for row, why in index.problems.items()
    }
    broken = [place for place in kept.tolist() if place in problems] if problems else []
    on_broken.judge([(_where(shards, columns, place), problems[place]) for place in broken], len(kept))
    if broken or len(kept) < len(names):
        columns = take_rows(columns, kept[~np.isin(kept, broken)])
    images = TarImages(shards, [index.shard_bytes for index in indexes], columns, class_names, rendering)
    images.remarks = remarks
    images.left_out = [f"{list_line(names[place])}: {problems[place]}" for place in broken]
    return images


def _where(shards: Sequence[Path], columns: Mapping[str, np.ndarray], place: int) -> str:
    return escape(f"{shards[columns['shards'][place]]}: {NameTable(columns)[place]}")


def _index_all(shards: Sequence[Path], packed_set: PackedSet | None) -> list[ShardIndex]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda shard: index_shard(shard, every_member=packed_set is not None), shards))


def _remarks(indexes: Sequence[ShardIndex], shards: Sequence[Path]) -> list[str]:
    found = []
    for kind, text in enumerate(_REMARKS):
        of_kind = [(index.remarks[kind], shard) for index, shard in zip(indexes, shards, strict=True)]
        if count := sum(remark.count for remark, _ in of_kind):
            example, shard = next((remark.example, shard) for remark, shard in of_kind if remark.count)
            found.append(text.format(count=count, example=f"{example} in {escape(str(shard))}"))
    return found


def _join(indexes: Sequence[ShardIndex], shards: Sequence[Path], remarks: Sequence[str]) -> dict[str, np.ndarray]:
    """Concatenates the columns of all shards. Repeated names get #2, #3 and so on at their end.

    Raises:
        UserError: there is no image, or only some images have a label.
    """
    columns = pack_names(name for index in indexes for name in index.names)
    counts = [len(index.names) for index in indexes]
    if sum(counts) == 0:
        raise UserError(f"data.root: {escape(str(shards[0].parent))} has tar shards without any image")
    columns["shards"] = np.repeat(np.arange(len(indexes), dtype=np.int32), counts)
    for name in ("offsets", "sizes", "labels"):
        columns[name] = np.concatenate([getattr(index, name) for index in indexes])
    names = NameTable(columns)
    unlabelled = (columns["labels"] < 0).nonzero()[0]
    if len(unlabelled) == len(names):
        del columns["labels"]
    elif len(unlabelled):
        place = int(unlabelled[0])
        lacking = f"data.root: {_where(shards, columns, place)} has no .cls, as other images have: "
        raise UserError("; ".join([f"{lacking}give all of them one, or none", *remarks]))
    if repeated := repetitions(names):
        columns |= pack_names(_told_apart(names, repeated))
    return columns


def _told_apart(names: NameTable, repeated: dict[int, int]) -> Iterator[str]:
    counts: Counter[int] = Counter()
    for place, name in enumerate(names):
        if (first := repeated.get(place)) is None:
            yield name
        else:
            counts[first] += 1
            yield f"{name}#{counts[first] + 1}"


def _classes(indexes: Sequence[ShardIndex]) -> tuple[np.ndarray, list[str]]:
    """The labels in use, ascending, and the same as text."""
    values = np.unique(np.concatenate([index.labels for index in indexes]))
    values = values[values >= 0]
    return values, [str(value) for value in values.tolist()]


def _train_classes(root: Path | None, pattern: str | None) -> tuple[np.ndarray, list[str]]:
    """The same for the train split. A packed one names its classes; names that are numbers are the labels."""
    shards = _find_shards(root, pattern, "train")
    packed_set = _packed_set(shards, complete=pattern is None)
    if packed_set is None:
        return _classes(_index_all(shards, None))
    names = packed_set.class_names or []
    numbers = sorted(int(name) for name in names if name.isdecimal())
    return np.array(numbers if names == [str(n) for n in numbers] else range(len(names)), np.int64), names


def _numbered(labels: np.ndarray, values: np.ndarray, folder: Path) -> np.ndarray:
    """The labels as places in `values`, which ascend; a label that is not among them is a UserError."""
    if len(absent := np.setdiff1d(labels, values)):
        raise UserError(
            f"data.root: {escape(str(folder))} has images of class {absent[0]}, which no training image has: "
            "a .cls must hold one of the classes of the train split"
        )
    return np.searchsorted(values, labels)


def _packed_set(shards: Sequence[Path], *, complete: bool) -> PackedSet | None:
    folder = shards[0].parent
    if any(shard.parent != folder for shard in shards) or (packed_set := read_packed_set(folder)) is None:
        return None
    names = [shard.name for shard in shards]
    odd = set(names) ^ set(packed_set.shards) if complete else set(names) - set(packed_set.shards)
    if odd:
        what = "is not in the record of" if min(odd) in names else "is absent from"
        raise UserError(f"data.root: {escape(str(folder / min(odd)))} {what} this packed set; pack the images again")
    return packed_set


def _find_shards(root: Path | None, pattern: str | None, split: str) -> list[Path]:
    """The shards of a split, at least one, ordered by name."""
    if split == "train" and pattern is not None:
        base = "" if root is None else str(existing_root(root, "tar"))
        found: set[str] = set()
        for text in _expand(pattern):  # an absent file without wildcards gets its own error later
            has_magic = glob.has_magic(text)
            found |= {*glob.glob(os.path.join(glob.escape(base), text))} if has_magic else {os.path.join(base, text)}
        if not found:
            raise UserError(f"data.shards {escape(pattern)} names no tar shard below {escape(os.path.abspath(base))}")
        return sorted(Path(path) for path in found)
    root = existing_root(root, "tar")
    for place in _PLACES[split]:
        if found := set(glob.glob(place, root_dir=root)):
            return [root / name for name in sorted(found)]
    rest = [name for name in glob.glob("*.tar", root_dir=root) if not name.startswith(("val", "test"))]
    if split == "train" and rest:
        return [root / name for name in sorted(rest)]
    above = root.absolute().parent
    if any(glob.glob(place, root_dir=above) for place in _PLACES[split]):
        raise UserError(
            f"data.root {escape(tried(root))} holds no {split} shard, but {escape(str(above))} does: give that folder"
        )
    raise UserError(
        f"data.root {escape(tried(root))} holds no {split} shard: {', '.join(_PLACES[split])} "
        f"(runners/pack_dataset.py --split {split} makes them)"
    )


def _expand(pattern: str) -> list[str]:
    """`{a,b}` and `{000..146}` written out, as shells and WebDataset do."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    if (bounds := _RANGE.fullmatch(braces[1])) is None:
        inner = braces[1].split(",")
    else:
        inner = [str(number).zfill(len(bounds[1])) for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [text for part in inner for text in _expand(before + part + after)]
