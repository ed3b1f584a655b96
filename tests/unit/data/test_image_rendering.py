"""Orientation and transparency: the same pixels by every way that an image is read, and after packing."""

import hashlib
import io
import json
import random
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from image_files import chunk, encoded
from PIL import ExifTags, Image, ImageOps

from instance_ssl.checkpoint.identity import FORMER_VALUES, FREE_KEYS, LATER_KEYS, keys_digest
from instance_ssl.config.data import DataConfig
from instance_ssl.config.experiment import ExperimentConfig, flatten
from instance_ssl.data.augmentations import simclr_view
from instance_ssl.data.decode import AS_SHOWN, AS_STORED, Rendering, decode_pixels
from instance_ssl.data.image_sources import EncodedImages
from instance_ssl.data.pack import Packing, pack_images
from instance_ssl.data.unreadable_images import OnBroken
from instance_ssl.data.views import ViewDataset
from instance_ssl.errors import UserError
from instance_ssl.run import records
from instance_ssl.run.images import open_split
from instance_ssl.stages import export as export_stage

# From what is stored to what is to be seen, by the EXIF standard.
TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}
LOSSLESS: dict[str, dict[str, Any]] = {"png": {}, "webp": {"lossless": True}}


def tag(orientation: Any) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG"}.get(kind, kind), **LOSSLESS.get(kind, {}), **options)
    return buffer.getvalue()


def picture(width: int = 61, height: int = 43) -> np.ndarray:
    small = np.random.RandomState(1).randint(0, 256, (height // 6, width // 6, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def every_way(data: bytes, folder: Path, rendering: Rendering = AS_SHOWN) -> np.ndarray:
    """The pixels (H, W, 3) of a file, which are the same by every way that it is read."""
    folder.mkdir(exist_ok=True)
    (folder / "0.jpg").write_bytes(data)
    config = DataConfig(
        kind="folder",
        root=folder,
        exif="upright" if rendering.upright else "stored",
        alpha="white" if rendering.on_white else "drop",
    )
    source = open_split(config, "train")
    whole = np.asarray(source.load(0))
    sizes: list[tuple[int, int]] = []
    pixels = source.load_pixels(0, lambda *size: sizes.append(size) or 1)  # type: ignore[func-returns-value]
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), whole)
    assert sizes == [whole.shape[1::-1]]
    assert pixels.stride()[0] == 1
    return whole


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", TURNS)
def test_an_image_is_turned_as_its_tag_says(tmp_path: Path, orientation: int, kind: str) -> None:
    stored = picture()
    data = file_of(Image.fromarray(stored), kind, exif=tag(orientation))
    if kind == "jpg":
        stored = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(every_way(data, tmp_path / "stored", AS_STORED), stored)
    assert np.array_equal(every_way(data, tmp_path / "shown"), TURNS[orientation](stored))


@pytest.mark.parametrize("orientation", TURNS)
def test_a_jpeg_is_turned_at_every_reduction_and_in_every_mode(orientation: int) -> None:
    for mode in ("RGB", "L", "CMYK"):
        image = Image.fromarray(picture(161, 123)).convert(mode)
        plain, tagged = file_of(image, "jpg"), file_of(image, "jpg", exif=tag(orientation))
        for factor in (1, 2, 4, 8):
            expected = decode_pixels(plain, lambda w, h, factor=factor: factor).permute(1, 2, 0).numpy()
            found = decode_pixels(tagged, lambda w, h, factor=factor: factor).permute(1, 2, 0).numpy()
            assert np.array_equal(found, TURNS[orientation](expected))


def test_views_of_a_turned_photograph_are_those_of_the_upright_one(tmp_path: Path) -> None:
    stored = Image.fromarray(picture(640, 400))
    for name, image, exif in (("a", stored, tag(6)), ("b", stored.transpose(Image.Transpose.ROTATE_270), tag(1))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(file_of(image, "jpg", exif=exif, quality=98, subsampling=0))
    views = [
        ViewDataset(open_split(DataConfig(kind="folder", root=tmp_path / name), "train"), simclr_view(size), 8, seed=0)
        for name in "ab"
        for size in (32, 96)
    ]
    for turned, upright in zip(views[:2], views[2:], strict=True):
        distance = (turned[0, 0].views.int() - upright[0, 0].views.int()).abs().float()
        assert distance.mean() < 2  # what JPEG itself loses, and the edges of a reduced picture


def test_a_png_s_tag_after_its_pixels_counts(tmp_path: Path) -> None:
    plain = file_of(Image.fromarray(picture()), "png")
    late = plain[:-12] + chunk(b"eXIf", tag(6).tobytes()) + plain[-12:]
    assert np.array_equal(every_way(late, tmp_path / "late"), TURNS[6](picture()))


def exif_entry(kind: int, count: int, value: bytes) -> bytes:
    """An EXIF block of one entry for the orientation, of any type."""
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI", 0x112, kind, count) + value + bytes(4)


def odd_blocks() -> list[bytes]:
    draw = random.Random(0)
    whole = tag(6).tobytes()
    cut = [whole[:length] for length in range(0, len(whole), 3)]
    flipped = []
    for _ in range(60):
        block = bytearray(whole)
        for _ in range(draw.choice((1, 2, 8))):
            block[draw.randrange(len(block))] = draw.randrange(256)
        flipped.append(bytes(block))
    numbers = [exif_entry(3, 1, struct.pack("<HH", value, 0)) for value in (0, 9, 42, 65535)]
    kinds = [
        exif_entry(kind, count, b"\6\0\0\0") for kind in (0, 1, 2, 4, 5, 7, 9, 10, 99) for count in (0, 1, 2, 1 << 30)
    ]
    return [b"", b"Exif\0\0", b"Exif\0\0nothing of the kind", *cut, *flipped, *numbers, *kinds]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_broken_or_odd_block_leaves_an_image_readable(tmp_path: Path, kind: str) -> None:
    stored = picture(12, 7)
    turned = 0
    for number, block in enumerate(odd_blocks()):
        data = file_of(Image.fromarray(stored), kind, exif=block)
        seen = every_way(data, tmp_path / str(number))
        expected = np.asarray(Image.open(io.BytesIO(data))) if kind == "jpg" else stored
        assert any(np.array_equal(seen, turn(expected)) for turn in TURNS.values())
        turned += seen.shape != stored.shape
    assert turned > 0


def raw_png(depth: int, colour: int, row: bytes, *chunks: bytes, width: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def clear(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def two(first: tuple[int, ...], second: tuple[int, ...], mode: str, kind: str = "png") -> bytes:
    image = Image.new(mode, (2, 1), first)
    image.putpixel((1, 0), second)
    return file_of(image, kind, **({"exact": True} if kind == "webp" else {}))


PALETTE = chunk(b"PLTE", bytes([9, 99, 199, 200, 100, 50]))
WHITE = [255] * 3
# Name → (file of 2 x 1 pixels, colours on white, colours without alpha).
TRANSPARENT = {
    "RGBA": (two((9, 99, 199, 0), (9, 99, 199, 255), "RGBA"), [WHITE, [9, 99, 199]], [[9, 99, 199]] * 2),
    "half": (two((0, 0, 0, 128), (200, 0, 0, 255), "RGBA"), [[127] * 3, [200, 0, 0]], [[0] * 3, [200, 0, 0]]),
    "LA": (two((70, 0), (70, 255), "LA"), [WHITE, [70] * 3], [[70] * 3] * 2),
    "WebP": (two((9, 99, 199, 0), (9, 99, 199, 255), "RGBA", "webp"), [WHITE, [9, 99, 199]], [[9, 99, 199]] * 2),
    "palette, one index": (
        raw_png(8, 3, b"\0\1", PALETTE, chunk(b"tRNS", b"\0")),
        [WHITE, [200, 100, 50]],
        [[9, 99, 199], [200, 100, 50]],
    ),
    "palette, alphas": (
        raw_png(8, 3, b"\0\1", PALETTE, chunk(b"tRNS", b"\xff\x00")),
        [[9, 99, 199], WHITE],
        [[9, 99, 199], [200, 100, 50]],
    ),
    "RGB": (raw_png(8, 2, bytes([1, 2, 3, 1, 2, 4]), clear(1, 2, 3)), [WHITE, [1, 2, 4]], [[1, 2, 3], [1, 2, 4]]),
    "grey": (raw_png(8, 0, bytes([70, 71]), clear(70)), [WHITE, [71] * 3], [[70] * 3, [71] * 3]),
    "4-bit grey": (raw_png(4, 0, b"\x5a", clear(5)), [WHITE, [170] * 3], [[85] * 3, [170] * 3]),
    "2-bit grey": (raw_png(2, 0, b"\x60", clear(1)), [WHITE, [170] * 3], [[85] * 3, [170] * 3]),
    "1-bit grey": (raw_png(1, 0, b"\x40", clear(0)), [WHITE, WHITE], [[0] * 3, WHITE]),
    "16-bit grey": (
        raw_png(16, 0, struct.pack(">2H", 0x4600, 0x4601), clear(0x4600)),
        [WHITE, [70] * 3],
        [[70] * 3] * 2,
    ),
    "16-bit RGB": (
        raw_png(16, 2, struct.pack(">6H", 0x1234, 0, 0, 0x3412, 0, 0), clear(0x1234, 0, 0)),
        [WHITE, [0x34, 0, 0]],
        [[0x12, 0, 0], [0x34, 0, 0]],
    ),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_pixels_are_white_or_show_what_is_hidden(tmp_path: Path, name: str) -> None:
    data, shown, hidden = TRANSPARENT[name]
    assert every_way(data, tmp_path / "white")[0].tolist() == shown
    assert every_way(data, tmp_path / "drop", Rendering(on_white=False))[0].tolist() == hidden


def test_packed_images_look_as_before(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    grey = np.full((40, 64, 3), 120, np.uint8)
    grey[:, :32] = 20  # dark on the left, so on top once it is turned
    small = Image.fromarray(grey).resize((16, 10))
    clear_image = Image.new("RGBA", (64, 40), (0, 0, 0, 0))
    files = {
        "0.jpg": file_of(Image.fromarray(grey), "jpg", exif=tag(6)),
        "1.png": file_of(Image.fromarray(grey), "png", exif=tag(6)),
        "2.jpg": file_of(small, "jpg", exif=tag(6)),
        "3.webp": file_of(Image.fromarray(grey), "webp", exif=tag(6)),
        "4.png": file_of(clear_image, "png"),
    }
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    source = open_split(DataConfig(kind="folder", root=tmp_path / "in"), "train")
    assert isinstance(source, EncodedImages)
    for size in (0, 20):
        out = tmp_path / f"out{size}"
        pack_images(source, out / "train", Packing(size), OnBroken())
        packed = open_split(DataConfig(kind="tar", root=out), "train")
        assert isinstance(packed, EncodedImages)
        for index, name in enumerate(files):
            if size == 0:
                assert packed.read(index) == files[name]
            image, before = packed.load(index), source.load(index)
            assert (image.height > image.width) == (before.height > before.width) == (name != "4.png")
            expected = before.resize(image.size, Image.Resampling.BICUBIC)
            assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < 3, name


def test_the_digest_tells_renderings_apart(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(encoded(0))
    options = [{}, {"exif": "stored"}, {"alpha": "drop"}, {"exif": "stored", "alpha": "drop"}]
    digests = [
        open_split(DataConfig.model_validate({"kind": "folder", "root": tmp_path, **option}), "train").digest
        for option in options
    ]
    assert len(set(digests)) == 4
    # That of names and sizes alone, as it was before there was a choice.
    size = (tmp_path / "0.jpg").stat().st_size
    assert digests[3] == hashlib.sha256(b"0.jpg\0%d\0" % size).hexdigest()


def config_of(**data: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate({"data": {"kind": "folder", **data}})


def test_a_run_from_before_the_keys_says_what_to_set_and_goes_on_with_it(tmp_path: Path) -> None:
    record = tmp_path / "pretrain/config.yaml"
    record.parent.mkdir()
    for kind in ("folder", "digits"):
        values = config_of(kind=kind).model_dump(mode="json")
        del values["data"]["exif"], values["data"]["alpha"]
        record.write_text(yaml.safe_dump(values))
        records.check_unchanged(config_of(kind=kind, exif="stored", alpha="drop"), tmp_path)
        if kind == "digits":
            records.check_unchanged(config_of(kind=kind), tmp_path)
        else:
            with pytest.raises(UserError, match=r"--set data\.exif=stored data\.alpha=drop") as raised:
                records.check_unchanged(config_of(), tmp_path)
            assert "\n" not in str(raised.value)
            with pytest.raises(UserError, match=r"--set data\.alpha=drop,"):
                records.check_unchanged(config_of(exif="stored"), tmp_path)
    record.write_text(yaml.safe_dump(config_of(exif="stored").model_dump(mode="json")))
    records.check_unchanged(config_of(exif="stored"), tmp_path)
    with pytest.raises(UserError, match=r"--set data\.exif=stored,"):
        records.check_unchanged(config_of(), tmp_path)


def test_the_digest_of_a_configuration_from_before_the_keys_is_the_same() -> None:
    def before(config: ExperimentConfig) -> str:
        flat = flatten(config)
        bound = {
            k: v for k, v in flat.items() if not k.startswith((*FREE_KEYS, *FORMER_VALUES)) and k not in LATER_KEYS
        }
        return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()

    old = config_of(exif="stored", alpha="drop")
    assert keys_digest(flatten(old)) == before(old)
    assert keys_digest(flatten(config_of(kind="digits"))) == before(config_of(kind="digits"))
    assert len({keys_digest(flatten(config_of(**own))) for own in ({}, {"exif": "stored"}, {"alpha": "drop"})}) == 3


def test_an_export_s_folder_is_read_as_the_run_s_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[DataConfig] = []
    monkeypatch.setattr(export_stage, "open_images", lambda data, *_: given.append(data))
    monkeypatch.setattr(export_stage, "share_images", lambda *_: None)
    stage: Any = SimpleNamespace(
        config=config_of(exif="stored", alpha="drop"), run_directory=tmp_path, world=None, log=None
    )
    export_stage._open_folder(stage, tmp_path)
    assert (given[0].exif, given[0].alpha) == ("stored", "drop")


def test_a_file_of_several_pictures_shows_the_first(tmp_path: Path) -> None:
    first, second = Image.fromarray(picture()), Image.new("RGB", (61, 43))
    exif = tag(6)
    mpo = io.BytesIO()
    first.save(mpo, "MPO", save_all=True, append_images=[second], exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(file_of(first, "jpg", exif=exif))))
    assert np.array_equal(every_way(mpo.getvalue(), tmp_path / "mpo"), np.asarray(expected))
    assert decode_pixels(mpo.getvalue(), lambda w, h: 2).shape == (3, 31, 22)
    for kind in ("png", "webp"):
        buffer = io.BytesIO()
        first.save(buffer, kind, save_all=True, append_images=[second], **LOSSLESS[kind])
        assert np.array_equal(every_way(buffer.getvalue(), tmp_path / kind), picture())
