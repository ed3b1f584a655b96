"""Pictures for the page, as data URIs: what stages have drawn, and images beside their hardest classes."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from instance_ssl.checkpoint.directory import read_tensors
from instance_ssl.config.experiment import DataConfig
from instance_ssl.data.image_sources import FileImages, ImageSource, label_column, read_instances
from instance_ssl.data.list_changes import places_of
from instance_ssl.data.name_table import pack_names, packed
from instance_ssl.errors import UserError
from instance_ssl.evaluation.embedding_map import plane
from instance_ssl.report.runs import Run
from instance_ssl.report.svg import Dot, label_colour, map_chart
from instance_ssl.report.tables import word
from instance_ssl.run.images import open_split, rendering_of

_GALLERY_CLASSES, _GALLERY_HARDEST, _THUMBNAIL = 10, 10, 64


def picture(path: Path, alt: str) -> str:
    """A PNG that a stage has drawn, or nothing where it is not there."""
    try:
        data = path.read_bytes()
    except OSError:
        return ""
    return f'<div class="scroll paper"><img src="{_uri(data)}" alt="{escape(alt)}"></div>'


def hard_class_gallery(run: Run) -> str:
    """Images beside those of their hardest classes, by the newest checkpoint; says why where there are none."""
    if "pretrain" not in run.stages:
        return ""
    checkpoint = run.newest_checkpoint()
    if checkpoint is None or run.config is None:
        return _note("the training has written no checkpoint yet")
    try:
        hard = _hard_classes(checkpoint)
        if hard is None:
            return _note("this run smooths no labels, so it keeps no hardest classes")
        source = _open_some(run.directory, run.config.data, [i for image, others in hard for i in (image, *others)])
        rows = _gallery_rows(source, [len(others) for _, others in hard])
    except UserError as error:
        return _note(str(error))
    legend = "" if source.labels is None else '<span class="key same"></span>same class <span class="key other"></span>'
    note = f"{legend}{'another class; ' if legend else ''}by {checkpoint.name}, hardest first"
    return f'<div class="scroll"><div class="gallery">{rows}</div></div><p class="small">{note}</p>'


def embedding_maps(file: Path) -> str:
    """The test images of every source in the plane, coloured by class; nothing where no sample was kept."""
    if not file.exists():
        return ""
    try:
        content = read_tensors(file)
        labels, names, sources = content["labels"], content["class_names"], content["sources"]
        figures = [_map(source, sample, labels, names) for source, sample in sources.items()]
    except (UserError, KeyError) as error:
        return _note(f"{file.name} cannot be shown ({error})")
    return f'<div class="charts">{"".join(figures)}</div>{_label_legend(labels, names)}'


class _Chosen(ImageSource):
    """Some images of a source, by number, in any order."""

    def __init__(self, source: ImageSource, ids: Sequence[int]) -> None:
        labels = None if source.labels is None else source.labels[torch.tensor(ids)]
        columns = {**pack_names(source.names[i] for i in ids), **label_column(labels)}
        super().__init__(columns, source.class_names, source.digest)
        self._source, self._ids = source, ids

    def load(self, index: int) -> Image.Image:
        return self._source.load(self._ids[index])


@dataclass(frozen=True)
class _Thumbnail:
    """An image as a tag, with its name to hover over; `kind` is a CSS class."""

    source: ImageSource
    index: int
    kind: str = ""

    def html(self) -> str:
        image = self.source.load(self.index)
        factor = max(1, _THUMBNAIL // max(image.size))
        if factor > 1:
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=True)
        name = self.source.names[self.index]
        if self.source.labels is not None and self.source.class_names is not None:
            name += f" ({self.source.class_names[int(self.source.labels[self.index])]})"
        return (
            f'<img class="{self.kind}" src="{_uri(buffer.getvalue())}" alt="{escape(name)}" title="{escape(name)}" '
            f'width="{_THUMBNAIL}" height="{_THUMBNAIL}">'
        )


def _gallery_rows(source: ImageSource, lengths: Sequence[int]) -> str:
    """Rows of an image and so many others, which follow it in the source."""
    rows, query = [], 0
    for length in lengths:
        others = range(query + 1, query + 1 + length)
        hardest = "".join(_Thumbnail(source, other, _kind(source, query, other)).html() for other in others)
        first = _Thumbnail(source, query, "query").html()
        rows.append(f'<div class="row">{first}<span class="gap"></span>{hardest}</div>')
        query += 1 + length
    return "".join(rows)


def _kind(source: ImageSource, query: int, other: int) -> str:
    if source.labels is None:
        return ""
    return "same" if source.labels[other] == source.labels[query] else "other"


def _hard_classes(checkpoint: Path) -> list[tuple[int, list[int]]] | None:
    """Some classes, evenly spaced, with their hardest ones; None where the checkpoint has none.

    Raises:
        UserError: when the checkpoint's rows cannot be read.
    """
    parts = [tuple(int(part) for part in path.stem.split("_")[1:]) for path in checkpoint.glob("rows_*.pt")]
    total = max((last for _, last in parts), default=0)
    wanted = torch.linspace(0, total - 1, min(total, _GALLERY_CLASSES), dtype=torch.float64).long().unique().tolist()
    found = []
    for first, last in sorted(parts):
        hard_nK = read_tensors(checkpoint / f"rows_{first:09d}_{last:09d}.pt").get("hard_classes")
        if hard_nK is None:
            return None
        for i in wanted:
            if first <= i < last:
                hardest = hard_nK[i - first, :_GALLERY_HARDEST]
                found.append((i, hardest[hardest >= 0].tolist()))
    return [(i, hardest) for i, hardest in found if hardest]  # a class whose row is not finite has none


def _open_some(run: Path, data: DataConfig, ids: Sequence[int]) -> ImageSource:
    """These images of the run's list, in this order; of folders no other file is looked at.

    Raises:
        UserError: when they are not there any more.
    """
    try:
        names = packed(read_instances(run / "instances.txt"))
        chosen = [names[i] for i in ids]
    except (OSError, IndexError):
        raise UserError(f"{run / 'instances.txt'} does not name the images of the checkpoint") from None
    if data.kind in ("tree", "folder", "list"):
        root = data.root or (data.list_file.parent if data.list_file else None)
        if root is None:
            raise UserError("data.root is not set: the images cannot be found")
        if data.kind != "tree":
            return FileImages(root, chosen, None, None, rendering=rendering_of(data))
        folders = [name.split("/")[1] for name in chosen]
        classes = sorted(set(folders))
        labels = torch.tensor([classes.index(folder) for folder in folders])
        return FileImages(root, chosen, labels, classes, rendering=rendering_of(data))
    whole = open_split(data, "train")
    places = places_of(chosen, whole.names).tolist()
    if gone := [name for name, place in zip(chosen, places, strict=True) if place < 0]:
        raise UserError(f"data.root: {gone[0]} is not there any more")
    return _Chosen(whole, places)


def _map(source: str, sample: dict[str, Tensor], labels: Tensor, names: Sequence[str] | None) -> str:
    points, method = plane(sample["components"])
    own = labels[sample["ids"]].tolist()
    count = int(labels.max()) + 1
    dots = [
        Dot(x, -y, label_colour(label, count), f"{names[label] if names else label} (test image {index})")
        for (x, y), label, index in zip(points.tolist(), own, sample["ids"].tolist(), strict=True)
    ]
    caption = f"<figcaption>{escape(word(source))} <span>{escape(method)}, {len(dots)} images</span></figcaption>"
    return f'<figure class="chart">{caption}{map_chart(dots, f"map of {word(source)}")}</figure>'


def _label_legend(labels: Tensor, names: Sequence[str] | None) -> str:
    count = int(labels.max()) + 1
    if count > 20:
        return f'<p class="small">{count} classes; hover over a point for its name</p>'
    keys = "".join(
        f'<span class="key" style="background:{label_colour(label, count)}"></span>'
        f"{escape(str(names[label] if names else label))} "
        for label in range(count)
    )
    return f'<p class="legend">{keys}</p>'


def _note(text: str) -> str:
    return f'<p class="small">{escape(text)}</p>'


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
