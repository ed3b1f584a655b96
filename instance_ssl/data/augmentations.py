"""The random and the deterministic views of an image that training and evaluation see.

Every function returns a picklable transform: PIL RGB image -> float32 tensor (3, image_size, image_size), normalised.
All randomness comes from torch's default CPU generator, so seeding that generator fixes a view.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

Transform = Callable[[Image.Image], Tensor]

# ImageNet channel statistics, for every data set: features learnt on one are then fed alike on another.
NORMALISE_MEAN = (0.485, 0.456, 0.406)
NORMALISE_STD = (0.229, 0.224, 0.225)

# Up to this side length, CIFAR's conventions hold: weaker jitter, no blur, no margin around the evaluation crop.
_SMALL_IMAGE_SIZE = 64


def simclr_view(
    image_size: int,
    *,
    min_crop_scale: float = 0.08,
    jitter_strength: float | None = None,
    blur: bool | None = None,
) -> Transform:
    """SimCLR's random view: crop, flip, colour jitter, grey, blur (arXiv 2002.05709, appendix A; simclr data_util.py).

    Args:
        image_size: side of the view in pixels.
        min_crop_scale: smallest share of the image's area that a crop keeps, in (0, 1].
        jitter_strength: multiplies SimCLR's (0.8, 0.8, 0.8, 0.2); None takes 0.5 up to 64 pixels, else 1.0 (B.9).
        blur: whether half the views are blurred; None takes no up to 64 pixels, else yes (B.9).
    """
    small = image_size <= _SMALL_IMAGE_SIZE
    strength = jitter_strength if jitter_strength is not None else (0.5 if small else 1.0)
    jitter = v2.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    steps: list[Transform] = [
        _random_crop(image_size, min_crop_scale),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([jitter], p=0.8),
        v2.RandomGrayscale(0.2),
    ]
    if blur if blur is not None else not small:
        # The odd number nearest to image_size / 10; a kernel of one pixel would not blur at all.
        kernel_size = max(3, 2 * (image_size // 20) + 1)
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel_size, sigma=(0.1, 2.0))], p=0.5))
    return v2.Compose([*steps, _to_unit_range, _normalise])


def digit_view(image_size: int) -> Transform:
    """Random view of small handwriting: a slight affine change and contrast jitter, never a flip (a 6 is no 9).

    The image is resized to (image_size, image_size), then rotated and sheared by up to 15 degrees each, moved by up to
    an eighth of the side and scaled by 0.75 to 1.25; brightness and contrast change by a factor of 0.6 to 1.4.
    The background is taken to be black. The ranges are this project's own choice for scikit-learn's 8x8 digits.
    """
    return _DigitView(image_size)


def probe_view(image_size: int) -> Transform:
    """The linear probe's training view: random resized crop and flip (moco main_lincls.py)."""
    return v2.Compose([_random_crop(image_size, 0.08), v2.RandomHorizontalFlip(0.5), _to_unit_range, _normalise])


def centre_view(image_size: int) -> Transform:
    """The deterministic evaluation view.

    Above 64 pixels, the short side is resized to image_size * 256 / 224 and the centre cropped (the ImageNet
    convention); smaller images are resized to (image_size, image_size) whole, for CIFAR's objects fill their frame.
    """
    bicubic = v2.InterpolationMode.BICUBIC
    if image_size > _SMALL_IMAGE_SIZE:
        short_side = round(image_size * 256 / 224)
        steps: list[Transform] = [v2.Resize(short_side, interpolation=bicubic), v2.CenterCrop(image_size)]
    else:
        steps = [v2.Resize((image_size, image_size), interpolation=bicubic)]
    return v2.Compose([*steps, _to_unit_range, _normalise])


@dataclass(frozen=True)
class _DigitView:
    """See `digit_view`; on PIL's affine transform itself, which costs a fraction of v2's at these sizes."""

    image_size: int

    def __call__(self, image: Image.Image) -> Tensor:
        side = self.image_size
        uniform = (2 * torch.rand(7) - 1).tolist()
        angle, shear = math.radians(15 * uniform[0]), math.radians(15 * uniform[1])
        scale = 1 + 0.25 * uniform[2]
        shift_x, shift_y = 0.125 * side * uniform[3], 0.125 * side * uniform[4]
        coefficients = _inverse_affine(side / 2, angle, shear, scale, shift_x, shift_y)
        if image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        image = image.transform((side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
        pixels = _to_unit_range(image).mul_(1 + 0.4 * uniform[5]).clamp_(0, 1)
        mean = pixels.mean()
        return _normalise(pixels.sub_(mean).mul_(1 + 0.4 * uniform[6]).add_(mean).clamp_(0, 1))


def _inverse_affine(
    centre: float, angle: float, shear: float, scale: float, shift_x: float, shift_y: float
) -> tuple[float, float, float, float, float, float]:
    """PIL's six coefficients, which map a point of the result back to the image.

    The forward map about (centre, centre) is scale * rotation(angle) @ [[1, tan(shear)], [0, 1]], then the shift in
    pixels; angles in radians.
    """
    cos, sin, tan = math.cos(angle), math.sin(angle), math.tan(shear)
    a, b = (cos + tan * sin) / scale, (sin - tan * cos) / scale
    d, e = -sin / scale, cos / scale
    x, y = centre + shift_x, centre + shift_y
    return a, b, centre - a * x - b * y, d, e, centre - d * x - e * y


def _random_crop(image_size: int, min_scale: float) -> v2.RandomResizedCrop:
    return v2.RandomResizedCrop(
        image_size, scale=(min_scale, 1.0), ratio=(3 / 4, 4 / 3), interpolation=v2.InterpolationMode.BICUBIC
    )


def _to_unit_range(image: Image.Image) -> Tensor:
    """RGB image -> float32 (3, H, W) in [0, 1]."""
    return functional.pil_to_tensor(image).to(torch.float32).div_(255)


def _normalise(pixels: Tensor) -> Tensor:
    return functional.normalize(pixels, list(NORMALISE_MEAN), list(NORMALISE_STD), inplace=True)
