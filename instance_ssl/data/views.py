"""Random views of images, each from a seed of its own."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from instance_ssl.data.augmentations import Transform
from instance_ssl.data.order import Key, mixed_seed
from instance_ssl.data.sources import ImageSource


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

    Item (epoch, index) is a `ViewItem`. The image is decoded once. torch's default CPU
    generator is seeded anew for each view and left as it was found.

    Args:
        source: the images.
        transform: RGB image -> (3, S, S) float32; takes its randomness from torch's default CPU generator.
        num_views: V, views an image.
        seed: the experiment's seed.
    """

    def __init__(self, source: ImageSource, transform: Transform, num_views: int, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.num_views = num_views
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> ViewItem:
        epoch, index = key
        image = self.source.load(index)
        generator = torch.default_generator
        state = generator.get_state()
        try:
            views = []
            for view in range(self.num_views):
                # Not torch.manual_seed, which would seed the accelerator's generators as well.
                generator.manual_seed(sample_seed(self.seed, epoch, index, view))
                views.append(self.transform(image))
        finally:
            generator.set_state(state)
        return ViewItem(torch.stack(views), index)
