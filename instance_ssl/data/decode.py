"""From the bytes of an image file to pixels, by the decoders that are allowed."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from instance_ssl.data.decode_errors import in_words, not_an_image, refuse_large_metadata, without_size

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision means to give its decoders up; PIL alone takes a fifth longer
    decode_jpeg = None

# Only these decoders are ever run, whatever a file's name says. Of several pictures in a JPEG (MPO), the first counts.
_DECODERS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
}
_PREFIX_BYTES = 32

_Turn = Image.Transpose
# What shows an image upright, by its EXIF orientation (Pillow's exif_transpose).
_TURNS = {
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}
_SWAPPING = (_Turn.TRANSPOSE, _Turn.ROTATE_270, _Turn.TRANSVERSE, _Turn.ROTATE_90)
# Grey of few bits is spread over 0 ... 255, which Pillow forgets of the grey that is transparent.
_GREY_STEPS = {"L;2": 85, "L;4": 17}

# From the width and height in a header to the factor, 1, 2, 4 or 8, by which the image may be decoded smaller.
ChooseReduction = Callable[[int, int], int]


@dataclass(frozen=True)
class Rendering:
    """What becomes of an image file's orientation and transparency.

    Attributes:
        upright: the image is turned as its EXIF orientation says, or left as it is stored.
        on_white: transparent pixels are composed on white, or alpha is dropped and the colours hidden below it show.
    """

    upright: bool = True
    on_white: bool = True


# AS_SHOWN: as a viewer shows the image.
AS_SHOWN, AS_STORED = Rendering(), Rendering(upright=False, on_white=False)


def open_image(file: Path | BinaryIO) -> Image.Image:
    """The image of a file whose header has been read, by the decoders that are allowed, and within PIL's bound.

    Raises:
        OSError: one line that says what is wrong with the file.
        Image.DecompressionBombError: it has more pixels than PIL's bound.
    """
    opened = file.open("rb") if isinstance(file, Path) else file
    try:
        image = _open(opened)
    except BaseException:
        if opened is not file:
            opened.close()
        raise
    image._exclusive_fp = opened is not file
    return image


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    file.seek(0)
    prefix = file.read(_PREFIX_BYTES)
    decoder = next((decoder for magic, decoder in _DECODERS.items() if prefix.startswith(magic)), None)
    if decoder is None or (decoder is WebPImageFile and prefix[8:12] != b"WEBP"):
        raise not_an_image(prefix)
    refuse_large_metadata(file)
    file.seek(0)
    try:
        with in_words():
            image = decoder(file)
    except OSError as error:
        if "not identified by this driver" in str(error):
            raise without_size(prefix) from error
        raise
    # PIL only warns up to twice the bound.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels exceed PIL's bound of {Image.MAX_IMAGE_PIXELS}"
        )
    if "transparency" in image.info and image.tile:
        _scale_transparent_colour(image)
    return image


def upright_size(image: Image.Image, rendering: Rendering) -> tuple[int, int]:
    """Width and height of an image once it is turned; of a PNG, whose EXIF may come last, it reads the whole file.

    Raises:
        OSError: one line that says what is wrong with the file.
    """
    return _turned_size(image, _turn_of(image, rendering))


def convert_to_rgb(image: Image.Image, rendering: Rendering = AS_SHOWN) -> Image.Image:
    """The image in RGB mode, turned and composed as told; 16-bit grey keeps its upper 8 bits.

    Raises:
        OSError: one line that says what is wrong with the file.
    """
    turn = _turn_of(image, rendering)
    with in_words():
        image = _flattened(image, rendering)
        return image if turn is None else image.transpose(turn)


def decode_pixels(
    data: bytes,
    choose_reduction: ChooseReduction,
    rendering: Rendering = AS_SHOWN,
    on_refusal: Callable[[Exception], None] = lambda error: None,
) -> Tensor:
    """The image of a file as (3, H, W) uint8, RGB, with the channels of a pixel side by side in memory.

    JPEGs of colour or grey that need no turning go to torchvision's decoder, the rest to PIL; both are libjpeg-turbo
    and agree to the bit. Where torchvision's refuses a file (one that lacks its end mark, say), PIL's verdict counts. A
    JPEG that may be smaller is decoded so by PIL, from the low frequencies of its blocks; other formats come whole.

    Args:
        choose_reduction: gets the width and height of the upright image.
        on_refusal: told what torchvision's decoder says of a file that goes to PIL's instead.

    Raises:
        OSError: one line that says what is wrong with the file.
        Image.DecompressionBombError: it has more pixels than PIL's bound.
    """
    refusal: Exception | None = None
    with open_image(io.BytesIO(data)) as image:
        turn = _turn_of(image, rendering)
        reduction = choose_reduction(*_turned_size(image, turn))
        if isinstance(image, JpegImageFile) and image.mode in ("RGB", "L"):
            if reduction == 1 and turn is None and decode_jpeg is not None:
                try:
                    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
                except RuntimeError as error:
                    refusal = error
            image.draft(image.mode, (max(1, image.width // reduction), max(1, image.height // reduction)))
        pixels = image_pixels(convert_to_rgb(image, rendering))
    if refusal is not None:
        on_refusal(refusal)
    return pixels


def image_pixels(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) uint8, with the channels of a pixel side by side in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _turn_of(image: Image.Image, rendering: Rendering) -> Image.Transpose | None:
    """What shows the image upright. An EXIF block that is broken or says something unheard of turns nothing."""
    if not rendering.upright:
        return None
    if isinstance(image, PngImageFile):
        with in_words():
            image.load()  # its EXIF may come after the pixels
    elif "exif" not in image.info and "xmp" not in image.info:
        return None
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
        return _TURNS.get(orientation)
    except Exception:  # OSError, SyntaxError, TypeError, struct.error and more: the parser trusts the block
        return None


def _turned_size(image: Image.Image, turn: Image.Transpose | None) -> tuple[int, int]:
    return (image.height, image.width) if turn in _SWAPPING else image.size


def _flattened(image: Image.Image, rendering: Rendering) -> Image.Image:
    """The image in RGB mode, with transparency composed on white or dropped."""
    # PIL clips 16-bit grey at 255, which leaves a white image.
    if image.mode.startswith("I"):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if rendering.on_white and "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if not (rendering.on_white and image.has_transparency_data):
        return image.convert("RGB")
    image = image.convert("RGBA")
    on_white = Image.new("RGB", image.size, "white")
    on_white.paste(image, mask=image.getchannel("A"))
    return on_white


def _scale_transparent_colour(image: ImageFile.ImageFile) -> None:
    """Brings the one transparent colour of a PNG to 8 bits, as its pixels are; Pillow leaves it at the file's depth."""
    layout, colour = image.tile[0].args, image.info["transparency"]
    if layout in _GREY_STEPS:
        image.info["transparency"] = colour * _GREY_STEPS[layout]
    elif layout == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)
