"""Draws random crops from an image's size alone, and cuts them out of its pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

_ATTEMPTS = 10
_RATIOS = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image in pixels, and whether it is mirrored from left to right."""

    left: int
    top: int
    width: int
    height: int
    flipped: bool

    # Number of uniform numbers that a crop is drawn from.
    NUM_UNIFORM: ClassVar[int] = 2 * _ATTEMPTS + 3


def draw_crop(width: int, height: int, min_scale: float, uniform: Sequence[float]) -> Crop:
    """The crop of torchvision's RandomResizedCrop from `Crop.NUM_UNIFORM` numbers uniform in [0, 1).

    Its share of the image's area is uniform in [min_scale, 1], and the logarithm of width / height is uniform between
    those of 3/4 and 4/3. After ten draws that do not fit, it is the largest central crop within these ratios. Half the
    crops are flipped.
    """
    where_x, where_y, flip = uniform[2 * _ATTEMPTS :]
    low, high = math.log(_RATIOS[0]), math.log(_RATIOS[1])
    for attempt in range(_ATTEMPTS):
        area = width * height * (min_scale + (1 - min_scale) * uniform[2 * attempt])
        ratio = math.exp(low + (high - low) * uniform[2 * attempt + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(where_x * (width - w + 1)), int(where_y * (height - h + 1)), w, h, flip < 0.5)
    # At least one pixel, even if the image is a line.
    w = max(1, min(width, round(height * _RATIOS[1])))
    h = max(1, min(height, round(width / _RATIOS[0])))
    return Crop((width - w) // 2, (height - h) // 2, w, h, flip < 0.5)


def reduction_for(crops: Sequence[Crop], size: int) -> int:
    """The largest factor, 1, 2, 4 or 8, by which an image may shrink while all crops keep `size` pixels a side."""
    narrowest = min(min(crop.width, crop.height) for crop in crops)
    return max(factor for factor in (1, 2, 4, 8) if factor == 1 or narrowest >= factor * size)


def crop_resized(pixels: Tensor, crop: Crop, image_width: int, size: int) -> Tensor:
    """The crop, resized by an antialiased bicubic filter: (3, size, size) uint8, channels adjacent in memory.

    Args:
        pixels: (3, H, W) uint8, the image, perhaps decoded smaller than it is.
        crop: in pixels of the image at full size.
        image_width: of the image at full size.
        size: side of the result in pixels.
    """
    left, top, right, bottom = crop.left, crop.top, crop.left + crop.width, crop.top + crop.height
    if pixels.shape[2] != image_width:
        factor = pixels.shape[2] / image_width
        left, top, right, bottom = (round(edge * factor) for edge in (left, top, right, bottom))
    part = pixels[None, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last)
    view = functional.interpolate(part, (size, size), mode="bicubic", antialias=True)[0]
    return view.flip(2) if crop.flipped else view
