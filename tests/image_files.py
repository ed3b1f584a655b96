"""Image files of many kinds for tests, and tars of them."""

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def encoded(number: int = 0, suffix: str = ".jpg", side: int = 8, **options: Any) -> bytes:
    """A small image file, another one for every number."""
    pixels = np.random.RandomState(number).randint(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[suffix]
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its few bytes hold."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def broken_files() -> dict[str, bytes]:
    """By name, what a header tells to be no image."""
    return {
        "bomb.png": png_that_claims(30_000, 30_000),
        "empty.jpg": b"",
        "gif.jpg": b"GIF89a\x01\x00\x01\x00\x00\x00\x00;",
        "nothing.png": png_that_claims(0, 0),
        "text.webp": b"this is no image\n" * 20,
    }


def write_tar(path: Path, members: Iterable[tuple[str, bytes | tarfile.TarInfo]], **options: Any) -> Path:
    """A tar of files, given by their bytes, and of anything else, given by a whole member."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **{"encoding": "utf-8", "errors": "surrogateescape"} | options) as tar:
        for name, content in members:
            if isinstance(content, bytes):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                content.name = name
                tar.addfile(content)
    return path
