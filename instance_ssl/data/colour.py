"""The colour changes of views: drawn per view, applied to whole batches, on the CPU and on a GPU alike.

A row of P = 10 float32 numbers describes the changes of one view:

| place | what |
| --- | --- |
| 0, 1, 2 | factors of brightness, contrast and saturation; 1 changes nothing |
| 3 | hue, in turns of the colour wheel |
| 4 ... 7 | the order: which of the places 0 ... 3 comes first, second, third, fourth; -1: none |
| 8 | 1: grey |
| 9 | sigma of the Gaussian blur in pixels; 0: none |

The operations are torchvision's (transforms v2 on float images), without its rounding to 8 bits after each.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# ImageNet channel statistics, for every data set, so that an encoder sees another data set on the same scale.
NORMALISE_MEAN = (0.485, 0.456, 0.406)
NORMALISE_STD = (0.229, 0.224, 0.225)

# Number of uniform numbers that a row is drawn from.
NUM_UNIFORM = 9
UNCHANGED = (1.0, 1.0, 1.0, 0.0, -1.0, -1.0, -1.0, -1.0, 0.0, 0.0)

_ORDERS = tuple(itertools.permutations((0.0, 1.0, 2.0, 3.0)))
_GREY_WEIGHTS = (0.2989, 0.587, 0.114)
# Taps of the blur below this share of the kernel change no pixel by half a level.
_SMALLEST_TAP = 1e-3
# Pixels per chunk on a CPU: a view of 224 x 224 fills its second-level cache.
_PIXELS_IN_CACHE = 64 * 1024


@dataclass(frozen=True)
class ColourRanges:
    """The distribution of a view's colour changes.

    Attributes:
        strength: s; factors of brightness, contrast and saturation are uniform in [max(0, 1 - 0.8 s), 1 + 0.8 s], hue
            in ± 0.2 s turns, in random order, in 0.8 of the views.
        blur: whether half the views are blurred, with sigma uniform in [0.1, 2].
    """

    strength: float
    blur: bool

    def draw(self, uniform: Sequence[float]) -> list[float]:
        """Makes a row from `NUM_UNIFORM` numbers uniform in [0, 1)."""
        row = list(UNCHANGED)
        if uniform[0] < 0.8 and self.strength > 0:
            low, high = max(0.0, 1 - 0.8 * self.strength), 1 + 0.8 * self.strength
            row[:3] = [low + (high - low) * number for number in uniform[1:4]]
            row[3] = 0.2 * self.strength * (2 * uniform[4] - 1)
            row[4:8] = _ORDERS[int(uniform[5] * len(_ORDERS))]
        row[8] = float(uniform[6] < 0.2)
        if self.blur and uniform[7] < 0.5:
            row[9] = 0.1 + 1.9 * uniform[8]
        return row


def apply_colours(views: Tensor, colours: Tensor) -> Tensor:
    """Applies colour changes and normalises: float32 (n, 3, S, S).

    A view's result does not depend on the rest of the batch.

    Args:
        views: (n, 3, S, S) uint8, on any device.
        colours: (n, P) float32 on the CPU, so that nothing waits for a GPU.
    """
    changed = torch.empty(views.shape, dtype=torch.float32, device=views.device)
    size = views_at_once(views.shape[2]) if views.device.type == "cpu" else len(views)
    for first in range(0, len(views), size):
        part = changed[first : first + size].copy_(views[first : first + size])
        _change(part, colours[first : first + size].tolist())
    return changed


def views_at_once(image_size: int) -> int:
    """Views per chunk on a CPU: small ones are grouped to save Python calls, large ones stay in its cache."""
    return max(1, _PIXELS_IN_CACHE // image_size**2)


def _change(x: Tensor, rows: list[list[float]]) -> None:
    """Changes levels 0 ... 255, (n, 3, S, S), into normalised views."""
    for place in range(4, 8):
        for operation, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            _change_some(x, [i for i, row in enumerate(rows) if row[place] == operation], change, rows, operation)
    _change_some(x, [i for i, row in enumerate(rows) if row[8]], _grey, rows, 8)
    _change_some(x, [i for i, row in enumerate(rows) if row[9]], _blur, rows, 9)
    x.sub_(_on_device([[255 * mean for mean in NORMALISE_MEAN]], x))
    x.div_(_on_device([[255 * std for std in NORMALISE_STD]], x))


def _change_some(
    x: Tensor, chosen: list[int], change: Callable[[Tensor, list[float]], None], rows: list[list[float]], place: int
) -> None:
    """Changes the chosen images, each by the number at a place of its row."""
    if not chosen:
        return
    values = [rows[i][place] for i in chosen]
    if len(chosen) == len(x):
        change(x, values)
        return
    index = torch.tensor(chosen).to(x.device, non_blocking=True)
    part = x[index]
    change(part, values)
    x.index_copy_(0, index, part)


def _brightness(x: Tensor, factors: list[float]) -> None:
    x.mul_(_on_device([[factor] for factor in factors], x)).clamp_(0, 255)


def _contrast(x: Tensor, factors: list[float]) -> None:
    # Rows, then planes: so the sum's order, and its bits, depend neither on the batch nor on the number of threads.
    sums = x.sum(dim=3).sum(dim=2)
    grey = _grey_levels(sums[:, :, None, None]).div_(x.shape[2] * x.shape[3])
    _blend(x, grey[:, None], factors)


def _saturation(x: Tensor, factors: list[float]) -> None:
    _blend(x, _grey_levels(x)[:, None], factors)


def _grey(x: Tensor, _: list[float]) -> None:
    x.copy_(_grey_levels(x)[:, None].expand_as(x))


def _blend(x: Tensor, other: Tensor, factors: list[float]) -> None:
    x.mul_(_on_device([[factor] for factor in factors], x))
    x.add_(other.mul_(_on_device([[1 - factor] for factor in factors], x))).clamp_(0, 255)


def _grey_levels(x: Tensor) -> Tensor:
    """(n, S, S): torchvision's weights."""
    red, green, blue = _GREY_WEIGHTS
    return torch.mul(x[:, 0], red).add_(x[:, 1], alpha=green).add_(x[:, 2], alpha=blue)


def _hue(x: Tensor, turns: list[float]) -> None:
    """Turns the hue of HSV at equal saturation and value, without branches.

    With M the largest channel and C its distance to the smallest, a channel of the result is
    M - C · clamp(2 - 6 · |its distance on the colour wheel from where it is smallest|, 0, 1).
    """
    red, green, blue = x.unbind(1)
    # Sorts the channels by two exchanges (-1: made); `turn` follows where on the wheel the sector begins.
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    turn = torch.sub(green, blue).sign_().clamp_(max=0)
    exchanged = torch.sub(red, high).sign_().clamp_(max=0)
    turn.addcmul_(exchanged, torch.mul(turn, 2).add_(1 / 3))
    largest, middle = torch.maximum(red, high), torch.minimum(red, high, out=high)
    chroma = torch.sub(largest, torch.minimum(middle, low, out=exchanged), out=exchanged)
    hue = middle.sub_(low).div_(torch.mul(chroma, 6, out=low).add_(1e-20)).add_(turn).abs_()
    # Two turns further all are positive, as frac needs.
    torch.add(hue[:, None], _on_device([[turn + 2, turn + 5 / 3, turn + 4 / 3] for turn in turns], x), out=x)
    x.frac_().sub_(0.5).abs_()
    torch.sub(torch.full((), 2.0, device=x.device), x, alpha=6, out=x).clamp_(0, 1)
    torch.addcmul(largest[:, None], chroma[:, None], x, value=-1, out=x)


def _blur(x: Tensor, sigmas: list[float]) -> None:
    """Gaussian blur with SimCLR's kernel, the odd number of taps nearest to S / 10, and reflected borders."""
    kernels = _kernels(sigmas, max(1, x.shape[3] // 20))
    radius, height, width = len(kernels[0]) // 2, x.shape[2], x.shape[3] + len(kernels[0]) - 1
    padded = functional.pad(x, (radius, radius, radius, radius), mode="reflect").flatten(2)
    # With the rows one after another a shifted image is a slice; what runs over a row's end is cut off at the end.
    taps = _on_device(kernels, x)[..., 0].unbind(1)
    rows = torch.empty_like(padded)
    _filter(padded, taps, 1, out=rows[..., : rows.shape[2] - 2 * radius])
    _filter(rows, taps, width, out=padded[..., : height * width])
    x.copy_(padded[..., : height * width].unflatten(2, (height, width))[..., : x.shape[3]])


def _filter(images: Tensor, taps: Sequence[Tensor], step: int, out: Tensor) -> None:
    size = out.shape[2]
    torch.mul(images[..., :size], taps[0][:, None], out=out)
    for i, tap in enumerate(taps[1:], start=1):
        out.addcmul_(images[..., i * step : i * step + size], tap[:, None])


def _kernels(sigmas: list[float], radius: int) -> list[list[float]]:
    """The kernels of these sigmas, each with sum 1 and as many taps as the widest needs."""
    kernels = []
    for sigma in sigmas:
        side = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(radius + 1)]
        whole = 2 * sum(side) - 1
        side = [tap if tap >= _SMALLEST_TAP * whole else 0.0 for tap in side]
        whole = 2 * sum(side) - 1
        kernels.append([tap / whole for tap in side])
    needed = max(sum(tap > 0 for tap in side) for side in kernels)
    return [side[needed - 1 : 0 : -1] + side[:needed] for side in kernels]


def _on_device(numbers: list[list[float]], x: Tensor) -> Tensor:
    """(n, m) numbers as (n, m, 1, 1)."""
    return torch.tensor(numbers)[:, :, None, None].to(x.device, non_blocking=True)
