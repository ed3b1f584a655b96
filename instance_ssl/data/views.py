"""Random views of images, each from a seed of its own."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from instance_ssl.data.augmentations import Transform
from instance_ssl.data.order import Key, mixed_seed
from instance_ssl.data.sources import ImageSource


def sample_seed(seed: int, epoch: int, index: int, view: int) -> int:
    """Seed of one view of one image in one epoch, in [0, 2**63)."""
    return mixed_seed(seed, epoch, index, view)


class ViewDataset(Dataset[tuple[Tensor, int]]):
    """Random views of the images of a source, each drawn from its own seed.

    Item (epoch, index) is (views (V, 3, S, S) float32, index). The image is decoded once. torch's default CPU
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

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
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
        return torch.stack(views), index
