"""From the bytes of an image file to pixels, by the decoders that are allowed."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision means to give its decoders up; PIL alone takes a fifth longer
    decode_jpeg = None

# Only these decoders are ever run, whatever a file's name says.
_FORMATS = ("JPEG", "PNG", "WEBP")

# From the width and height in a header to the factor, 1, 2, 4 or 8, by which the image may be decoded smaller.
ChooseReduction = Callable[[int, int], int]


def open_image(file: Path | BinaryIO) -> Image.Image:
    """The image of a file whose header has been read, by the decoders that are allowed, and within PIL's bound.

    Raises:
        OSError, ValueError, SyntaxError and others of PIL's, for what cannot be read.
    """
    image = Image.open(file, formats=_FORMATS)
    # PIL only warns up to twice the bound.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels exceed PIL's bound of {Image.MAX_IMAGE_PIXELS}"
        )
    return image


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB mode: transparency is dropped, 16-bit grey keeps its upper 8 bits."""
    # PIL clips 16-bit grey at 255, which leaves a white image.
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def decode_pixels(data: bytes, choose_reduction: ChooseReduction) -> Tensor:
    """The image of a file as (3, H, W) uint8, RGB, with the channels of a pixel side by side in memory.

    JPEGs of colour or grey go to torchvision's decoder, the rest to PIL; both are libjpeg-turbo and agree to the bit. A
    JPEG that may be smaller is decoded so by PIL, from the low frequencies of its blocks; other formats come whole.

    Raises:
        OSError, ValueError, RuntimeError, SyntaxError and others, for what cannot be read.
    """
    with open_image(io.BytesIO(data)) as image:
        reduction = choose_reduction(*image.size)
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            if reduction == 1 and decode_jpeg is not None:
                return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
            image.draft(image.mode, (image.width // reduction, image.height // reduction))
        return image_pixels(convert_to_rgb(image))


def image_pixels(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) uint8, with the channels of a pixel side by side in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
