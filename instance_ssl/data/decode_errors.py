"""What is wrong with an image file, in words: decoders speak of their own constants and functions."""

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from PIL import Image, PngImagePlugin

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
# What the decoders say, and what that means. A text that is not here is shown as it is.
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
    """A file that is no readable image: one line that says why."""


@contextmanager
def in_words() -> Iterator[None]:
    """Around decoders: what they raise becomes an `ImageError`, but for errors of the file system and of size."""
    try:
        yield
    except Exception as error:  # OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error and more
        if isinstance(error, ImageError | MemoryError) or (isinstance(error, OSError) and error.strerror):
            raise
        words = _words(error)
        if isinstance(error, Image.DecompressionBombError):
            raise Image.DecompressionBombError(words) from error
        raise ImageError(words) from error


def _words(error: Exception) -> str:
    said = " ".join(str(error).split())
    for pattern, meaning in _MEANINGS.items():
        if match := re.search(pattern, said):
            return match.expand(meaning)
    if isinstance(error, zlib.error):
        return "its compressed data are damaged"
    return said or type(error).__name__


def not_an_image(prefix: bytes) -> ImageError:
    """The error for a file that is in none of the formats, by its first bytes."""
    found = next((f"{what}, " for magic, what in _FOREIGN.items() if prefix.lstrip().startswith(magic)), "")
    if prefix[4:8] == b"ftyp":
        found = "an AVIF, HEIF or video file, "
    return ImageError(f"{found}not a JPEG, PNG or WebP image")


def without_size(prefix: bytes) -> ImageError:
    """The error for a file whose header has been read, and gives no size or no known kind of pixels.

    Args:
        prefix: the file's first 26 bytes at least.
    """
    if not prefix.startswith(b"\x89PNG"):
        return ImageError("its header gives a width or height of 0, or none")
    width, height = (int.from_bytes(prefix[place : place + 4]) for place in (16, 20))
    if width and height:
        return ImageError(f"a PNG of an unknown kind of pixels (bit depth {prefix[24]}, colour type {prefix[25]})")
    return ImageError(f"its header says {width} x {height} pixels")


def refuse_large_metadata(file: BinaryIO) -> None:
    """Refuses an image by the sizes that its parts before the pixels declare, before any of them is read.

    Raises:
        ImageError: they come to more than `MAX_METADATA_MIB`.
    """
    if file.seek(0, 2) <= MAX_METADATA_MIB << 20:
        return
    total = 0
    for size in _metadata_sizes(file):
        total += size
        if total > MAX_METADATA_MIB << 20:
            raise ImageError(f"its text, profiles and other metadata are more than {MAX_METADATA_MIB} MiB")


def _metadata_sizes(file: BinaryIO) -> Iterator[int]:
    """Bytes of each of a PNG's chunks or a JPEG's segments up to the pixels, and of a WebP's chunks but its pixels."""
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
            size, end = size + size % 2, end
            if kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANMF"):
                file.seek(end + size)
                continue
        else:
            size, end = int.from_bytes(header[2:]), file.tell() - 2
            if header[0] != 0xFF or header[1] == 0xDA or size < 2:
                return
        yield size
        file.seek(end + size)
