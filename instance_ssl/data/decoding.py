"""From the bytes of an image file to pixels, by the decoders that are allowed."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

# Only these decoders are ever run, whatever a file's name says.
_FORMATS = ("JPEG", "PNG", "WEBP")


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
