"""Lists of images that have changed: which image is which, by name, so that every one keeps its id."""

import itertools
from collections.abc import Sequence

import numpy as np

from instance_ssl.data.image_sources import ImageSource, digest_of, names_digest
from instance_ssl.data.name_table import pack_names

_NAMES = ("names", "name_ends")


def places_of(known: Sequence[str], listed: Sequence[str]) -> np.ndarray:
    """(len(known),) int64: the place of each known name in a list without repetition, -1 where it is not in it."""
    hashes = _hashes(listed)
    order = hashes.argsort(kind="stable")
    hashes = hashes[order]
    first, last = (np.searchsorted(hashes, _hashes(known), side) for side in ("left", "right"))
    places = np.full(len(known), -1, np.int64)
    for index, name in enumerate(known):
        for place in order[first[index] : last[index]]:  # two names may have one hash
            if listed[int(place)] == name:
                places[index] = place
    return places


def _hashes(names: Sequence[str]) -> np.ndarray:
    return np.fromiter((hash(name) for name in names), np.int64, count=len(names))


def rearranged(
    source: ImageSource, names: Sequence[str], sizes: np.ndarray, places: np.ndarray, absent: dict[int, str]
) -> ImageSource:
    """The same images, with the ids of a list that was: those of the source that are not in it come behind, in order.

    Args:
        source: has sizes in bytes.
        names: N names as they were.
        sizes: (N,) their sizes in bytes.
        places: (N,) of each in the source; -1: it is not there, keeps its id, name and size, and cannot be read.
        absent: id → why, of those.
    """
    is_new = np.ones(len(source), bool)
    is_new[places[places >= 0]] = False
    new = is_new.nonzero()[0]
    taken = np.concatenate([places, new])
    columns = {name: source.columns[name][taken] for name in source.columns if name not in _NAMES}
    for column in columns.values():
        column[taken < 0] = 0
    columns["sizes"][: len(sizes)] = sizes
    columns |= pack_names(itertools.chain(names, (source.names[int(place)] for place in new)))
    again = source.with_columns(columns)
    again.digest, again.absent = names_digest(columns, source.rendering), absent
    return again


def digest_of_first(source: ImageSource, count: int) -> str:
    """The digest of a source of the first `count` images alone; of one without sizes, no digest at all."""
    if "sizes" not in source.columns:
        return ""
    return digest_of(itertools.islice(source.names, count), source.columns["sizes"][:count], source.rendering)
