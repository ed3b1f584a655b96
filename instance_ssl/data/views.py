"""Random views of images, each from its own seed, and batches of them."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from instance_ssl.data.augmentations import RandomView, Transform
from instance_ssl.data.colour import apply_colours, views_at_once
from instance_ssl.data.crop import Crop, crop_resized, reduction_for
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.data.sampler import Key, mixed_seed

T = TypeVar("T")


def sample_seed(seed: int, epoch: int, index: int, view: int) -> int:
    """Seed of one view of one image in one epoch, in [0, 2**63)."""
    return mixed_seed(seed, epoch, index, view)


class ViewItem(NamedTuple):
    """The views of one image, with the shapes of a `ViewBatch` less its first dimension."""

    views: Tensor
    id: int
    colours: Tensor | None = None


class ViewBatch(NamedTuple):
    """The views of some images.

    Attributes:
        views: (b, V, 3, S, S) float32, normalised; uint8 where `colours` is given.
        ids: (b,) int64, instance ids.
        colours: (b, V, P) float32, the colour changes left to the device; None: the views are finished.
        unreadable: id → why, of the images of the batch that were found unreadable; None: none was.
    """

    views: Tensor
    ids: Tensor
    colours: Tensor | None = None
    unreadable: dict[int, str] | None = None


class ViewDataset(Dataset[ViewItem]):
    """Random views of the images of a source, each drawn from its own seed.

    Item (epoch, index) is a `ViewItem`; `collate` makes a batch of several. An image is read and decoded once for all
    its views. torch's default CPU generator is seeded for each view and restored afterwards.

    Args:
        source: the images.
        transform: RGB image -> (3, S, S) float32; takes its randomness from torch's default CPU generator.
        num_views: V, views per image.
        seed: the experiment's seed.
        leave_colours: batches of a `RandomView` are uint8 crops plus the colour changes still to be made.
    """

    def __init__(
        self, source: ImageSource, transform: Transform, num_views: int, seed: int, *, leave_colours: bool = False
    ) -> None:
        self.source, self.transform, self.num_views = source, transform, num_views
        self.seed, self.leave_colours = seed, leave_colours

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> ViewItem:
        transform = self.transform
        if isinstance(transform, RandomView):
            return self._crops(key, transform)
        image = self.source.load(key[1])
        return ViewItem(torch.stack(self._seeded(key, lambda: transform(image))), key[1])

    def collate(self, items: Sequence[ViewItem]) -> ViewBatch:
        """The batch of these items, with their colours changed unless `leave_colours`.

        In a worker process it lies in memory that the main process maps.
        """
        ids = joined([torch.tensor([item.id for item in items])], (len(items),), torch.int64)
        views, colours = [item.views for item in items], [item.colours for item in items if item.colours is not None]
        shape = (len(items), *views[0].shape)
        if not colours:
            return ViewBatch(joined((view[None] for view in views), shape, views[0].dtype), ids)
        if self.leave_colours:
            # As they lie in memory: the channels of a pixel adjacent.
            parts = (view.permute(0, 2, 3, 1)[None] for view in views)
            crops = joined(parts, tuple(shape[place] for place in (0, 1, 3, 4, 2)), torch.uint8)
            left = joined((one[None] for one in colours), (len(items), *colours[0].shape), torch.float32)
            return ViewBatch(crops.permute(0, 1, 4, 2, 3), ids, left)
        size = -(-views_at_once(shape[-1]) // self.num_views)
        finished = (
            apply_colours(torch.cat(views[first : first + size]), torch.cat(colours[first : first + size]))
            for first in range(0, len(items), size)
        )
        flat = joined(finished, (len(items) * self.num_views, *shape[2:]), torch.float32)
        return ViewBatch(flat.view(shape), ids)

    def _crops(self, key: Key, view: RandomView) -> ViewItem:
        drawn: list[tuple[Crop, list[float]]] = []
        full_width = 0

        def draw(width: int, height: int) -> int:
            nonlocal full_width
            full_width = width
            drawn.extend(self._seeded(key, lambda: view.draw(width, height)))
            return reduction_for([crop for crop, _ in drawn], view.image_size)

        pixels = self.source.load_pixels(key[1], draw)
        crops = [crop_resized(pixels, crop, full_width, view.image_size).permute(1, 2, 0) for crop, _ in drawn]
        return ViewItem(torch.stack(crops).permute(0, 3, 1, 2), key[1], torch.tensor([row for _, row in drawn]))

    def _seeded(self, key: Key, make: Callable[[], T]) -> list[T]:
        """Calls `make` for each view under that view's seed."""
        generator = torch.default_generator
        state = generator.get_state()
        made = []
        try:
            for view in range(self.num_views):
                # torch.manual_seed would seed the accelerator's generators, too.
                generator.manual_seed(sample_seed(self.seed, *key, view))
                made.append(make())
        finally:
            generator.set_state(state)
        return made


def joined(parts: Iterable[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Concatenates CPU tensors along the first dimension into a tensor of the given shape.

    In a DataLoader's worker process the parts are written to an anonymous file in memory that the main process maps.
    Writing a page takes a third of the time of touching it in a mapping, as torch's default_collate does. Nor does the
    file count against /dev/shm, which containers limit to 64 MiB, and which makes torch's queues hang when it is full.

    Raises:
        ValueError: in a worker process, where the parts do not fill the shape.
    """
    if get_worker_info() is None:
        whole, row = torch.empty(shape, dtype=dtype), 0
        for part in parts:
            whole[row : row + len(part)] = part
            row += len(part)
        return whole
    size, offset = math.prod(shape) * dtype.itemsize, 0
    file = os.memfd_create("batch")
    try:
        os.ftruncate(file, size)
        for part in parts:
            data = part.contiguous().numpy().data.cast("B")
            while data:
                written = os.pwrite(file, data, offset)
                offset, data = offset + written, data[written:]
        if offset != size:
            raise ValueError(f"{offset} bytes do not fill a tensor of {size}")
        storage = torch.UntypedStorage._new_shared_fd_cpu(file, size)  # type: ignore[attr-defined]  # keeps a dup
    finally:
        os.close(file)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)
