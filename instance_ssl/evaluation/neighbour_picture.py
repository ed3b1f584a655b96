"""Draws the nearest training images of a few queries under each representation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

SAME_CLASS = (26, 152, 80)
OTHER_CLASS = (215, 48, 39)
_LEGEND = {"same class as the query": SAME_CLASS, "another class": OTHER_CLASS}
_INK = (34, 34, 34)
_PALE_INK = (110, 110, 110)
_PAPER = (255, 255, 255)
_BAND = (244, 245, 247)
_TITLE = "Nearest training images"
# Sizes in pixels.
_TITLE_SIZE, _NAME_SIZE, _NOTE_SIZE = 20, 15, 13
_HEADER, _FOOTER, _MARGIN = 94, 40, 16
_FRAME, _GAP, _COLUMN_GAP = 3, 4, 26


class NeighbourRow(NamedTuple):
    """A query and, by the name of each representation, its nearest training images: (image, is of the query's class).

    Nearest first; all rows have the same names.
    """

    query: Image.Image
    neighbours: Mapping[str, Sequence[tuple[Image.Image, bool]]]


def draw_neighbours(path: Path, rows: Sequence[NeighbourRow], thumbnail_pixels: int = 48) -> None:
    """Writes a PNG: each query at the left, then its neighbours under each representation.

    Neighbours of the query's class have green frames, others red ones; the header gives the share of green ones.

    Args:
        rows: at least one.
        thumbnail_pixels: side of an image in the picture; smaller images are enlarged without smoothing.
    """
    columns = [("query", "", [[(row.query, _INK)] for row in rows])]
    for name in rows[0].neighbours:
        verdicts = [is_same for row in rows for _, is_same in row.neighbours[name]]
        colour = {True: SAME_CLASS, False: OTHER_CLASS}
        lines = [[(image, colour[is_same]) for image, is_same in row.neighbours[name]] for row in rows]
        columns.append((name, f"{100 * sum(verdicts) / len(verdicts):.0f} % same class", lines))
    cell = thumbnail_pixels + 2 * _FRAME
    widths = [
        max(_width(name, _NAME_SIZE), _width(note, _NOTE_SIZE), max(map(len, lines)) * (cell + _GAP) - _GAP)
        for name, note, lines in columns
    ]
    contents = max(sum(widths) + (len(widths) - 1) * _COLUMN_GAP, _width(_TITLE, _TITLE_SIZE))
    contents = max(contents, sum(40 + _width(text, _NOTE_SIZE) for text in _LEGEND))
    band = cell + 2 * _GAP
    canvas = Image.new("RGB", (contents + 2 * _MARGIN, _HEADER + len(rows) * band + _FOOTER), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, 12), _TITLE, _INK, ImageFont.load_default(_TITLE_SIZE))
    for top in range(_HEADER, _HEADER + len(rows) * band, 2 * band):
        draw.rectangle((_MARGIN // 2, top, canvas.width - _MARGIN // 2 - 1, top + band - 1), _BAND)
    left = _MARGIN
    for (name, note, lines), width in zip(columns, widths, strict=True):
        draw.text((left, 46), name, _INK, ImageFont.load_default(_NAME_SIZE))
        draw.text((left, 68), note, _PALE_INK, ImageFont.load_default(_NOTE_SIZE))
        for line, images in enumerate(lines):
            for place, (image, frame) in enumerate(images):
                framed = ImageOps.expand(_fit_square(image, thumbnail_pixels), _FRAME, frame)
                canvas.paste(framed, (left + place * (cell + _GAP), _HEADER + line * band + _GAP))
        left += width + _COLUMN_GAP
    left, top = _MARGIN, canvas.height - 28
    for text, frame in _LEGEND.items():
        draw.rectangle((left, top + 2, left + 11, top + 13), outline=frame, width=_FRAME)
        draw.text((left + 18, top), text, _PALE_INK, ImageFont.load_default(_NOTE_SIZE))
        left += 40 + _width(text, _NOTE_SIZE)
    canvas.save(path, format="PNG")


def _width(text: str, size: int) -> int:
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
