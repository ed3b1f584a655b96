"""Batches of views whose content depends on (seed, epoch, image, view) alone: not on ranks, workers or a restart."""

import hashlib
import multiprocessing
import os
import signal
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from instance_ssl.data.augmentations import Transform
from instance_ssl.data.datasets import ImageSource
from instance_ssl.errors import UserError

Batch = tuple[Tensor, Tensor]
Key = tuple[int, int]  # (epoch, image index)


def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """(num_images,) int64: the permutation in which an epoch visits the images, from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    return torch.randperm(num_images, generator=generator)


def sample_seed(seed: int, epoch: int, index: int, view: int) -> int:
    """Seed of one view of one image in one epoch, in [0, 2**63)."""
    return _mix(seed, epoch, index, view)


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


class GlobalBatchSampler(Sampler[list[Key]]):
    """The micro-batches of one rank, as lists of (epoch, index).

    Global batch g of an epoch is epoch_order[g * B : (g + 1) * B], whatever the number of ranks. Seen as an array of
    (accumulation_steps, world_size, micro_batch_size), entry [m, rank] is micro-batch m of a rank. The last images,
    too few for a global batch, are dropped; which ones, changes with the epoch.

    Set `epoch` before each pass, and `start_step` to resume within an epoch: that many global batches are skipped.

    Attributes:
        steps_per_epoch: global batches an epoch.
        accumulation_steps: micro-batches of a rank a global batch.
        num_dropped: images an epoch leaves out.

    Raises:
        ValueError: the global batch is larger than the data set, or no multiple of micro_batch_size * world_size.
    """

    def __init__(
        self, num_images: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int, seed: int
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise ValueError(f"{global_batch_size} images do not divide into {world_size} x {micro_batch_size}")
        if not 0 < global_batch_size <= num_images:
            raise ValueError(f"a global batch of {global_batch_size} from {num_images} images is not possible")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} does not exist")
        self.num_images = num_images
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.start_step = 0
        self._ordered_epoch, self._epoch_order = -1, torch.empty(0, dtype=torch.int64)
        self.steps_per_epoch, self.num_dropped = divmod(num_images, global_batch_size)
        self.accumulation_steps = global_batch_size // (micro_batch_size * world_size)

    def __len__(self) -> int:
        """Micro-batches that an iteration started now would yield."""
        return max(self.steps_per_epoch - self.start_step, 0) * self.accumulation_steps

    def global_batch(self, step: int) -> Tensor:
        """(B,) int64: the images of global batch `step` of this epoch, over all ranks."""
        first = step * self.global_batch_size
        return self._order()[first : first + self.global_batch_size]

    def _order(self) -> Tensor:
        if self._ordered_epoch != self.epoch:
            self._ordered_epoch, self._epoch_order = self.epoch, epoch_order(self.num_images, self.seed, self.epoch)
        return self._epoch_order

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch
        order = self._order()[: self.steps_per_epoch * self.global_batch_size]
        shape = (self.steps_per_epoch * self.accumulation_steps, self.world_size, self.micro_batch_size)
        for micro_batch in order.view(shape)[self.start_step * self.accumulation_steps :, self.rank]:
            yield [(epoch, index) for index in micro_batch.tolist()]


class BatchLoader:
    """An iterable of batches that re-raises a worker's `UserError` as it was, without torch's traceback."""

    def __init__(
        self,
        dataset: ViewDataset,
        batches: Sampler[list[Key]] | Sequence[list[Key]],
        num_workers: int,
        persistent: bool,
    ) -> None:
        self._loader = DataLoader(
            _Batches(dataset),
            sampler=batches,
            batch_size=None,  # the sampler's items are batches already
            collate_fn=_keep,
            num_workers=num_workers,
            # Workers share the list of images only when forked; Python 3.14's default would send each a copy.
            multiprocessing_context="fork" if num_workers > 0 else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_prepare_worker,
            # Without one of its own, each iteration would draw a base seed from the global generator.
            generator=torch.Generator(),
            persistent_workers=persistent and num_workers > 0,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        # Workers are born with SIGTERM blocked in every thread they will ever have; see _prepare_worker.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            batches = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for batch in batches:
            if isinstance(batch, UserError):
                try:
                    raise batch
                finally:
                    # Its traceback holds this frame: the cycle would keep the workers until some later collection.
                    del batch, batches
            yield batch


def view_loader(dataset: ViewDataset, sampler: Sampler[list[Key]], num_workers: int) -> BatchLoader:
    """Batches (views (b, V, 3, S, S) float32, ids (b,) int64) in the sampler's order, in pinned memory beside a GPU.

    Workers, if any, live as long as the loader. `num_workers` 0 loads in this process, with the same result.

    Raises:
        RankError: from the iteration, when an image cannot be decoded.
    """
    return BatchLoader(dataset, sampler, num_workers, persistent=True)


def image_loader(
    source: ImageSource, transform: Transform, batches: Iterable[Sequence[int]], num_workers: int, *, seed: int = 0
) -> Iterable[Batch]:
    """Batches (images (b, 3, S, S) float32, ids (b,) int64) of the given lists of images, in order.

    Args:
        transform: a view, deterministic in most cases.
        batches: image indices of each batch; none is empty.
        seed: of a random view.

    Raises:
        RankError: from the iteration, when an image cannot be decoded.
    """
    keys = [[(0, int(index)) for index in batch] for batch in batches]
    dataset = ViewDataset(source, transform, num_views=1, seed=seed)
    return _FirstViews(BatchLoader(dataset, keys, num_workers, persistent=False))


class PartLoader:
    """One random view of each image of a part of a global batch, part after part; workers live as long as the loader.

    Args:
        transform: the view; an image's own depends on (seed, epoch, image) alone.
        max_batch_size: images that a worker puts together, in shared memory, at a time.
    """

    def __init__(
        self, source: ImageSource, transform: Transform, num_workers: int, *, seed: int, max_batch_size: int
    ) -> None:
        self._max_batch_size = max_batch_size
        self._keys: list[list[Key]] = []  # the loader's sampler, which it reads anew at every pass
        dataset = ViewDataset(source, transform, num_views=1, seed=seed)
        self._loader = _FirstViews(BatchLoader(dataset, self._keys, num_workers, persistent=True))

    def epoch(self, epoch: int, parts: Iterable[Sequence[int]]) -> Iterator[Iterator[Batch]]:
        """The batches (images (b, 3, S, S) float32, ids (b,) int64) of each part in turn; an empty part has none.

        Raises:
            RankError: from the iteration, when an image cannot be decoded.
        """
        size = self._max_batch_size
        pieces = [[part[first : first + size] for first in range(0, len(part), size)] for part in parts]
        self._keys[:] = [[(epoch, index) for index in piece] for part in pieces for piece in part]
        batches = iter(self._loader)
        for part in pieces:
            yield islice(batches, len(part))


class _FirstViews:
    """Drops the view dimension of a loader of one view an image."""

    def __init__(self, loader: BatchLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for views, ids in self._loader:
            yield views[:, 0], ids


class _Batches(Dataset[Batch | UserError]):
    """Whole batches; a `UserError` comes back as a value, for DataLoader adds a traceback to one that is raised."""

    def __init__(self, dataset: ViewDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, keys: list[Key]) -> Batch | UserError:
        try:
            views, ids = zip(*(self._dataset[key] for key in keys), strict=True)
        except UserError as error:
            return error
        return torch.stack(views), torch.tensor(ids, dtype=torch.int64)


def _keep(batch: Any) -> Any:
    return batch


def _prepare_worker(_: int) -> None:
    """Leaves it to the main process to end a worker (DataLoader has limited it to one torch thread already).

    Ctrl-C and a launcher's SIGTERM reach every process of a job at once. A worker that died of one would fail the step
    in flight, and with it the checkpoint that the main process is about to write. So SIGINT is ignored, and SIGTERM is
    obeyed only if it is the main process that sends it, as it does with a worker left over at exit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for a start method that does not inherit the mask
    threading.Thread(target=_await_termination, daemon=True).start()


def _await_termination() -> None:
    parent = multiprocessing.parent_process()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != (parent.pid if parent else 0):
        pass
    os._exit(0)


def _mix(*numbers: int) -> int:
    """63 well-mixed bits, for neighbouring seeds must not give related streams.

    torch's CPU generator uses the lower 32 of them: two of an experiment's views may share a stream, which is harmless,
    as no two views are so paired more often than chance has it.
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
