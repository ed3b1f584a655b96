"""Resized images and boxes for a detector, drawn from (seed, epoch, image) alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Sampler
from torchvision.transforms.v2 import functional

from instance_ssl.data.augmentations import NORMALISE_MEAN, NORMALISE_STD
from instance_ssl.data.loaders import BatchLoader
from instance_ssl.data.sampler import BatchKeys, Key, consecutive_batches, epoch_order
from instance_ssl.data.views import ViewDataset, ViewItem, sample_seed
from instance_ssl.distributed.partition import Partition
from instance_ssl.evaluation.detection.voc import VocImages


@dataclass(frozen=True)
class Resizing:
    """Resizes the short side to one of these lengths, in pixels, or to less where the long side would be too long.

    In training the length is drawn, and half the images are flipped (detectron2's ResizeShortestEdge, RandomFlip).
    """

    short_sides: tuple[int, ...]
    max_long_side: int
    flip: bool

    def draw(self, seed: int, width: int, height: int) -> tuple[int, int, bool]:
        """Width, height and whether to flip."""
        generator = torch.Generator().manual_seed(seed)
        place = int(torch.randint(len(self.short_sides), (1,), generator=generator))
        flipped = self.flip and bool(torch.rand(1, generator=generator) < 0.5)
        scale = min(self.short_sides[place] / min(width, height), self.max_long_side / max(width, height))
        return max(int(width * scale + 0.5), 1), max(int(height * scale + 0.5), 1), flipped


class DetectionBatch(NamedTuple):
    """Images (3, h, w) normalised, their boxes (m, 4) in their own pixels, classes (m,) from 0, and a seed each."""

    images: list[Tensor]
    boxes: list[Tensor]
    classes: list[Tensor]
    seeds: list[int]


def training_batches(
    data: VocImages,
    resizing: Resizing,
    num_workers: int,
    *,
    seed: int,
    batch_size: int,
    iterations: range,
    rank: int,
    world_size: int,
) -> Iterator[DetectionBatch]:
    """Yields this rank's part of the global batch of each iteration.

    Iteration i takes places i·B … (i + 1)·B - 1 of an endless list: one permutation of the images after another, each
    drawn from (seed, epoch). Images without objects are excluded (detectron2's FILTER_EMPTY_ANNOTATIONS).

    Raises:
        RankError: from the iteration, when an image cannot be decoded.
    """
    order = _EndlessOrder(data, seed, batch_size, iterations, rank, world_size)
    dataset = _ResizedImages(data, resizing, seed)
    images = iter(BatchLoader(dataset, order, num_workers, persistent=False))
    keys = iter(order)
    for _ in iterations:
        own = [key for (key,) in islice(keys, order.own_size)]
        loaded = [batch.views[0] for batch in islice(images, len(own))]
        boxes = [_resized_boxes(data, resizing, sample_seed(seed, *key, 0), key[1]) for key in own]
        classes = [data.annotations[index].classes_m for _, index in own]
        yield DetectionBatch(loaded, boxes, classes, [sample_seed(seed, *key, 1) for key in own])


def single_images(data: VocImages, resizing: Resizing, num_workers: int, indices: range) -> Iterator[Tensor]:
    """Yields those images one by one, (3, h, w), as features at an edge would depend on a batch's padding.

    Raises:
        RankError: from the iteration, when an image cannot be decoded.
    """
    keys = BatchKeys(consecutive_batches(indices.start, indices.stop, 1))
    for batch in BatchLoader(_ResizedImages(data, resizing, 0), keys, num_workers, persistent=False):
        yield batch.views[0]


class _EndlessOrder(Sampler[list[Key]]):
    """Keys of this rank's images, one at a time."""

    def __init__(
        self, data: VocImages, seed: int, batch_size: int, iterations: range, rank: int, world_size: int
    ) -> None:
        self.kept = torch.tensor([i for i, annotation in enumerate(data.annotations) if len(annotation.classes_m)])
        self.seed, self.batch_size, self.iterations = seed, batch_size, iterations
        partition = Partition(batch_size, world_size)
        self.own_size, self.first = partition.count(rank), partition.bounds(rank)[0]

    def __len__(self) -> int:
        return len(self.iterations) * self.own_size

    def __iter__(self) -> Iterator[list[Key]]:
        known, order = -1, self.kept
        for iteration in self.iterations:
            start = iteration * self.batch_size + self.first
            for place in range(start, start + self.own_size):
                epoch, row = divmod(place, len(self.kept))
                if epoch != known:
                    known, order = epoch, self.kept[epoch_order(len(self.kept), self.seed, epoch)]
                yield [(epoch, int(order[row]))]


class _ResizedImages(ViewDataset):
    """Item (epoch, index) is one view, (3, h, w), without a dimension for views."""

    def __init__(self, data: VocImages, resizing: Resizing, seed: int) -> None:
        super().__init__(data.images, functional.pil_to_tensor, num_views=1, seed=seed)
        self.resizing = resizing

    def __getitem__(self, key: Key) -> ViewItem:
        image = self.source.load(key[1])
        width, height, flipped = self.resizing.draw(sample_seed(self.seed, *key, 0), *image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = functional.pil_to_tensor(image).to(torch.float32).div_(255)
        pixels = pixels.flip(2) if flipped else pixels
        return ViewItem(functional.normalize(pixels, list(NORMALISE_MEAN), list(NORMALISE_STD)), key[1])


def _resized_boxes(data: VocImages, resizing: Resizing, seed: int, index: int) -> Tensor:
    """Boxes (m, 4) in the image that the same seed resizes."""
    annotation = data.annotations[index]
    width, height, flipped = resizing.draw(seed, annotation.width, annotation.height)
    scale = torch.tensor([width / annotation.width, height / annotation.height]).repeat(2)
    boxes_m4 = annotation.boxes_m4 * scale
    if flipped:
        boxes_m4[:, [0, 2]] = width - boxes_m4[:, [2, 0]]
    return boxes_m4
