"""Batches of views, from worker processes that change nothing but the speed."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from instance_ssl.data.augmentations import Transform
from instance_ssl.data.order import Key
from instance_ssl.data.sources import ImageSource
from instance_ssl.data.views import ViewDataset
from instance_ssl.errors import UserError

Batch = tuple[Tensor, Tensor]


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
