"""Views have the shape, range and statistics they promise, and take all their randomness from torch's CPU generator."""

import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from instance_ssl.data.augmentations import (
    NORMALISE_MEAN,
    NORMALISE_STD,
    RandomView,
    Transform,
    centre_view,
    digit_view,
    probe_view,
    simclr_view,
)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (height, width, 3), np.uint8))


def unit(view: torch.Tensor) -> torch.Tensor:
    return view * torch.tensor(NORMALISE_STD)[:, None, None] + torch.tensor(NORMALISE_MEAN)[:, None, None]


@pytest.mark.parametrize("build", [simclr_view, digit_view, probe_view, centre_view])
@pytest.mark.parametrize("size", [16, 96])
def test_views_are_normalised_float_images_of_one_size(build: Callable[[int], Transform], size: int) -> None:
    torch.manual_seed(0)
    transform = pickle.loads(pickle.dumps(build(size)))
    for image in (noise(8, 8), noise(70, 40)):
        view = transform(image)
        assert view.shape == (3, size, size)
        assert view.dtype == torch.float32
        assert unit(view).min() > -1e-5
        assert unit(view).max() < 1 + 1e-5


@pytest.mark.parametrize("build", [simclr_view, digit_view, probe_view])
def test_torch_seed_alone_fixes_a_random_view(build: Callable[[int], Transform]) -> None:
    transform, image = build(96), noise(60, 60)
    views = []
    for other_seed in (1, 2):
        random.seed(other_seed)
        np.random.seed(other_seed)
        torch.manual_seed(0)
        views.append(transform(image))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], transform(image))


def test_simclr_flips_half_the_views_and_greys_a_fifth() -> None:
    columns = np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None]
    ramp = Image.fromarray(np.broadcast_to(columns, (32, 32, 3)) // np.array([1, 2, 4], np.uint8))
    torch.manual_seed(0)
    transform = simclr_view(32, min_crop_scale=0.5)
    views = [unit(transform(ramp)) for _ in range(600)]
    grey = np.mean([torch.allclose(view[0], view[2], atol=2 / 255) for view in views])
    flipped = np.mean([bool(view[..., 0].mean() > view[..., -1].mean()) for view in views])
    assert 0.15 < grey < 0.25
    assert 0.44 < flipped < 0.56


def test_simclr_strength_and_blur_follow_the_image_size() -> None:
    def settings(view: RandomView) -> tuple[float, bool]:
        assert view.colours is not None
        return view.colours.strength, view.colours.blur

    assert settings(simclr_view(32)) == (0.5, False)
    assert settings(simclr_view(64)) == (0.5, False)
    assert settings(simclr_view(224)) == (1.0, True)
    assert settings(simclr_view(96, jitter_strength=0.5)) == (0.5, True)
    assert settings(simclr_view(96, blur=False)) == (1.0, False)
    assert settings(simclr_view(16, blur=True)) == (0.5, True)


def test_crop_scale_bounds_the_area_that_a_view_keeps() -> None:
    left, right = np.meshgrid(np.arange(64), np.arange(64))
    image = Image.fromarray(np.stack([left * 4, right * 4, left * 0], axis=-1).astype(np.uint8))
    torch.manual_seed(0)
    transform = simclr_view(64, min_crop_scale=0.9, jitter_strength=0.0)
    views = [unit(transform(image)) for _ in range(40)]
    spans = [
        (view[0].max() - view[0].min()) * (view[1].max() - view[1].min()) for view in views if view[2].max() < 0.01
    ]
    assert len(spans) > 20
    assert min(spans) > 0.8


def test_digit_views_differ_but_stay_the_same_digit() -> None:
    stroke = np.zeros((8, 8, 3), np.uint8)
    stroke[1:7, 2] = 200
    torch.manual_seed(0)
    transform = digit_view(16)
    views = torch.stack([unit(transform(Image.fromarray(stroke))) for _ in range(200)])
    assert len(torch.unique(views.flatten(1), dim=0)) == 200
    # Never flipped: the stroke keeps to the left half. Never grey levels of their own: the channels agree.
    assert (views[..., :8].sum(dim=(1, 2, 3)) > views[..., 8:].sum(dim=(1, 2, 3))).all()
    assert torch.allclose(views[:, 0], views[:, 2], atol=1e-5)
    centre_of_mass = (views[:, 0].sum(1) * (torch.arange(16) + 0.5)).sum(1) / views[:, 0].sum(dim=(1, 2))
    assert 4.5 < centre_of_mass.mean() < 6.5
    assert 0.5 < centre_of_mass.std() < 1.5


def test_digit_view_without_chance_is_the_resized_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda count: torch.full((count,), 0.5))
    image = noise(8, 8)
    assert torch.allclose(
        digit_view(16)(image), centre_view(16)(image.resize((16, 16), Image.Resampling.BICUBIC)), atol=1e-5
    )


def test_centre_view_is_deterministic_and_central() -> None:
    image = noise(32, 32)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert torch.allclose(unit(centre_view(32)(image)), expected, atol=1e-6)
    rows, columns = np.meshgrid(np.arange(128), np.arange(192), indexing="ij")
    wide = Image.fromarray(np.stack([rows, columns, rows], axis=-1).astype(np.uint8))
    transform = centre_view(112)  # short side 128: no resizing here, margins of 8 and 40
    view = unit(transform(wide)) * 255
    assert torch.equal(view, unit(transform(wide)) * 255)
    assert view[0, :, 0].round().tolist() == list(range(8, 120))
    assert view[1, 0].round().tolist() == list(range(40, 152))


def resized_whole_then_cropped(image: Image.Image, image_size: int) -> torch.Tensor:
    """The ImageNet convention as torchvision has it, in levels 0 to 255."""
    resized = v2.Resize(round(image_size * 256 / 224), interpolation=v2.InterpolationMode.BICUBIC)(image)
    return v2.functional.pil_to_tensor(v2.CenterCrop(image_size)(resized))


@pytest.mark.parametrize("size", [(60, 60), (50, 200), (201, 140), (400, 100), (99, 180)])
@pytest.mark.parametrize("image_size", [65, 96, 131])
def test_centre_view_of_ordinary_images_is_torchvisions_to_the_bit(size: tuple[int, int], image_size: int) -> None:
    view = unit(centre_view(image_size)(noise(*size))) * 255
    assert torch.equal(view.round().to(torch.uint8), resized_whole_then_cropped(noise(*size), image_size))


@pytest.mark.parametrize("size", [(1, 300), (301, 1), (2, 97), (3, 1000), (33, 140), (150, 640), (2000, 301), (1, 5)])
@pytest.mark.parametrize("image_size", [65, 96, 131])
def test_centre_view_of_elongated_images_is_that_of_resizing_them_whole(size: tuple[int, int], image_size: int) -> None:
    view = (unit(centre_view(image_size)(noise(*size))) * 255).round()
    difference = (view - resized_whole_then_cropped(noise(*size), image_size)).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("size", [(1, 20_000), (65_500, 3), (40_000, 9)])
@pytest.mark.parametrize("build", [centre_view, simclr_view, probe_view, digit_view])
def test_no_view_of_a_line_resizes_more_than_the_crop(
    build: Callable[[int], Transform], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resized whole, a line of 1 x 20,000 pixels would have 256 x 5,120,000."""
    resize, sizes = Image.Image.resize, [(1, 1)]

    def recording(image: Image.Image, size: tuple[int, int], *rest: object, **options: object) -> Image.Image:
        assert size[0] * size[1] < 1e6
        sizes.append(size)
        return resize(image, size, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", recording)
    assert build(224)(Image.new("RGB", size)).shape == (3, 224, 224)
    assert max(width * height for width, height in sizes) <= 256 * 224
