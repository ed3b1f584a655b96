"""The random and deterministic views of an image for training and evaluation.

Every function returns a picklable transform: PIL RGB image -> float32 tensor (3, image_size, image_size), normalised.
All randomness comes from torch's default CPU generator, so its seed fixes a view.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from instance_ssl.data.colour import NORMALISE_MEAN, NORMALISE_STD, NUM_UNIFORM, UNCHANGED, ColourRanges, apply_colours
from instance_ssl.data.crop import Crop, crop_resized, draw_crop
from instance_ssl.data.decode import image_pixels

Transform = Callable[[Image.Image], Tensor]

# Up to this side length, CIFAR's conventions hold: weaker jitter, no blur, no margin around the evaluation crop.
_SMALL_IMAGE_SIZE = 64
# From this aspect ratio on, an image is cropped before it is resized.
_ELONGATED = 4


@dataclass(frozen=True)
class RandomView:
    """A random crop, perhaps flipped, perhaps changed in colour.

    Drawing is separate, as it needs only the image's size, and colours can be left to the device.

    Attributes:
        image_size: S, side of the view in pixels.
        min_crop_scale: smallest share of the image's area that a crop keeps, in (0, 1].
        colours: the distribution of colour changes; None: there are none.
    """

    image_size: int
    min_crop_scale: float
    colours: ColourRanges | None

    def draw(self, width: int, height: int) -> tuple[Crop, list[float]]:
        """Draws the crop of an image of that size, and its row of colour changes (see colour.py)."""
        uniform = torch.rand(Crop.NUM_UNIFORM + NUM_UNIFORM).tolist()
        crop = draw_crop(width, height, self.min_crop_scale, uniform[NUM_UNIFORM:])
        return crop, list(UNCHANGED) if self.colours is None else self.colours.draw(uniform[:NUM_UNIFORM])

    def __call__(self, image: Image.Image) -> Tensor:
        """A view of an RGB image, float32 (3, S, S), normalised."""
        crop, colours = self.draw(*image.size)
        view = crop_resized(image_pixels(image), crop, image.width, self.image_size)
        return apply_colours(view[None], torch.tensor([colours]))[0]


def simclr_view(
    image_size: int, *, min_crop_scale: float = 0.08, jitter_strength: float | None = None, blur: bool | None = None
) -> RandomView:
    """SimCLR's random view: crop, flip, colour jitter, grey, blur (arXiv 2002.05709, appendix A; simclr data_util.py).

    Args:
        image_size: side of the view in pixels.
        min_crop_scale: smallest share of the image's area that a crop keeps, in (0, 1].
        jitter_strength: multiplies SimCLR's (0.8, 0.8, 0.8, 0.2); None takes 0.5 up to 64 pixels, else 1.0 (B.9).
        blur: whether half the views are blurred; None takes no up to 64 pixels, else yes (B.9).
    """
    small = image_size <= _SMALL_IMAGE_SIZE
    strength = jitter_strength if jitter_strength is not None else (0.5 if small else 1.0)
    return RandomView(image_size, min_crop_scale, ColourRanges(strength, not small if blur is None else blur))


def digit_view(image_size: int) -> Transform:
    """Random view of small handwriting: a slight affine change and contrast jitter, never a flip (a 6 is not a 9).

    The image is resized to (image_size, image_size), then rotated and sheared by up to 15 degrees each, moved by up to
    an eighth of the side and scaled by 0.75 to 1.25; brightness and contrast change by a factor of 0.6 to 1.4.
    The background is taken to be black. The ranges are this project's own choice for scikit-learn's 8x8 digits.
    """
    return partial(_digit_view, image_size)


def probe_view(image_size: int) -> RandomView:
    """The linear probe's training view: random resized crop and flip (moco main_lincls.py)."""
    return RandomView(image_size, min_crop_scale=0.08, colours=None)


def centre_view(image_size: int) -> Transform:
    """The deterministic evaluation view.

    Above 64 pixels, the short side is resized to image_size * 256 / 224 and the centre cropped (the ImageNet
    convention). Up to 64, the whole image is resized to (image_size, image_size), as CIFAR's objects fill their frame.
    """
    if image_size > _SMALL_IMAGE_SIZE:
        crop: Callable[[Image.Image], Image.Image] = partial(_centre_crop, round(image_size * 256 / 224), image_size)
    else:
        crop = v2.Resize((image_size, image_size), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([crop, _to_unit_range, _normalise])


def _centre_crop(short_side: int, size: int, image: Image.Image) -> Image.Image:
    """Resizes the short side and takes a square of `size` from the centre."""
    short, long = sorted(image.size)
    if long <= _ELONGATED * short:
        image = functional.resize(image, [short_side], v2.InterpolationMode.BICUBIC)
    else:
        image = _resized_centre(image, short_side, size)
    return functional.center_crop(image, [size])


def _resized_centre(image: Image.Image, short_side: int, size: int) -> Image.Image:
    """The part of the resized image that a square of `size` needs of the long side.

    A whole one grows with its aspect ratio: a line of 1 x 20,000 pixels would take 4 GiB. The pixels are the same, up
    to the rounding of one level in 255.
    """
    bicubic = Image.Resampling.BICUBIC
    short, long = sorted(image.size)
    length = int(short_side * long / short)
    start = round((length - size) / 2)
    scale = long / length
    first, last = start * scale, (start + size) * scale
    # The filter reaches two pixels further, of the source or, where it shrinks, of the result. Whole pixels are cut
    # out first, as PIL keeps the box in single precision.
    reach = 2 * max(scale, 1) + 1
    low, high = max(0, math.floor(first - reach)), min(long, math.ceil(last + reach))
    # One axis after the other, in PIL's order for the whole image, as it rounds and clips in between.
    if image.width == long:
        part = image.crop((low, 0, high, short)).resize((size, short), bicubic, (first - low, 0, last - low, short))
        return part.resize((size, short_side), bicubic)
    part = image.crop((0, low, short, high))
    if scale > 1:
        part = part.resize((short, size), bicubic, (0, first - low, short, last - low))
        return part.resize((short_side, size), bicubic)
    part = part.resize((short_side, part.height), bicubic)
    return part.resize((short_side, size), bicubic, (0, first - low, short_side, last - low))


def _digit_view(side: int, image: Image.Image) -> Tensor:
    """See `digit_view`. Uses PIL's affine transform directly, which costs a fraction of v2's at these sizes."""
    uniform = (2 * torch.rand(7) - 1).tolist()
    angle, shear = math.radians(15 * uniform[0]), math.radians(15 * uniform[1])
    shift_x, shift_y = 0.125 * side * uniform[3], 0.125 * side * uniform[4]
    coefficients = _inverse_affine(side / 2, angle, shear, 1 + 0.25 * uniform[2], shift_x, shift_y)
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


def _to_unit_range(image: Image.Image) -> Tensor:
    """RGB image -> float32 (3, H, W) in [0, 1]."""
    return functional.pil_to_tensor(image).to(torch.float32).div_(255)


def _normalise(pixels: Tensor) -> Tensor:
    return functional.normalize(pixels, list(NORMALISE_MEAN), list(NORMALISE_STD), inplace=True)
