"""Batches of views, from worker processes that change nothing but the speed."""

import multiprocessing
import os
import signal
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from instance_ssl.data.augmentations import Transform
from instance_ssl.data.folders import escape
from instance_ssl.data.order import Key
from instance_ssl.data.sources import ImageSource
from instance_ssl.data.views import ViewBatch, ViewDataset, ViewItem
from instance_ssl.errors import RankError, UserError

Batch = tuple[Tensor, Tensor]
# What comes of an image that cannot be read: the end, another image of its batch in its place, or a shorter batch.
OnBroken = Literal["error", "substitute", "drop"]


class BatchLoader:
    """An iterable of batches that re-raises a worker's `UserError` as it was, without torch's traceback."""

    def __init__(
        self,
        dataset: ViewDataset,
        batches: Sampler[list[Key]] | Sequence[list[Key]],
        num_workers: int,
        persistent: bool,
        on_broken: OnBroken = "error",
    ) -> None:
        self._loader = DataLoader(
            _Batches(dataset, on_broken),
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

    def __iter__(self) -> Iterator[ViewBatch]:
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


def view_loader(
    dataset: ViewDataset, sampler: Sampler[list[Key]], num_workers: int, *, skip_broken: bool = False
) -> BatchLoader:
    """Batches of views in the sampler's order, in pinned memory beside a GPU.

    Workers, if any, live as long as the loader. `num_workers` 0 loads in this process, with the same result.

    Args:
        skip_broken: in place of an image that cannot be read comes the next of its batch that can, under its own id;
            `ViewBatch.unreadable` tells. So it is with an image that is left out already, of which nothing is told.

    Raises:
        RankError: from the iteration, when an image cannot be decoded (with `skip_broken`: no image of a batch).
    """
    return BatchLoader(
        dataset, sampler, num_workers, persistent=True, on_broken="substitute" if skip_broken else "error"
    )


def image_loader(
    source: ImageSource,
    transform: Transform,
    batches: Iterable[Sequence[int]],
    num_workers: int,
    *,
    on_unreadable: Callable[[dict[int, str]], None] | None = None,
) -> Iterable[Batch]:
    """Batches (images (b, 3, S, S) float32, ids (b,) int64) of the given lists of images, in order.

    Args:
        transform: the deterministic view.
        batches: image indices of each batch; none is empty.
        on_unreadable: told id → why of a batch's images that cannot be read, before the batch comes without them
            (with images (0, 3, 0, 0), where none is left); None: the first of them is an error.

    Raises:
        RankError: from the iteration, when an image cannot be decoded.
    """
    keys = [[(0, int(index)) for index in batch] for batch in batches]
    dataset = ViewDataset(source, transform, num_views=1, seed=0)
    on_broken: OnBroken = "error" if on_unreadable is None else "drop"
    return _FirstViews(BatchLoader(dataset, keys, num_workers, persistent=False, on_broken=on_broken), on_unreadable)


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
    """Drops the view dimension of a loader of one view an image, and passes on what cannot be read."""

    def __init__(self, loader: BatchLoader, on_unreadable: Callable[[dict[int, str]], None] | None = None) -> None:
        self._loader = loader
        self._on_unreadable = on_unreadable

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if self._on_unreadable is not None and batch.unreadable is not None:
                self._on_unreadable(batch.unreadable)
            yield batch.views[:, 0], batch.ids


class _Batches(Dataset[ViewBatch | UserError]):
    """Whole batches; a `UserError` comes back as a value, for DataLoader adds a traceback to one that is raised."""

    def __init__(self, dataset: ViewDataset, on_broken: OnBroken) -> None:
        self._dataset = dataset
        self._on_broken = on_broken

    def __getitem__(self, keys: list[Key]) -> ViewBatch | UserError:
        places: list[ViewItem | None] = []
        unreadable: dict[int, str] = {}
        for epoch, index in keys:
            try:
                places.append(self._dataset[epoch, index] if index >= 0 else None)
            except UserError as error:
                if self._on_broken == "error":
                    return error
                unreadable[index] = str(error)
                places.append(None)
        items = [item for item in places if item is not None]
        if self._on_broken == "drop" and not items:
            nothing = torch.empty(0, self._dataset.num_views, 3, 0, 0)
            return ViewBatch(nothing, torch.empty(0, dtype=torch.int64), None, unreadable)
        if not items:
            return RankError(self._nothing_to_read(keys, unreadable))
        if self._on_broken != "drop":
            items = with_substitutes(places)
        return self._dataset.collate(items)._replace(unreadable=unreadable or None)

    def _nothing_to_read(self, keys: list[Key], unreadable: dict[int, str]) -> str:
        """What to say of a batch of which nothing can be read."""
        index = keys[0][1]
        first = unreadable.get(index, f"{escape(self._dataset.source.names[max(index, ~index)])} is left out already")
        return f"of {len(keys)} images of a micro-batch none can be read: {first}; repair it, or take larger ones"


def with_substitutes(places: Sequence[ViewItem | None]) -> list[ViewItem]:
    """In each empty place the next item there is, counted round; one at least is there."""
    there = [place for place, item in enumerate(places) if item is not None]
    filled = []
    for place in range(len(places)):
        item = places[there[bisect_left(there, place) % len(there)]]
        assert item is not None
        filled.append(item)
    return filled


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
