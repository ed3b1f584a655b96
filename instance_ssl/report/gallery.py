"""Images beside those of their hardest classes, by the newest checkpoint of a run."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from instance_ssl.checkpoint.directory import read_tensors
from instance_ssl.config.experiment import DataConfig
from instance_ssl.data.datasets import class_of
from instance_ssl.data.image_sources import FileImages, ImageSource, read_instances
from instance_ssl.data.list_changes import places_of
from instance_ssl.data.name_table import packed
from instance_ssl.errors import UserError
from instance_ssl.evaluation.embedding_map import evenly_spaced
from instance_ssl.report.pictures import png_uri
from instance_ssl.report.runs import Run
from instance_ssl.run.images import open_split, rendering_of

THUMBNAIL_PIXELS = 64
_CLASSES, _HARDEST = 10, 10
# A data URI, the image's name, and its kind: query, same, other or "" (no labels).
_Thumbnail = tuple[str, str, str]


def hard_class_gallery(run: Run) -> tuple[str, list[list[_Thumbnail]], bool] | None:
    """A note, rows of an image and those of its hardest classes, and whether there are labels.

    Without rows the note says why. None where the training has not begun.
    """
    if "pretrain" not in run.stages:
        return None
    checkpoint = run.newest_checkpoint()
    if checkpoint is None or run.config is None:
        return "the training has written no checkpoint yet", [], False
    try:
        hard = _hard_classes(checkpoint)
        if hard is None:
            return "this run smooths no labels, so it keeps no hardest classes", [], False
        source, ids = _open_some(run.directory, run.config.data, [i for row in hard for i in row])
        places = iter(ids)
        rows = [_thumbnails(source, [next(places) for _ in row]) for row in hard]
    except UserError as error:
        return str(error), [], False
    return f"by {checkpoint.name}, hardest first", rows, source.labels is not None


def _thumbnails(source: ImageSource, ids: Sequence[int]) -> list[_Thumbnail]:
    """The first image is the query, the others are those of its hardest classes."""
    labels = None if source.labels is None else source.labels[torch.tensor(ids)].tolist()
    row = []
    for place, index in enumerate(ids):
        name, kind = source.names[index], "query" if place == 0 else ""
        if labels is not None:
            kind = kind or ("same" if labels[place] == labels[0] else "other")
            name += f" ({source.class_names[labels[place]]})" if source.class_names is not None else ""
        row.append((_thumbnail_uri(source.load(index)), name, kind))
    return row


def _thumbnail_uri(image: Image.Image) -> str:
    factor = max(1, THUMBNAIL_PIXELS // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return png_uri(buffer.getvalue())


def _hard_classes(checkpoint: Path) -> list[list[int]] | None:
    """Some classes, evenly spaced, each followed by its hardest ones; None where the checkpoint has none.

    Raises:
        UserError: when the checkpoint's rows cannot be read.
    """
    parts = sorted(tuple(int(part) for part in path.stem.split("_")[1:]) for path in checkpoint.glob("rows_*.pt"))
    wanted = evenly_spaced(max((last for _, last in parts), default=0), _CLASSES).tolist()
    found = []
    for first, last in parts:
        hard_nK = read_tensors(checkpoint / f"rows_{first:09d}_{last:09d}.pt").get("hard_classes")
        if hard_nK is None:
            return None
        for i in wanted:
            if first <= i < last:
                hardest = hard_nK[i - first, :_HARDEST]
                found.append([i, *hardest[hardest >= 0].tolist()])
    return [row for row in found if len(row) > 1]


def _open_some(run: Path, data: DataConfig, ids: Sequence[int]) -> tuple[ImageSource, Sequence[int]]:
    """A source with these images of the run's list, and their places in it; of a folder only their files are opened.

    Raises:
        UserError: when one of them is gone.
    """
    try:
        names = packed(read_instances(run / "instances.txt"))
        chosen = [names[i] for i in ids]
    except (OSError, IndexError):
        raise UserError(f"{run / 'instances.txt'} does not name the images of the checkpoint") from None
    if data.kind not in ("tree", "class_folders", "folder", "list"):
        whole = open_split(data, "train")
        places = places_of(chosen, whole.names).tolist()
        if gone := [name for name, place in zip(chosen, places, strict=True) if place < 0]:
            raise UserError(f"data.root: {gone[0]} is gone")
        return whole, places
    root = data.root or (data.list_file.parent if data.list_file else None)
    if root is None:
        raise UserError("data.root is not set: the images cannot be found")
    labels, classes = None, None
    if data.kind in ("tree", "class_folders"):
        folders = [name.split("/")[1] if data.kind == "tree" else class_of(name) for name in chosen]
        classes = sorted(set(folders))
        labels = torch.tensor([classes.index(folder) for folder in folders])
    return FileImages(root, chosen, labels, classes, rendering=rendering_of(data)), range(len(chosen))
