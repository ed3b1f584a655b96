"""Colour changes are torchvision's operations, drawn with torchvision's odds, and the same in any company."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from instance_ssl.config.data import DataConfig
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.data.augmentations import centre_view, simclr_view
from instance_ssl.data.colour import (
    NORMALISE_MEAN,
    NORMALISE_STD,
    NUM_UNIFORM,
    UNCHANGED,
    ColourRanges,
    apply_colours,
)
from instance_ssl.data.image_sources import ArrayImages
from instance_ssl.data.views import ViewDataset
from instance_ssl.run.build import training_views
from instance_ssl.training.step import flatten_views

OPERATIONS = [
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
]


def pixels(count: int, side: int) -> torch.Tensor:
    """Smooth pictures with some noise, a grey one and a black one among them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noisy = (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
    noisy[0], noisy[1] = noisy[0, :1], 0
    return (noisy * 255).to(torch.uint8)


def rows(count: int, **places: float) -> torch.Tensor:
    colours = torch.tensor([UNCHANGED]).repeat(count, 1)
    for place, value in places.items():
        colours[:, int(place[1:])] = value
    return colours


def drawn(count: int, ranges: ColourRanges) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.tensor([ranges.draw(torch.rand(NUM_UNIFORM, generator=generator).tolist()) for _ in range(count)])


def levels(views: torch.Tensor) -> torch.Tensor:
    """Normalised views as levels 0 ... 255."""
    return (views * torch.tensor(NORMALISE_STD)[:, None, None] + torch.tensor(NORMALISE_MEAN)[:, None, None]) * 255


@pytest.mark.parametrize("value", [0.2, 0.7, 1.0, 1.8])
@pytest.mark.parametrize("operation", [0, 1, 2])
def test_factors_do_what_torchvision_does(operation: int, value: float) -> None:
    images = pixels(4, 40)
    found = levels(apply_colours(images, rows(4, **{f"p{operation}": value, "p6": operation})))
    torch.testing.assert_close(found, OPERATIONS[operation](images / 255, value) * 255, rtol=0, atol=0.01)


@pytest.mark.parametrize("turns", [-0.5, -0.2, 0.0, 0.05, 0.31])
def test_hue_is_torchvision_s(turns: float) -> None:
    images = torch.cat([pixels(4, 40), torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)])
    found = levels(apply_colours(images, rows(5, p3=turns, p4=3)))
    torch.testing.assert_close(found, functional.adjust_hue(images / 255, turns) * 255, rtol=0, atol=0.02)


def test_grey_is_torchvision_s() -> None:
    images = pixels(4, 40)
    found = levels(apply_colours(images, rows(4, p8=1)))
    torch.testing.assert_close(found, functional.rgb_to_grayscale(images / 255, 3) * 255, rtol=0, atol=0.01)


@pytest.mark.parametrize("sigma", [0.1, 0.6, 1.3, 2.0])
@pytest.mark.parametrize(("side", "taps"), [(224, 23), (40, 5), (16, 3)])
def test_blur_is_torchvision_s_to_half_a_level(sigma: float, side: int, taps: int) -> None:
    images = pixels(3, side)
    found = levels(apply_colours(images, rows(3, p9=sigma)))
    expected = functional.gaussian_blur(images / 255, [taps, taps], [sigma, sigma]) * 255
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5)
    assert (found - expected).abs().mean() < 0.05


def test_operations_come_in_the_row_s_order_then_grey_then_blur() -> None:
    images, colours = pixels(3, 40), rows(3, p0=1.4, p1=0.5, p2=1.6, p3=0.1, p8=1, p9=1.0)
    for order in ([3, 1, 0, 2], [0, 2, 1, 3]):
        colours[:, 4:8] = torch.tensor(order)
        expected = images / 255
        for operation in order:
            expected = OPERATIONS[operation](expected, float(colours[0, operation]))
        expected = functional.gaussian_blur(functional.rgb_to_grayscale(expected, 3), [5, 5], [1.0, 1.0]) * 255
        torch.testing.assert_close(levels(apply_colours(images, colours)), expected, rtol=0, atol=0.5)


def test_what_is_not_applied_changes_nothing() -> None:
    images = pixels(3, 40)
    torch.testing.assert_close(
        levels(apply_colours(images, rows(3, p0=0.3, p1=2.0, p2=0.1, p3=0.4))), images.float(), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize(("count", "side"), [(300, 32), (7, 224)])
def test_a_view_s_bits_depend_neither_on_its_company_nor_on_threads(count: int, side: int) -> None:
    images, colours = pixels(count, side), drawn(count, ColourRanges(1.0, blur=True))
    together = apply_colours(images, colours)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(apply_colours(images, colours), together)
    finally:
        torch.set_num_threads(threads)
    for part in (slice(0, 1), slice(3, 6), slice(count - 1, count)):
        assert torch.equal(apply_colours(images[part], colours[part]), together[part])
    interleaved = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(apply_colours(interleaved, colours), together)


def kolmogorov(samples: np.ndarray, others: np.ndarray) -> float:
    """Largest distance of two empirical distribution functions, over what chance gives at 1 in 1000."""
    places = np.concatenate([samples, others])
    mine, theirs = (np.searchsorted(np.sort(values), places, "right") / len(values) for values in (samples, others))
    return float(np.abs(mine - theirs).max() / (1.95 * math.sqrt(1 / len(samples) + 1 / len(others))))


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_factors_are_distributed_like_torchvision_s(strength: float) -> None:
    colours = drawn(6000, ColourRanges(strength, blur=True))
    jittered = colours[colours[:, 4] >= 0]
    torch.manual_seed(0)
    jitter = v2.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, min(0.2 * strength, 0.5))
    theirs = [jitter.make_params([]) for _ in range(4000)]
    for place, name in enumerate(("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")):
        assert kolmogorov(jittered[:, place].numpy(), np.array([params[name] for params in theirs])) < 1
    orders = {tuple(row) for row in jittered[:, 4:8].tolist()}
    assert len(orders) == 24
    counts = torch.unique(jittered[:, 4:8], dim=0, return_counts=True)[1]
    assert (counts - len(jittered) / 24).abs().max() < 5 * math.sqrt(len(jittered) / 24)
    sigmas = colours[colours[:, 9] > 0, 9].numpy()
    assert kolmogorov(sigmas, np.linspace(0.1, 2, 2000)) < 1
    for share, found in ((0.8, len(jittered)), (0.2, int(colours[:, 8].sum())), (0.5, len(sigmas))):
        assert abs(found / 6000 - share) < 4 * math.sqrt(share * (1 - share) / 6000)
    assert colours.shape == (6000, len(UNCHANGED))


def test_nothing_is_drawn_that_is_not_asked_for() -> None:
    assert (drawn(200, ColourRanges(0.0, blur=False))[:, 4:8] == -1).all()
    assert (drawn(200, ColourRanges(1.0, blur=False))[:, 9] == 0).all()


def test_left_to_the_device_the_views_are_the_same() -> None:
    source = ArrayImages(pixels(6, 80).permute(0, 2, 3, 1).numpy(), list("abcdef"), None, None)
    batches = []
    for leave_colours in (False, True):
        dataset = ViewDataset(source, simclr_view(72), 2, seed=3, leave_colours=leave_colours)
        batches.append(dataset.collate([dataset[(1, index)] for index in (4, 0, 5, 1)]))
    finished, left = batches
    assert (left.views.dtype, left.views.shape) == (torch.uint8, finished.views.shape)
    assert left.colours is not None
    assert finished.colours is None
    (images, ids), (expected, _) = (flatten_views(batch, torch.device("cpu")) for batch in (left, finished))
    assert torch.equal(images, expected)
    assert ids.tolist() == [4, 0, 5, 1] * 2


def test_the_configuration_says_who_does_the_colours() -> None:
    source = ArrayImages(pixels(2, 40).permute(0, 2, 3, 1).numpy(), ["a", "b"], None, None)
    for augment_on, dtype in (("cpu", torch.float32), ("device", torch.uint8)):
        config = ExperimentConfig(data=DataConfig(augment_on=augment_on, image_size=40))
        dataset = training_views(config, source)
        assert dataset.collate([dataset[(0, 1)]]).views.dtype == dtype


def test_a_view_without_colours_to_change_is_never_left() -> None:
    source = ArrayImages(pixels(2, 16).permute(0, 2, 3, 1).numpy(), ["a", "b"], None, None)
    dataset = ViewDataset(source, centre_view(16), 1, seed=3, leave_colours=True)
    batch = dataset.collate([dataset[(0, 1)]])
    assert (batch.views.dtype, batch.colours) == (torch.float32, None)
