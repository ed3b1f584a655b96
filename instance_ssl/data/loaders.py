"""Batches of views, loaded by worker processes that change nothing but the speed."""

import errno
import multiprocessing
import os
import signal
import threading
import traceback
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from instance_ssl.data.augmentations import Transform
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.data.sampler import BatchKeys, Key
from instance_ssl.data.views import ViewBatch, ViewDataset, ViewItem
from instance_ssl.errors import LoaderFault, RankError, UserError, escape

Batch = tuple[Tensor, Tensor]
_PREFETCHED_BATCHES = 2  # per worker, ready or in the making
# Of an image that cannot be read: the loader raises, another image of its batch replaces it, or the batch is shorter.
OnBroken = Literal["error", "substitute", "drop"]


class BatchLoader:
    """An iterable of batches that re-raises a worker's error unchanged, without torch's traceback.

    A worker is a fork of this process and keeps the memory that is freed or overwritten here later. Persistent workers
    therefore start at once: make the loader before anything that grows with the number of images.

    Raises:
        RankError: /dev/shm is full; raised by the iteration unless `persistent`.
    """

    def __init__(
        self,
        dataset: ViewDataset,
        batches: Sampler[list[Key]] | Sequence[list[Key]],
        num_workers: int,
        persistent: bool,
        on_broken: OnBroken = "error",
    ) -> None:
        self._batches = _Gate(batches)
        self._loader = DataLoader(
            _Batches(dataset, on_broken),
            sampler=self._batches,
            batch_size=None,  # the sampler's items are batches already
            collate_fn=lambda batch: batch,
            num_workers=num_workers,
            # Only forked workers share what this process holds; Python 3.14's default would send each a copy.
            multiprocessing_context="fork" if num_workers > 0 else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_prepare_worker,
            # Without its own generator, each iteration would draw a base seed from the global one.
            generator=torch.Generator(),
            persistent_workers=persistent and num_workers > 0,
            prefetch_factor=_PREFETCHED_BATCHES if num_workers > 0 else None,
        )
        if persistent:
            list(self._begin())
        self._batches.is_open = True

    def __len__(self) -> int:
        return len(self._loader)

    def _begin(self) -> Iterator[Any]:
        # Workers start with SIGTERM blocked in every thread they will ever have; see _prepare_worker.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return iter(self._loader)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise RankError(
                f"/dev/shm has no room for the locks of {self._loader.num_workers} loader processes, a few pages each: "
                "make room in it (docker run --shm-size=64m), or lower data.num_workers"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __iter__(self) -> Iterator[ViewBatch]:
        batches = self._begin()
        for batch in batches:
            if isinstance(batch, UserError | LoaderFault):
                try:
                    raise batch
                finally:
                    # Its traceback holds this frame: the cycle would keep the workers alive until collected.
                    del batch, batches
            yield batch


def view_loader(
    dataset: ViewDataset, sampler: Sampler[list[Key]], num_workers: int, *, skip_broken: bool = False
) -> BatchLoader:
    """Batches of views in the sampler's order, in pinned memory beside a GPU.

    Workers, if any, live as long as the loader, from now on (see `BatchLoader`). `num_workers` 0 loads in this process,
    with the same result.

    Args:
        skip_broken: replaces an image that cannot be read by the next readable one of its batch, under that one's id,
            and reports it in `ViewBatch.unreadable`.

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
    seed: int = 0,
    on_unreadable: Callable[[dict[int, str]], None] | None = None,
) -> Iterable[Batch]:
    """Loads batches (images (b, 3, S, S) float32, ids (b,) int64) of the given lists of images, in order.

    Args:
        transform: a view, usually deterministic.
        batches: image indices of each batch, read again at every pass; empty batches are skipped.
        seed: of a random view.
        on_unreadable: receives id → why of a batch's unreadable images before the batch is yielded without them
            (with images (0, 3, 0, 0), where none is left); None: the first of them is an error.

    Raises:
        RankError: from the iteration, when an image cannot be decoded.
    """
    dataset = ViewDataset(source, transform, num_views=1, seed=seed)
    on_broken: OnBroken = "error" if on_unreadable is None else "drop"
    loader = BatchLoader(dataset, BatchKeys(batches), num_workers, persistent=False, on_broken=on_broken)
    return _FirstViews(loader, on_unreadable)


class PartLoader:
    """Loads one random view of each image of a rank's part of a global batch. Workers live as long as the loader.

    Args:
        transform: the view; it depends on (seed, epoch, image) alone.
        max_batch_size: images that a worker joins, in shared memory, at a time.
    """

    def __init__(
        self, source: ImageSource, transform: Transform, num_workers: int, *, seed: int, max_batch_size: int
    ) -> None:
        self._max_batch_size = max_batch_size
        self._keys = BatchKeys(())
        dataset = ViewDataset(source, transform, num_views=1, seed=seed)
        self._loader = _FirstViews(BatchLoader(dataset, self._keys, num_workers, persistent=True))

    def epoch(self, epoch: int, parts: Sequence[Sequence[int]]) -> Iterator[Iterator[Batch]]:
        """The batches (images (b, 3, S, S) float32, ids (b,) int64) of each part in turn; an empty part has none.

        Raises:
            RankError: from the iteration, when an image cannot be decoded.
        """
        size = self._max_batch_size
        pieces = (part[first : first + size] for part in parts for first in range(0, len(part), size))
        self._keys.epoch, self._keys.batches = epoch, pieces
        batches = iter(self._loader)
        for part in parts:
            yield islice(batches, -(-len(part) // size))


class _Gate(Sampler[list[Key]]):
    """Yields nothing until opened, so that workers start before there is anything to load."""

    def __init__(self, batches: Sampler[list[Key]] | Sequence[list[Key]]) -> None:
        self._batches, self.is_open = batches, False

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self._batches if self.is_open else ())


class _FirstViews:
    """Drops the view dimension of a loader of one view per image, and reports unreadable images."""

    def __init__(self, loader: BatchLoader, on_unreadable: Callable[[dict[int, str]], None] | None = None) -> None:
        self._loader, self._on_unreadable = loader, on_unreadable

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if self._on_unreadable is not None and batch.unreadable is not None:
                self._on_unreadable(batch.unreadable)
            yield batch.views[:, 0], batch.ids


class _Batches(Dataset[ViewBatch | UserError | LoaderFault]):
    """Whole batches; an error comes back as a value, for DataLoader adds a traceback to one that is raised."""

    def __init__(self, dataset: ViewDataset, on_broken: OnBroken) -> None:
        self._dataset, self._on_broken = dataset, on_broken

    def __getitem__(self, keys: list[Key]) -> ViewBatch | UserError | LoaderFault:
        places: list[ViewItem | None] = []
        unreadable: dict[int, str] = {}
        for epoch, index in keys:
            try:
                places.append(self._dataset[epoch, index])
            except UserError as error:
                if self._on_broken == "error":
                    return error
                unreadable[index] = str(error)
                places.append(None)
            except Exception as error:
                return self._fault((epoch, index), error)
        items = [item for item in places if item is not None]
        if self._on_broken == "drop" and not items:
            nothing = torch.empty(0, self._dataset.num_views, 3, 0, 0)
            return ViewBatch(nothing, torch.empty(0, dtype=torch.int64), None, unreadable)
        if not items:
            return RankError(
                f"none of the {len(keys)} images of a micro-batch can be read: {next(iter(unreadable.values()))}; "
                "repair it, or raise train_micro_batch_size_per_gpu"
            )
        if self._on_broken != "drop":
            items = _with_substitutes(places)
        return self._dataset.collate(items)._replace(unreadable=unreadable or None)

    def _fault(self, key: Key, error: Exception) -> LoaderFault:
        """An error that no image's own contents explain: which image it was, and the traceback as a note."""
        worker = get_worker_info()
        who = "the loader" if worker is None else f"loader process {worker.id}"
        name = escape(self._dataset.source.names[key[1]])
        fault = LoaderFault(f"{who} failed at {name} (image {key[1]}, epoch {key[0]}): {type(error).__name__}: {error}")
        fault.add_note(traceback.format_exc())
        return fault


def _with_substitutes(places: Sequence[ViewItem | None]) -> list[ViewItem]:
    """Fills each empty place with the next item after it, or the first item after the last."""
    found = [(place, item) for place, item in enumerate(places) if item is not None]
    return [found[bisect_left(found, place, key=itemgetter(0)) % len(found)][1] for place in range(len(places))]


def _prepare_worker(_: int) -> None:
    """Makes a worker ignore signals except those of the main process (DataLoader has limited it to one torch thread).

    Ctrl-C and a launcher's SIGTERM reach every process of a job at once. If a worker died of one, the step in flight
    would fail, and with it the checkpoint that the main process is about to write. So a worker ignores SIGINT and obeys
    SIGTERM only from the main process, which sends it to workers left over at exit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for a start method that does not inherit the mask
    threading.Thread(target=_await_termination, daemon=True).start()


def _await_termination() -> None:
    parent = multiprocessing.parent_process()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != (parent.pid if parent else 0):
        pass
    os._exit(0)
