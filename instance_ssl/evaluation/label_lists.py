"""Chooses the labelled training images: from lists of file names, as SimCLR publishes them, or by a balanced draw.

SimCLR's lists for ImageNet are imagenet_subsets/1percent.txt and 10percent.txt of google-research/simclr: a file name
a line (n01440764_10026.JPEG), without its folder.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from instance_ssl.errors import UserError, escape, reason, tried
from instance_ssl.files.name_lists import read_names, write_names


def read_label_list(path: Path, names: Sequence[str]) -> Tensor:
    """Reads the ids (n,), int64 and ascending, of the images that a list names.

    Args:
        path: one name a line (see name_lists.py): of the file alone, or as in `names`.
        names: of all training images, by id; folders are separated by "/".

    Raises:
        UserError: when the list cannot be read, is empty, or names an image that is repeated, missing or ambiguous.
    """
    shown = f"label list {escape(tried(path))}"
    ids_of: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        ids_of.setdefault(_file_name(name), []).append(index)
    ids_of |= {name: [index] for index, name in enumerate(names)}
    try:
        entries = [name for _, name in read_names(path, ids_of.__contains__)]
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{shown}, {reason(error)}") from None
    if not entries:
        raise UserError(f"{shown} names no image")
    repeated = [entry for entry, count in Counter(entries).items() if count > 1]
    if repeated:
        raise UserError(f"{shown} names {len(repeated)} images twice, the first {repeated[0]!r}: take out one of each")
    absent = [entry for entry in entries if entry not in ids_of]
    if absent:
        raise UserError(
            f"{shown} names {len(absent)} of {len(entries)} images that are not among the {len(names)} training "
            f"images, the first {absent[0]!r}: give the list that belongs to these images"
        )
    unclear = [entry for entry in entries if len(ids_of[entry]) > 1]
    if unclear:
        raise UserError(f"{shown}: several folders hold a {unclear[0]!r}: write names with their folders")
    ids = torch.tensor([ids_of[entry][0] for entry in entries], dtype=torch.int64).sort().values
    if len(ids.unique()) < len(ids):
        raise UserError(f"{shown} names an image twice, with its folder and without: take out one")
    return ids


def draw_balanced(labels: Tensor, count: int, seed: int) -> Tensor:
    """Draws `count` ids, int64 and ascending, equally many of each class (which classes give one more is drawn).

    A class with too few images gives all of them, and the others give more.

    Args:
        labels: classes of all images, by id.
        count: 1 … all.
        seed: decides which.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    labels = labels.cpu()[order]
    by_class, sizes_C = labels.argsort(stable=True), labels.bincount()
    firsts_C = sizes_C.cumsum(dim=0) - sizes_C
    turns = torch.empty_like(order)  # of each image: how many of its class come before it
    turns[by_class] = torch.arange(len(order)) - firsts_C[labels[by_class]]
    return order[turns.argsort(stable=True)[:count]].sort().values


def write_label_list(path: Path, names: Sequence[str], ids: Tensor) -> None:
    """Writes a list that `read_label_list` reads: file names, or full names where two files share theirs."""
    files = [_file_name(name) for name in names]
    kept = files if len(set(files)) == len(files) else list(names)
    write_names((kept[index] for index in ids.tolist()), path)


def _file_name(name: str) -> str:
    return name.rpartition("/")[2]
