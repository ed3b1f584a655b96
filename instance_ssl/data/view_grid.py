"""A picture of images and their views."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from instance_ssl.data.colour import NORMALISE_MEAN, NORMALISE_STD

_SMALLEST_TILE, _GAP, _TEXT = 96, 4, 14


def pixels_of(view: Tensor) -> Image.Image:
    """The image of a normalised view (3, S, S), to the nearest of 256 levels."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (NORMALISE_MEAN, NORMALISE_STD))
    levels = view.mul(std).add(mean).mul(255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def view_grid(images: Sequence[Image.Image], views: Tensor, captions: Sequence[str]) -> Image.Image:
    """Draws a row per image: the whole image, its views beside it, and its caption below.

    Small views are enlarged by a whole number, so that their pixels are squares.

    Args:
        images: b RGB images of any size.
        views: (b, V, 3, S, S) float32, normalised.
        captions: b lines.
    """
    size = views.shape[-1]
    tile = size * max(1, -(-_SMALLEST_TILE // size))
    columns, height = 1 + views.shape[1], tile + _TEXT + 2 * _GAP
    grid = Image.new("RGB", (columns * (tile + _GAP) + _GAP, len(images) * height + _GAP), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(_TEXT - 2)
    for row, (image, caption) in enumerate(zip(images, captions, strict=True)):
        top = _GAP + row * height
        enlarged = Image.Resampling.NEAREST if max(image.size) < tile else Image.Resampling.LANCZOS
        whole = ImageOps.contain(image, (tile, tile), enlarged)
        grid.paste(whole, (_GAP + (tile - whole.width) // 2, top + (tile - whole.height) // 2))
        for column, view in enumerate(views[row], start=1):
            left = _GAP + column * (tile + _GAP)
            grid.paste(pixels_of(view).resize((tile, tile), Image.Resampling.NEAREST), (left, top))
        # The font has only Latin letters.
        draw.text((_GAP, top + tile + 1), caption.encode("latin-1", "replace").decode("latin-1"), "black", font)
    return grid
