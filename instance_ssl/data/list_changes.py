"""Finds known images in a list that has changed, and takes chosen images of a source."""

from collections.abc import Sequence

import numpy as np
import torch

from instance_ssl.data.image_sources import ImageSource, digest_of
from instance_ssl.data.name_table import hashes_of, take_rows


def places_of(known: Sequence[str], listed: Sequence[str]) -> np.ndarray:
    """(len(known),) int64: the place of each known name in a list without repetition, -1 where it is not in it."""
    hashes = hashes_of(listed)
    order = hashes.argsort(kind="stable")
    hashes = hashes[order]
    first, last = (np.searchsorted(hashes, hashes_of(known), side) for side in ("left", "right"))
    places = np.full(len(known), -1, np.int64)
    for index, name in enumerate(known):
        for place in order[first[index] : last[index]]:  # two names may have one hash
            if listed[int(place)] == name:
                places[index] = place
    return places


def taken(source: ImageSource, places: np.ndarray) -> ImageSource:
    """The images of a source of files at these places, (M,) int64, in this order: image i is that at places[i]."""
    columns = take_rows(source.columns, places)
    again = source.with_columns(columns)
    again.digest = digest_of(again.names, columns["sizes"], source.rendering)
    if source.held_out is not None:
        is_held_out = np.zeros(len(source), bool)
        is_held_out[source.held_out.numpy()] = True
        again.held_out = torch.from_numpy(is_held_out[places].nonzero()[0])
    return again
