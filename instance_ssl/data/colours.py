"""The colour changes of views, drawn view by view and applied to whole batches, on the CPU and on a GPU alike.

A row of P = 10 float32 numbers says what is done to a view:

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# ImageNet channel statistics, for every data set: features learnt on one are then fed alike on another.
NORMALISE_MEAN = (0.485, 0.456, 0.406)
NORMALISE_STD = (0.229, 0.224, 0.225)

ROW_LENGTH = 10
# Uniform numbers that a row is drawn from.
NUM_UNIFORM = 9
UNCHANGED = (1.0, 1.0, 1.0, 0.0, -1.0, -1.0, -1.0, -1.0, 0.0, 0.0)

_ORDERS = tuple(itertools.permutations((0.0, 1.0, 2.0, 3.0)))
_GREY_WEIGHTS = (0.2989, 0.587, 0.114)
# A tap of the blur that is a smaller share of the kernel than this changes no pixel by half a level.
_SMALLEST_TAP = 1e-3
# Pixels of the views that are changed together on a CPU: their planes stay in its second-level cache.
_PIXELS_IN_CACHE = 224 * 224


@dataclass(frozen=True)
class ColourRanges:
    """From what a view's colour changes are drawn.

    Attributes:
        strength: s; factors of brightness, contrast and saturation are uniform in [max(0, 1 - 0.8 s), 1 + 0.8 s], hue
            in ± 0.2 s turns, in random order, in 0.8 of the views.
        blur: whether half the views are blurred, with sigma uniform in [0.1, 2].
    """

    strength: float
    blur: bool

    def draw(self, uniform: Sequence[float]) -> list[float]:
        """A row from `NUM_UNIFORM` numbers uniform in [0, 1)."""
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
    """Changed and normalised views, float32 (n, 3, S, S).

    A view's result does not depend on the others beside it.

    Args:
        views: (n, 3, S, S) uint8, on any device.
        colours: (n, P) float32 on the CPU, so that a GPU is never waited for.
    """
    changed = torch.empty(views.shape, dtype=torch.float32, device=views.device)
    size = len(views)
    if views.device.type == "cpu":
        size = max(1, _PIXELS_IN_CACHE // (views.shape[2] * views.shape[3]))
    for first in range(0, len(views), size):
        _change(changed[first : first + size].copy_(views[first : first + size]), colours[first : first + size])
    return changed


def _change(x: Tensor, colours: Tensor) -> None:
    x.mul_(1 / 255)
    rows = colours.tolist()
    for place in range(4, 8):
        for operation, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            chosen = [i for i, row in enumerate(rows) if row[place] == operation]
            _change_some(x, chosen, change, colours[:, operation])
    _change_some(x, [i for i, row in enumerate(rows) if row[8]], _grey, colours[:, 8])
    _change_some(x, [i for i, row in enumerate(rows) if row[9]], _blur, colours[:, 9])
    mean, std = (torch.tensor(numbers).to(x.device, non_blocking=True) for numbers in (NORMALISE_MEAN, NORMALISE_STD))
    x.sub_(mean[:, None, None]).div_(std[:, None, None])


def _change_some(x: Tensor, chosen: list[int], change: Callable[[Tensor, Tensor], None], values: Tensor) -> None:
    if len(chosen) == len(x):
        change(x, values)
    elif chosen:
        index = torch.tensor(chosen)
        values, index = values[index], index.to(x.device, non_blocking=True)
        part = x[index]
        change(part, values)
        x.index_copy_(0, index, part)


def _brightness(x: Tensor, factors: Tensor) -> None:
    x.mul_(_on_device(factors, x)).clamp_(0, 1)


def _contrast(x: Tensor, factors: Tensor) -> None:
    # Rows before planes: the sum's order, and so its bits, depend neither on the batch nor on the number of threads.
    mean = _grey_levels(x).sum(dim=2).sum(dim=1).div_(x.shape[2] * x.shape[3])
    _blend(x, mean[:, None, None, None], factors)


def _saturation(x: Tensor, factors: Tensor) -> None:
    _blend(x, _grey_levels(x)[:, None], factors)


def _grey(x: Tensor, _: Tensor) -> None:
    x.copy_(_grey_levels(x)[:, None].expand_as(x))


def _blend(x: Tensor, other: Tensor, factors: Tensor) -> None:
    factor = _on_device(factors, x)
    x.mul_(factor).add_(other.mul_(1 - factor)).clamp_(0, 1)


def _grey_levels(x: Tensor) -> Tensor:
    """(n, S, S): torchvision's weights."""
    red, green, blue = _GREY_WEIGHTS
    return torch.mul(x[:, 0], red).add_(x[:, 1], alpha=green).add_(x[:, 2], alpha=blue)


def _hue(x: Tensor, turns: Tensor) -> None:
    """Turns the hue of HSV at equal saturation and value, without branches.

    With M and C the largest channel and its distance to the smallest, a channel of the result is
    M - C · clamp(2 - 6 · |its distance on the colour wheel from the turned hue|, 0, 1).
    """
    red, green, blue = x.unbind(1)
    # The three channels sorted by two exchanges; `turn` is where on the wheel that sector begins, with its sense.
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    turn = torch.sub(green, blue).sign_().clamp_(max=0)  # -1: exchanged
    exchanged = torch.sub(red, high).sign_().clamp_(max=0)
    turn.addcmul_(exchanged, turn.mul(2).add_(1 / 3))
    largest, middle = torch.maximum(red, high), torch.minimum(red, high, out=high)
    chroma = torch.minimum(middle, low, out=exchanged).sub_(largest).neg_()
    hue = middle.sub_(low).div_(low.copy_(chroma).mul_(6).add_(1e-20)).add_(turn).abs_()
    # Half a turn from where the channel is smallest, moved to positive numbers for frac.
    shift = _on_device(turns, x) + torch.tensor([2.0, 5 / 3, 4 / 3]).to(x.device, non_blocking=True)[:, None, None]
    torch.add(hue[:, None], shift, out=x)
    x.frac_().sub_(0.5).abs_().mul_(-6).add_(2).clamp_(0, 1)
    torch.addcmul(largest[:, None], chroma[:, None], x, value=-1, out=x)


def _blur(x: Tensor, sigmas: Tensor) -> None:
    """Gaussian blur with SimCLR's kernel, the odd number of taps nearest to S / 10, and reflected borders."""
    kernels = _kernels(sigmas, max(1, x.shape[3] // 20))
    radius, height, width = kernels.shape[1] // 2, x.shape[2], x.shape[3] + kernels.shape[1] - 1
    padded = functional.pad(x, (radius, radius, radius, radius), mode="reflect").flatten(2)
    # Rows lie one after another, so that a shifted image is a slice; what runs over a row's end is cut off at last.
    taps = kernels.to(x.device, non_blocking=True).t()[:, :, None, None].unbind(0)
    rows = torch.zeros_like(padded)
    _add_taps(rows[..., : rows.shape[2] - 2 * radius], padded, taps, 1)
    blurred = _add_taps(torch.zeros_like(padded[..., : height * width]), rows, taps, width)
    x.copy_(blurred.unflatten(2, (height, width))[..., : x.shape[3]])


def _add_taps(total: Tensor, images: Tensor, taps: Sequence[Tensor], step: int) -> Tensor:
    for i, tap in enumerate(taps):
        total.addcmul_(images[..., i * step : i * step + total.shape[2]], tap)
    return total


def _kernels(sigmas: Tensor, radius: int) -> Tensor:
    """(n, taps): the kernels, cut to the widest one's taps that matter; each adds up to 1."""
    distances = torch.arange(-radius, radius + 1)
    kernels = torch.exp(-0.5 * (distances / sigmas[:, None]).square())
    kernels /= kernels.sum(dim=1, keepdim=True)
    kernels *= kernels >= _SMALLEST_TAP
    kernels /= kernels.sum(dim=1, keepdim=True)
    cut = int((kernels[:, :radius] == 0).all(dim=0).sum())
    return kernels[:, cut : kernels.shape[1] - cut]


def _on_device(factors: Tensor, x: Tensor) -> Tensor:
    return factors.to(x.device, non_blocking=True)[:, None, None, None]
