"""The names of millions of images as two arrays: a list of strings would take a hundred bytes more for each."""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import overload

import numpy as np

_NAMES_PER_CHUNK = 1 << 16


class NameTable(Sequence[str]):
    """N names. Each takes its bytes and 8 more, and may hold any bytes that a file's name may.

    A table is equal to any sequence of the same strings.

    Args:
        columns: holds the arrays that `pack_names` returns; it may hold others.
    """

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        self._text, self._ends = columns["names"], columns["name_ends"]

    @classmethod
    def checked(cls, text: np.ndarray, ends: np.ndarray) -> "NameTable":
        """A table of two arrays from a file.

        Raises:
            ValueError: the arrays do not belong together.
        """
        is_typed = ends.dtype == np.int64 and text.dtype == np.uint8 and len(ends) > 0
        if not is_typed or ends[0] != 0 or ends[-1] != len(text) or (np.diff(ends) < 0).any():
            raise ValueError("not a table of names")
        return cls({"names": text, "name_ends": ends})

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"name {index} of {count}")
        start = index % count
        return self._text[self._ends[start] : self._ends[start + 1]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _NAMES_PER_CHUNK):
            places = self._ends[first : first + _NAMES_PER_CHUNK + 1]
            chunk = self._text[places[0] : places[-1]].tobytes()
            for start, end in pairwise((places - places[0]).tolist()):
                yield chunk[start:end].decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<NameTable of {len(self)} names>"


def pack_names(names: Iterable[str]) -> dict[str, np.ndarray]:
    """`names` (bytes,) uint8 and `name_ends` (N + 1,) int64: name i is bytes name_ends[i] … name_ends[i + 1]."""
    text, ends = bytearray(), array("q", [0])
    for name in names:
        text += name.encode("utf-8", "surrogateescape")
        ends.append(len(text))
    return {"names": np.frombuffer(text, np.uint8), "name_ends": np.frombuffer(ends, np.int64)}


def packed(names: Iterable[str]) -> NameTable:
    """The names as a table."""
    return NameTable(pack_names(names))


def take_rows(columns: Mapping[str, np.ndarray], places: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of the names at these places, (M,) int64, and of whatever else has an entry per name."""
    names = NameTable(columns)
    others = {key: column[places] for key, column in columns.items() if key not in ("names", "name_ends")}
    return {**pack_names(names[place] for place in places.tolist()), **others}


def hashes_of(names: Sequence[str]) -> np.ndarray:
    """(N,) int64: Python's hash of each name."""
    return np.fromiter((hash(name) for name in names), np.int64, count=len(names))


def repetitions(names: NameTable) -> dict[int, int]:
    """Place → place of the first equal name, ascending, for every name that occurred before."""
    hashes = hashes_of(names)
    order = hashes.argsort(kind="stable")
    alike = (hashes[order[1:]] == hashes[order[:-1]]).nonzero()[0]
    first_of: dict[str, int] = {}
    places = sorted({*order[alike].tolist(), *order[alike + 1].tolist()})
    firsts = {place: first_of.setdefault(names[place], place) for place in places}
    return {place: first for place, first in firsts.items() if place != first}
