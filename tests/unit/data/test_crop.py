"""Crops have torchvision's distribution; they are PIL's pixels to a level or two, whichever decoder made them."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_colour import kolmogorov
from torchvision.transforms import v2

from instance_ssl.data import decode
from instance_ssl.data.crop import Crop, crop_resized, draw_crop, reduction_for
from instance_ssl.data.decode import convert_to_rgb, decode_pixels, image_pixels, open_image


def picture(width: int, height: int) -> Image.Image:
    """A photograph's like: smooth, with a little noise."""
    random = np.random.RandomState(0)
    coarse = Image.fromarray(random.randint(0, 256, (6, 8, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    return Image.fromarray((smooth + 6 * random.randn(height, width, 3)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def crops(width: int, height: int, min_scale: float, count: int) -> list[Crop]:
    uniform = torch.rand(count, Crop.NUM_UNIFORM, generator=torch.Generator().manual_seed(2)).tolist()
    return [draw_crop(width, height, min_scale, numbers) for numbers in uniform]


@pytest.mark.parametrize(("width", "height", "min_scale"), [(500, 375, 0.08), (300, 400, 0.2), (32, 32, 0.08)])
def test_crops_are_distributed_like_torchvision_s(width: int, height: int, min_scale: float) -> None:
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(8, scale=(min_scale, 1.0), ratio=(3 / 4, 4 / 3))
    image = torch.empty(3, height, width, dtype=torch.uint8)
    other = [theirs.make_params([image]) for _ in range(3000)]
    mine = crops(width, height, min_scale, 4000)
    measures = {
        "area": ([c.width * c.height for c in mine], [p["width"] * p["height"] for p in other]),
        "ratio": ([c.width / c.height for c in mine], [p["width"] / p["height"] for p in other]),
        "left": ([c.left for c in mine], [p["left"] for p in other]),
        "bottom": ([c.top + c.height for c in mine], [p["top"] + p["height"] for p in other]),
    }
    for name, (found, expected) in measures.items():
        assert kolmogorov(np.array(found, float), np.array(expected, float)) < 1, name
    assert abs(np.mean([c.flipped for c in mine]) - 0.5) < 4 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 500), (500, 1), (2000, 100), (37, 41)])
def test_every_crop_lies_within_its_image(width: int, height: int) -> None:
    for crop in crops(width, height, 0.08, 300):
        assert min(crop.left, crop.top) >= 0
        assert 0 < crop.width <= width - crop.left
        assert 0 < crop.height <= height - crop.top
    view = crop_resized(image_pixels(picture(width, height)), crop, width, 8)
    assert view.shape == (3, 8, 8)


@pytest.mark.parametrize("size", [224, 32])
def test_a_crop_is_pil_s_resized_box(size: int) -> None:
    image = picture(500, 375)
    for crop in crops(500, 375, 0.08, 12):
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        expected = image_pixels(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))
        found = crop_resized(image_pixels(image), crop, 500, size)
        expected = expected.flip(2) if crop.flipped else expected
        distance = (found.int() - expected.int()).abs()
        assert distance.max() <= 3
        assert distance.float().mean() < 0.1


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_jpeg_decoded_smaller_gives_nearly_the_same_crop(factor: int) -> None:
    data = encoded(picture(999, 763), quality=95)
    whole, smaller = decode_pixels(data, lambda w, h: 1), decode_pixels(data, lambda w, h: factor)
    assert smaller.shape == (3, -(-763 // factor), -(-999 // factor))
    crop = Crop(120, 77, 600, 550, flipped=True)
    size = 550 // factor
    distance = (crop_resized(whole, crop, 999, size).int() - crop_resized(smaller, crop, 999, size).int()).abs().float()
    assert distance.mean() < 2.5
    assert distance.quantile(0.99) < 10


def test_an_image_is_decoded_smaller_only_where_no_crop_loses_pixels() -> None:
    wide, narrow = Crop(0, 0, 900, 700, False), Crop(0, 0, 500, 448, False)
    assert [reduction_for(some, 224) for some in ([wide], [narrow], [wide, narrow])] == [2, 2, 2]
    assert reduction_for([wide, Crop(0, 0, 500, 447, False)], 224) == 1
    assert reduction_for([wide], 32) == 8
    assert reduction_for([wide], 1000) == 1


@pytest.mark.parametrize("kind", ["colour", "grey", "cmyk", "png", "palette", "16-bit", "webp"])
def test_both_decoders_give_pil_s_pixels(kind: str) -> None:
    image = picture(61, 43)
    data = {
        "colour": lambda: encoded(image),
        "grey": lambda: encoded(image.convert("L")),
        "cmyk": lambda: encoded(image.convert("CMYK")),
        "png": lambda: encoded(image, "PNG"),
        "palette": lambda: encoded(image.convert("P"), "PNG"),
        "16-bit": lambda: encoded(Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257), "PNG"),
        "webp": lambda: encoded(image, "WEBP"),
    }[kind]()
    with open_image(io.BytesIO(data)) as opened:
        expected = np.asarray(convert_to_rgb(opened))
    sizes = []

    def choose(width: int, height: int) -> int:
        sizes.append((width, height))
        return 1

    pixels = decode_pixels(data, choose)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    assert (pixels.dtype, pixels.stride()[0], sizes) == (torch.uint8, 1, [(61, 43)])


def test_without_torchvision_s_decoder_the_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(61, 43))
    expected = decode_pixels(data, lambda w, h: 1)
    monkeypatch.setattr(decode, "decode_jpeg", None)
    assert torch.equal(decode_pixels(data, lambda w, h: 1), expected)


@pytest.mark.parametrize("reduction", [1, 2])
def test_what_is_cut_short_is_refused_by_every_decoder(reduction: int) -> None:
    for kind in ("JPEG", "PNG"):
        data = encoded(picture(300, 200), kind)
        with pytest.raises((OSError, RuntimeError, SyntaxError)):
            decode_pixels(data[: len(data) // 2], lambda w, h: reduction)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (400, 400)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(Image.DecompressionBombError, match="400 x 400"):
        decode_pixels(data, lambda w, h: pytest.fail("the bomb's size has been looked at"))
