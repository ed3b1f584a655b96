"""Random views of images, each from a seed of its own."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from instance_ssl.data.augmentations import DrawnView, RandomView, Transform
from instance_ssl.data.colours import apply_colours, views_at_once
from instance_ssl.data.crops import crop_resized, reduction_for
from instance_ssl.data.order import Key, mixed_seed
from instance_ssl.data.sources import ImageSource

T = TypeVar("T")


def sample_seed(seed: int, epoch: int, index: int, view: int) -> int:
    """Seed of one view of one image in one epoch, in [0, 2**63)."""
    return mixed_seed(seed, epoch, index, view)


class ViewItem(NamedTuple):
    """The views of one image.

    Attributes:
        views: (V, 3, S, S) float32, normalised; uint8 where `colours` is given.
        id: instance id of the image.
        colours: (V, P) float32, the colour changes that are left to the device; None: the views are finished.
    """

    views: Tensor
    id: int
    colours: Tensor | None = None


class ViewBatch(NamedTuple):
    """The views of some images.

    Attributes:
        views: (b, V, 3, S, S) float32, normalised; uint8 where `colours` is given.
        ids: (b,) int64, instance ids.
        colours: (b, V, P) float32, the colour changes that are left to the device; None: the views are finished.
        unreadable: id → why, of the images of the batch that were found unreadable; None: none was.
    """

    views: Tensor
    ids: Tensor
    colours: Tensor | None = None
    unreadable: dict[int, str] | None = None


class ViewDataset(Dataset[ViewItem]):
    """Random views of the images of a source, each drawn from its own seed.

    Item (epoch, index) is a `ViewItem`, and `collate` makes a batch of some. The image is read and decoded once for all
    its views. torch's default CPU generator is seeded anew for each view and left as it was found.

    Args:
        source: the images.
        transform: RGB image -> (3, S, S) float32; takes its randomness from torch's default CPU generator.
        num_views: V, views an image.
        seed: the experiment's seed.
        leave_colours: batches of a `RandomView` are uint8 crops with the colour changes that are still to be made.
    """

    def __init__(
        self, source: ImageSource, transform: Transform, num_views: int, seed: int, *, leave_colours: bool = False
    ) -> None:
        self.source = source
        self.transform = transform
        self.num_views = num_views
        self.seed = seed
        self.leave_colours = leave_colours

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> ViewItem:
        transform = self.transform
        if isinstance(transform, RandomView):
            return self._crops(key, transform)
        image = self.source.load(key[1])
        return ViewItem(torch.stack(self._seeded(key, lambda: transform(image))), key[1])

    def collate(self, items: Sequence[ViewItem]) -> ViewBatch:
        """The batch of these items, with the colours done unless they are left.

        In a worker process it lies in memory shared with the main process from the first, and is never copied.
        """
        ids = torch.tensor([item.id for item in items], dtype=torch.int64)
        views, colours = [item.views for item in items], [item.colours for item in items if item.colours is not None]
        if not colours:
            return ViewBatch(torch.stack(views, out=_empty((len(items), *views[0].shape), views[0].dtype)), ids)
        if self.leave_colours:
            return ViewBatch(_stacked(views, _empty), ids, torch.stack(colours))
        batch = _empty((len(items), *views[0].shape), torch.float32)
        size = -(-views_at_once(views[0].shape[-1]) // self.num_views)
        for first in range(0, len(items), size):
            part = slice(first, first + size)
            crops, rows = _stacked(views[part], torch.empty), torch.stack(colours[part])
            apply_colours(crops.flatten(0, 1), rows.flatten(0, 1), out=batch[part].flatten(0, 1))
        return ViewBatch(batch, ids)

    def _crops(self, key: Key, view: RandomView) -> ViewItem:
        drawn: list[DrawnView] = []
        full_width = 0

        def draw(width: int, height: int) -> int:
            nonlocal full_width
            full_width = width
            drawn.extend(self._seeded(key, lambda: view.draw(width, height)))
            return reduction_for([one.crop for one in drawn], view.image_size)

        pixels = self.source.load_pixels(key[1], draw)
        crops = [crop_resized(pixels, one.crop, full_width, view.image_size).permute(1, 2, 0) for one in drawn]
        return ViewItem(torch.stack(crops).permute(0, 3, 1, 2), key[1], torch.tensor([one.colours for one in drawn]))

    def _seeded(self, key: Key, make: Callable[[], T]) -> list[T]:
        """What `make` gives for each view, under that view's seed."""
        generator = torch.default_generator
        state = generator.get_state()
        made = []
        try:
            for view in range(self.num_views):
                # Not torch.manual_seed, which would seed the accelerator's generators as well.
                generator.manual_seed(sample_seed(self.seed, *key, view))
                made.append(make())
        finally:
            generator.set_state(state)
        return made


def _stacked(views: Sequence[Tensor], empty: Callable[..., Tensor]) -> Tensor:
    """(b, V, 3, S, S) uint8, the channels of a pixel side by side in memory, as in each of the views."""
    num_views, channels, height, width = views[0].shape
    stacked = empty((len(views), num_views, height, width, channels), dtype=torch.uint8)
    return torch.stack([view.permute(0, 2, 3, 1) for view in views], out=stacked).permute(0, 1, 4, 2, 3)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a batch: in a worker process, shared memory, as torch's default_collate takes it."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape)
    storage = torch.UntypedStorage._new_shared(size * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, torch.empty(shape, device="meta").stride())
