"""One verdict for one file by every decoder, said in words, and never at the cost of what a file only claims."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from image_files import chunk, encoded, png_that_claims
from PIL import Image

from instance_ssl.data import decode, image_sources
from instance_ssl.data.decode import convert_to_rgb, decode_pixels, open_image
from instance_ssl.data.image_sources import FileImages
from instance_ssl.data.pack import Packing, pack_images
from instance_ssl.data.unreadable_images import OnBroken, check_files
from instance_ssl.errors import UserError

MIB = 1 << 20


def noise(seed: int, **options: int) -> bytes:
    """A JPEG, the like of seed 4 being readable to PIL alone where its end mark is cut off."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", **{"quality": 75} | options)
    return buffer.getvalue()


def whole(data: bytes) -> np.ndarray:
    with open_image(io.BytesIO(data)) as image:
        return np.asarray(convert_to_rgb(image))


def is_read(read: Callable[[], object]) -> bool:
    try:
        read()
    except OSError:
        return False
    return True


def verdicts(data: bytes) -> set[bool]:
    """What prior, evaluation and packing say, and what crops of all sizes do."""
    smaller = [partial(decode_pixels, data, lambda w, h, factor=factor: factor) for factor in (1, 2, 4, 8)]
    return {is_read(read) for read in (partial(whole, data), *smaller)}


def test_every_way_has_the_same_verdict_on_a_damaged_jpeg() -> None:
    random = np.random.default_rng(0)
    cut = [noise(seed)[:-count] for seed in range(12) for count in (1, 2, 3, 7)]
    progressive = [noise(seed, progressive=1, subsampling=seed % 3)[:-2] for seed in range(12)]
    trailing = [noise(0) + b"\0" * 40, noise(0) + random.bytes(99), noise(4)[:-2] + b"\0\0"]
    flipped = []
    for place in random.integers(2, len(noise(1)), 40):
        data = bytearray(noise(1))
        data[place] ^= 0xFF
        flipped.append(bytes(data))
    found = [verdicts(data) for data in (noise(4)[:-2], *cut, *progressive, *trailing, *flipped)]
    assert {len(verdict) for verdict in found} == {1}
    assert found[0] == {True}
    assert {False} in found


def test_what_lacks_its_end_mark_has_the_pixels_of_the_whole_file_and_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert decode.decode_jpeg is not None
    monkeypatch.setattr(image_sources, "_HAS_WARNED", bytearray(1))
    for name in ("a.jpg", "b\n.jpg"):
        (tmp_path / name).write_bytes(noise(4)[:-2])
    images = FileImages(tmp_path, ["a.jpg", "b\n.jpg"], None, None)
    for index in (0, 1, 0):
        assert np.array_equal(images.load_pixels(index, lambda w, h: 1).permute(1, 2, 0), whole(noise(4)))
        assert np.array_equal(images.load(index), whole(noise(4)))
    (said,) = caplog.messages
    assert f"{tmp_path / 'a.jpg'}: torchvision's decoder refuses it" in said
    assert "csrc" not in said
    for size in (0, 32):
        record = pack_images(images, tmp_path / str(size) / "train", Packing(size), OnBroken())
        assert record.num_images == 2


def jpeg_with(marker: int, change: Callable[[bytearray, int], None]) -> bytes:
    """A JPEG changed behind one of its markers, whose place `change` gets."""
    data = bytearray(encoded(0, side=32))
    change(data, data.index(bytes([0xFF, marker])))
    return bytes(data)


def set_byte(offset: int, value: int) -> Callable[[bytearray, int], None]:
    return lambda data, place: data.__setitem__(place + offset, value)


def set_height(data: bytearray, place: int) -> None:
    data[place + 5 : place + 7] = bytes(2)


def png_with_wrong_crc(kind: bytes) -> bytes:
    data = bytearray(encoded(0, ".png"))
    place = data.index(kind)
    size = int.from_bytes(data[place - 4 : place])
    data[place + 4 + size] ^= 1
    return bytes(data)


def png_of_kind(depth: int, colour: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


WEBP = encoded(0, ".webp", side=32)
# Name → (file, words of the message).
AT_OPENING = {
    "12-bit JPEG": (jpeg_with(0xC0, set_byte(4, 12)), ("12 bits a channel",)),
    "JPEG of two channels": (jpeg_with(0xC0, set_byte(9, 2)), ("2 channels",)),
    "zero height": (jpeg_with(0xC0, set_height), ("width or height of 0",)),
    "cut within the header": (encoded(0)[:100], ("ends within its header",)),
    "quantization": (jpeg_with(0xDB, set_byte(3, 9)), ("header",)),
    "bad CRC": (png_with_wrong_crc(b"IHDR"), ("IHDR", "checksum")),
    "PNG of no size": (png_that_claims(0, 7), ("0 x 7 pixels",)),
    "PNG of no kind": (png_of_kind(7, 2), ("bit depth 7", "colour type 2")),
    "PNG cut": (encoded(0, ".png")[:30], ("ends within its header",)),
    "PNG profile": (
        png_of_kind(8, 2)[:33] + chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(3 * MIB))) + png_of_kind(8, 2)[33:],
        ("more than 1 MiB",),
    ),
    "broken WebP": (WEBP[:20] + bytes(len(WEBP) - 20), ("damaged WebP",)),
    "WebP of no kind": (WEBP[:12] + b"ABCD" + WEBP[16:], ("damaged WebP",)),
    "GIF": (b"GIF89a" + bytes(30), ("a GIF", "not a JPEG, PNG or WebP")),
    "HTML": (b"\n<!DOCTYPE html><html>not found</html>", ("HTML", "not a JPEG, PNG or WebP")),
    "HEIF": (b"\0\0\0\x18ftypheic" + bytes(30), ("HEIF", "not a JPEG, PNG or WebP")),
    "nothing known": (b"no image at all", ("not a JPEG, PNG or WebP",)),
}


@pytest.mark.parametrize("name", AT_OPENING)
def test_what_is_wrong_is_said_in_words_when_a_file_is_opened(tmp_path: Path, name: str) -> None:
    data, words = AT_OPENING[name]
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(UserError) as refused:
        check_files(tmp_path, ["x.jpg"], OnBroken())
    said_plainly(str(refused.value), words)
    with pytest.raises(OSError) as failed:  # noqa: PT011
        decode_pixels(data, lambda w, h: 1)
    said_plainly(str(failed.value), words)


def damaged_png() -> bytes:
    data = bytearray(encoded(0, ".png", side=40))
    place = data.index(b"IDAT") + 40
    data[place : place + 40] = bytes(40)
    return bytes(data)


IN_THE_PIXELS = {
    "JPEG cut": (encoded(0, side=64)[:-300], ("truncated",)),
    "PNG cut": (encoded(0, ".png", side=64)[:-3000], ("truncated",)),
    "PNG damaged": (damaged_png(), ("pixels are damaged",)),
    "PNG without pixels": (png_that_claims(4, 4)[:33] + chunk(b"IEND", b""), ("no pixels",)),
}


@pytest.mark.parametrize("name", IN_THE_PIXELS)
def test_what_is_wrong_is_said_in_words_when_a_file_is_decoded(tmp_path: Path, name: str) -> None:
    data, words = IN_THE_PIXELS[name]
    (tmp_path / "x.jpg").write_bytes(data)
    images = FileImages(tmp_path, ["x.jpg"], None, None)
    for read in (lambda: images.load(0), *(lambda f=f: images.load_pixels(0, lambda w, h: f) for f in (1, 4))):
        with pytest.raises(UserError) as refused:
            read()
        said_plainly(str(refused.value), ("x.jpg", *words))


def said_plainly(message: str, words: tuple[str, ...]) -> None:
    assert [word for word in words if word not in message] == [], message
    assert not [word for word in ("csrc", "MAX_", "LOAD_", "struct", "b'", "0x", "\n", "identif") if word in message]


def sparse(path: Path, start: bytes, end: bytes, size: int) -> Path:
    """A file whose middle is a hole of `size` bytes, which takes no room."""
    with path.open("wb") as file:
        file.write(start)
        file.seek(size, 1)
        file.write(end)
    return path


def big_files(folder: Path) -> dict[str, Path]:
    """By name, files that would take hundreds of MiB: by what they declare, or by what they expand to."""
    png = encoded(0, ".png")
    text = chunk(b"iTXt", b"k%03d\0\1\0\0\0" + zlib.compress(("a" * (MIB - 4) + "\U0001f600").encode()))
    packed = b"".join(chunk(b"iTXt", b"k%d\0\1\0\0\0" % i + text[8:-4][len(b"k%03d\0\1\0\0\0") :]) for i in range(100))
    small = [chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes([97]) * MIB)) for i in range(100)]
    size = 300 * MIB
    files = {"wide texts": png[:33] + packed + png[33:], "texts": png[:33] + b"".join(small) + png[33:]}
    paths = {}
    for name, data in files.items():
        paths[name] = folder / f"{name}.png"
        paths[name].write_bytes(data)
    for kind in (b"tEXt", b"zTXt", b"iCCP", b"eXIf", b"prIv"):
        head = png[:33] + struct.pack(">I", size) + kind
        paths[str(kind)] = sparse(folder / f"{kind.decode()}.png", head, bytes(4) + png[33:], size)
    for kind in (b"ICCP", b"EXIF", b"XMP ", b"ABCD"):
        extended = b"VP8X" + struct.pack("<I", 10) + b"\x2c\0\0\0" + bytes([31, 0, 0, 31, 0, 0])
        body = WEBP[12:]
        total = 4 + len(extended) + 8 + size + len(body)
        head = b"RIFF" + struct.pack("<I", total) + b"WEBP" + extended + kind + struct.pack("<I", size)
        paths[str(kind)] = sparse(folder / f"{kind.decode().strip()}.webp", head, body, size)
    segment = b"\xff\xe2\xff\xff" + bytes(0xFFFD)
    jpeg = folder / "segments.jpg"
    jpeg.write_bytes(encoded(0)[:2] + segment * (60 * MIB // len(segment)) + encoded(0)[2:])
    paths["segments"] = jpeg
    return paths


def test_what_a_file_claims_besides_its_pixels_is_refused_before_it_is_in_memory(tmp_path: Path) -> None:
    for name, path in big_files(tmp_path).items():
        tracemalloc.start()
        with pytest.raises(UserError, match="more than 16 MiB"):
            check_files(tmp_path, [path.name], OnBroken())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100 * MIB, name
        path.unlink()


def test_ordinary_metadata_passes(tmp_path: Path) -> None:
    png = encoded(0, ".png")
    texts = b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes([97]) * MIB)) for i in range(8))
    large = encoded(0)[:2] + b"\xff\xe2\xff\xff" + bytes(0xFFFD) + encoded(0)[2:]
    for data in (png[:33] + texts + png[33:], png[:-12] + texts + png[-12:], large, large + bytes(17 * MIB)):
        assert verdicts(data) == {True}
