"""Decodes image files to pixels, and explains in plain words what is wrong with one."""

import io
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

MAX_METADATA_MIB = 16
# Pillow expands up to 64 MiB of text, and holds a character in up to four bytes.
PngImagePlugin.MAX_TEXT_MEMORY = MAX_METADATA_MIB << 20

_FOREIGN = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"%PDF": "a PDF",
    b"\xff\x0a": "a JPEG XL",
    b"\0\0\0\x0cJXL ": "a JPEG XL",
    b"\0\0\0\x0cjP  ": "a JPEG 2000",
    b"<": "text (HTML, XML or SVG)",
}
# What the decoders say → what it means. Any other text is shown as it is.
_MEANINGS = {
    r"cannot handle (\d+)-bit layers": r"a JPEG of \1 bits a channel; only 8 can be read",
    r"cannot handle (\d+)-layer images": r"a JPEG of \1 channels; only 1, 3 and 4 can be read",
    r"no marker found|bad quantization table": "a JPEG with a damaged header",
    r"bad header checksum in b'(.+)'": r"a PNG whose chunk \1 has a wrong checksum (CRC)",
    r"broken PNG file \(chunk": "a PNG with a damaged chunk header",
    r"unknown filter category": "a PNG with an unknown filter method in its header",
    r"incomplete checksum|Truncated|truncated PNG|unpack|index out of range": "the file ends within its header",
    r"MAX_TEXT_CHUNK": "a PNG with a text or colour profile that expands to more than 1 MiB",
    r"MAX_TEXT_MEMORY": f"a PNG whose texts expand to more than {MAX_METADATA_MIB} MiB",
    r"image file is truncated": "the file is truncated: its pixels end early",
    r"broken data stream|unrecognized data stream|decoding error|^-\d+$": "its compressed pixels are damaged",
    r"cannot load this image": "it holds no pixels",
    r"could not create decoder|next frame in WebP|not a WEBP": "a damaged WebP",
    r"exceeds limit of \d+ pixels": f"its header gives more pixels than Pillow's bound of {Image.MAX_IMAGE_PIXELS}",
}


class ImageError(OSError):
    """A file that is not a readable image: one line that says why."""


def _explain(error: Exception) -> NoReturn:
    """Raises a decoder's error, of whatever type, in plain words, as an `ImageError` or a `DecompressionBombError`.

    Errors of the file system and of memory are raised as they are.
    """
    if isinstance(error, ImageError | MemoryError) or (isinstance(error, OSError) and error.strerror):
        raise error
    kind = Image.DecompressionBombError if isinstance(error, Image.DecompressionBombError) else ImageError
    raise kind(_words(error)) from error


def _words(error: Exception) -> str:
    said = " ".join(str(error).split())
    for pattern, meaning in _MEANINGS.items():
        if match := re.search(pattern, said):
            return match.expand(meaning)
    if isinstance(error, zlib.error):
        return "its compressed data are damaged"
    return said or type(error).__name__


def _not_an_image(prefix: bytes) -> ImageError:
    found = next((f"{what}, " for magic, what in _FOREIGN.items() if prefix.lstrip().startswith(magic)), "")
    if prefix[4:8] == b"ftyp":
        found = "an AVIF, HEIF or video file, "
    return ImageError(f"{found}not a JPEG, PNG or WebP image")


def _without_size(prefix: bytes) -> ImageError:
    """The error for a header without a size or a known kind of pixels, by the file's first 26 bytes or more."""
    if not prefix.startswith(b"\x89PNG"):
        return ImageError("its header gives a width or height of 0, or none")
    width, height = (int.from_bytes(prefix[place : place + 4]) for place in (16, 20))
    if width and height:
        return ImageError(f"a PNG of an unknown kind of pixels (bit depth {prefix[24]}, colour type {prefix[25]})")
    return ImageError(f"its header says {width} x {height} pixels")


def _refuse_large_metadata(file: BinaryIO) -> None:
    """Refuses an image by the declared sizes of what precedes its pixels, before any of that is read."""
    most = MAX_METADATA_MIB << 20
    if file.seek(0, 2) > most and any(total > most for total in accumulate(_metadata_sizes(file))):
        raise ImageError(f"its text, profiles and other metadata are more than {MAX_METADATA_MIB} MiB")


def _metadata_sizes(file: BinaryIO) -> Iterator[int]:
    """Bytes of each PNG chunk or JPEG segment up to the pixels, and of each WebP chunk other than pixels."""
    file.seek(0)
    prefix = file.read(12)
    is_png, is_webp = prefix.startswith(b"\x89PNG"), prefix.startswith(b"RIFF")
    file.seek(8 if is_png else 12 if is_webp else 2)
    while len(header := file.read(8 if is_png or is_webp else 4)) >= 4:
        if is_png:
            kind, size, end = header[4:], int.from_bytes(header[:4]), file.tell() + 4
            if kind in (b"IDAT", b"IEND"):
                return
        elif is_webp:
            kind, size, end = header[:4], int.from_bytes(header[4:], "little"), file.tell()
            end += size % 2
            size += size % 2
            if kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANMF"):
                file.seek(end + size)
                continue
        else:
            size, end = int.from_bytes(header[2:]), file.tell() - 2
            if header[0] != 0xFF or header[1] == 0xDA or size < 2:
                return
        yield size
        file.seek(end + size)


try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision plans to drop its decoders; PIL alone takes a fifth longer
    decode_jpeg = None

# Only these decoders ever run, whatever a file is called. Of a JPEG with several pictures (MPO), the first one counts.
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
# Pillow scales grey of few bits to 0 ... 255, but not the grey value that is transparent.
_GREY_STEPS = {"L;2": 85, "L;4": 17}

# (width, height) from the header → the factor, 1, 2, 4 or 8, by which the image may be decoded smaller.
ChooseReduction = Callable[[int, int], int]


@dataclass(frozen=True)
class Rendering:
    """How an image file's orientation and transparency are treated.

    Attributes:
        upright: turn the image as its EXIF orientation says; otherwise leave it as stored.
        on_white: compose transparent pixels on white; otherwise drop alpha, which shows the colours hidden under it.
    """

    upright: bool = True
    on_white: bool = True


# As a viewer shows the image, and as the file stores it.
AS_SHOWN, AS_STORED = Rendering(), Rendering(upright=False, on_white=False)


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Opens an image: reads its header, decodes no pixels.

    Raises:
        OSError: one line that says what is wrong with the file.
        Image.DecompressionBombError: it has more pixels than PIL allows.
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
        raise _not_an_image(prefix)
    _refuse_large_metadata(file)
    file.seek(0)
    try:
        image = decoder(file)
    except Exception as error:
        if "not identified by this driver" in str(error):
            raise _without_size(prefix) from error
        _explain(error)
    # PIL only warns up to twice the bound.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels exceed PIL's bound of {Image.MAX_IMAGE_PIXELS}"
        )
    if "transparency" in image.info and image.tile:
        _scale_transparent_colour(image)
    return image


def upright_size(image: Image.Image, rendering: Rendering) -> tuple[int, int]:
    """Width and height of an image once it is turned. Reads a PNG whole, as its EXIF data may come last.

    Raises:
        OSError: one line that says what is wrong with the file.
    """
    return _turned_size(image, _turn_of(image, rendering))


def convert_to_rgb(image: Image.Image, rendering: Rendering = AS_SHOWN) -> Image.Image:
    """The image in RGB mode, turned and composed as `rendering` says; 16-bit grey keeps its upper 8 bits.

    Raises:
        OSError: one line that says what is wrong with the file.
    """
    turn = _turn_of(image, rendering)
    try:
        image = _flattened(image, rendering)
        return image if turn is None else image.transpose(turn)
    except Exception as error:
        _explain(error)


def decode_pixels(
    data: bytes,
    choose_reduction: ChooseReduction,
    rendering: Rendering = AS_SHOWN,
    on_refusal: Callable[[Exception], None] = lambda error: None,
) -> Tensor:
    """Decodes a file to (3, H, W) uint8, RGB, with the channels of a pixel adjacent in memory.

    torchvision decodes colour and grey JPEGs that need no turning, PIL everything else. Both use libjpeg-turbo and
    agree to the bit. Where torchvision refuses a file (one without an end mark, say), PIL decides. A JPEG that may be
    smaller is decoded by PIL, from the low frequencies of its blocks; other formats are decoded at full size.

    Args:
        data: the file's bytes.
        choose_reduction: called once with the width and height of the upright image.
        rendering: how orientation and transparency are treated.
        on_refusal: called with torchvision's error where PIL has decoded the file instead.

    Raises:
        OSError: one line that says what is wrong with the file.
        Image.DecompressionBombError: it has more pixels than PIL allows.
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
    """An RGB image as (3, H, W) uint8, with the channels of a pixel adjacent in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _turn_of(image: Image.Image, rendering: Rendering) -> Image.Transpose | None:
    """The transposition that shows the image upright; None, too, where its EXIF block is broken or makes no sense."""
    if not rendering.upright:
        return None
    if isinstance(image, PngImageFile):
        try:
            image.load()  # its EXIF may come after the pixels
        except Exception as error:
            _explain(error)
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
    # PIL would clip 16-bit grey at 255 and leave a white image.
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
    """Scales a PNG's transparent colour to the 8 bits of its pixels; Pillow leaves it at the file's depth."""
    layout, colour = image.tile[0].args, image.info["transparency"]
    if layout in _GREY_STEPS:
        image.info["transparency"] = colour * _GREY_STEPS[layout]
    elif layout == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)
