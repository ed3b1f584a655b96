"""Nearest training images of a few queries: a search over all ranks, and a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.evaluation.knn import ShardedBank

SAME_CLASS = (26, 152, 80)
OTHER_CLASS = (215, 48, 39)
NO_LABEL = (170, 170, 170)
_COLOURS = {True: SAME_CLASS, False: OTHER_CLASS, None: NO_LABEL}
_LEGEND = {"same class as the query": SAME_CLASS, "another class": OTHER_CLASS}
_INK = (34, 34, 34)
_PALE_INK = (110, 110, 110)
_PAPER = (255, 255, 255)
_BAND = (244, 245, 247)
# Sizes in pixels.
_TITLE_SIZE, _NAME_SIZE, _NOTE_SIZE = 20, 15, 13
_HEADER, _FOOTER, _MARGIN = 94, 40, 16
_FRAME, _GAP, _COLUMN_GAP = 3, 4, 26


@dataclass(frozen=True)
class NeighbourRow:
    """One row of the picture.

    Attributes:
        query: the image.
        neighbours: for every representation, by the name in its header, the nearest training images, nearest first,
            and whether each has the query's class (None: no labels). All rows have the same names.
    """

    query: Image.Image
    neighbours: Mapping[str, Sequence[tuple[Image.Image, bool | None]]]


def nearest_neighbours(bank_nF: Tensor, queries_qF: Tensor, group: Group, k: int) -> Tensor:
    """Global ids (q, k) of the bank images of highest cosine similarity, nearest first, ties by lower id.

    Args:
        bank_nF: this rank's part of the bank, numbered in order of rank.
        queries_qF: a handful of queries, the same on all ranks.
        k: neighbours of each query.

    Raises:
        UserError: when the bank has fewer than k images.
    """
    bank = ShardedBank(bank_nF, group)
    if not 1 <= k <= bank.total:
        raise UserError(f"nearest neighbours: {k} of {bank.total} training images; choose from 1 to {bank.total}")
    return bank.search(queries_qF, k)[1]


def percentage_correct(rows: Sequence[NeighbourRow], name: str) -> float | None:
    """Per cent of representation `name`'s labelled neighbours that have their query's class; None without labels."""
    verdicts = [verdict for row in rows for _, verdict in row.neighbours[name] if verdict is not None]
    return 100 * sum(verdicts) / len(verdicts) if verdicts else None


def draw_neighbours(
    path: Path,
    rows: Sequence[NeighbourRow],
    *,
    title: str = "Nearest training images",
    thumbnail_pixels: int = 48,
) -> None:
    """Writes a PNG: each query at the left, then its neighbours under each representation.

    Neighbours of the query's class have green frames, others red ones, unlabelled ones grey; the header gives each
    representation's share of green ones.

    Args:
        path: the PNG.
        rows: at least one query.
        title: the line at the top.
        thumbnail_pixels: side of an image in the picture; smaller images are enlarged without smoothing.
    """
    columns = _columns(rows)
    cell = thumbnail_pixels + 2 * _FRAME
    widths = [column.width(cell) for column in columns]
    contents = sum(widths) + (len(widths) - 1) * _COLUMN_GAP
    contents = max(contents, _text_width(title, _TITLE_SIZE), _legend_width())
    band = cell + 2 * _GAP
    canvas = Image.new("RGB", (contents + 2 * _MARGIN, _HEADER + len(rows) * band + _FOOTER), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, 12), title, _INK, ImageFont.load_default(_TITLE_SIZE))
    for top in range(_HEADER, _HEADER + len(rows) * band, 2 * band):
        draw.rectangle((_MARGIN // 2, top, canvas.width - _MARGIN // 2 - 1, top + band - 1), _BAND)
    left = _MARGIN
    for column, width in zip(columns, widths, strict=True):
        draw.text((left, 46), column.name, _INK, ImageFont.load_default(_NAME_SIZE))
        draw.text((left, 68), column.note, _PALE_INK, ImageFont.load_default(_NOTE_SIZE))
        for line, images in enumerate(column.lines):
            for place, (image, colour) in enumerate(images):
                framed = ImageOps.expand(_fit_square(image, thumbnail_pixels), _FRAME, colour)
                canvas.paste(framed, (left + place * (cell + _GAP), _HEADER + line * band + _GAP))
        left += width + _COLUMN_GAP
    if any(column.note for column in columns):
        _draw_legend(draw, canvas.height - 28)
    canvas.save(path, format="PNG")


@dataclass(frozen=True)
class _Column:
    """A header and, for every row of the picture, images with the colours of their frames."""

    name: str
    note: str
    lines: Sequence[Sequence[tuple[Image.Image, tuple[int, int, int]]]]

    def width(self, cell: int) -> int:
        images = max(len(images) for images in self.lines) * (cell + _GAP) - _GAP
        return max(images, _text_width(self.name, _NAME_SIZE), _text_width(self.note, _NOTE_SIZE))


def _columns(rows: Sequence[NeighbourRow]) -> list[_Column]:
    columns = [_Column("query", "", [[(row.query, _INK)] for row in rows])]
    for name in rows[0].neighbours:
        percentage = percentage_correct(rows, name)
        note = "" if percentage is None else f"{percentage:.0f} % same class"
        lines = [[(image, _COLOURS[verdict]) for image, verdict in row.neighbours[name]] for row in rows]
        columns.append(_Column(name, note, lines))
    return columns


def _draw_legend(draw: ImageDraw.ImageDraw, top: int) -> None:
    left = _MARGIN
    for text, colour in _LEGEND.items():
        draw.rectangle((left, top + 2, left + 11, top + 13), outline=colour, width=_FRAME)
        draw.text((left + 18, top), text, _PALE_INK, ImageFont.load_default(_NOTE_SIZE))
        left += 40 + _text_width(text, _NOTE_SIZE)


def _legend_width() -> int:
    return sum(40 + _text_width(text, _NOTE_SIZE) for text in _LEGEND)


def _text_width(text: str, size: int) -> int:
    return round(ImageFont.load_default(size).getlength(text))


def _fit_square(image: Image.Image, side: int) -> Image.Image:
    """Fits the whole image into a square; small images are first enlarged by a whole factor to keep sharp pixels."""
    image = image.convert("RGB")
    factor = -(-side // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    image = image.resize(size, Image.Resampling.BOX)
    square = Image.new("RGB", (side, side), _PAPER)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
