"""The order in which an epoch visits the images, from (seed, epoch) alone, whatever the number of ranks."""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.utils.data import Sampler

Key = tuple[int, int]  # (epoch, image index)


class Shards(NamedTuple):
    """Data sets with many images to a file, which are best read file by file.

    Attributes:
        starts: (S,) int64, strictly ascending from 0: the first image of each shard.
        buffer: how many consecutive images are shuffled among one another, at least 1.
    """

    starts: Tensor
    buffer: int


def epoch_order(num_images: int, seed: int, epoch: int, shards: Shards | None = None) -> Tensor:
    """(num_images,) int64: the permutation in which an epoch visits the images, from (seed, epoch) alone.

    Without shards, all permutations are equally likely. With shards, the epoch orders the shards at random, and then
    shuffles every `buffer` consecutive images among one another. So a buffer's images lie in at most
    buffer / (shard size) + 2 shards, and an image moves by less than `buffer` places.
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    if shards is None:
        return torch.randperm(num_images, generator=generator)
    order = _shard_after_shard(num_images, shards.starts, generator)
    for window in order.split(shards.buffer):
        window.copy_(window[torch.randperm(len(window), generator=generator)])
    return order


def _shard_after_shard(num_images: int, starts_S: Tensor, generator: torch.Generator) -> Tensor:
    shuffled = torch.randperm(len(starts_S), generator=generator)
    sizes_S = torch.diff(starts_S, append=torch.tensor([num_images]))[shuffled]
    moved_S = starts_S[shuffled] - (sizes_S.cumsum(0) - sizes_S)  # from its place in the order to its id
    return torch.arange(num_images) + moved_S.repeat_interleave(sizes_S)


class GlobalBatchSampler(Sampler[list[Key]]):
    """The micro-batches of one rank, as lists of (epoch, index).

    Global batch g of an epoch is epoch_order[g * B : (g + 1) * B], whatever the number of ranks. Seen as an array of
    (accumulation_steps, world_size, micro_batch_size), entry [m, rank] is micro-batch m of a rank. The last images,
    too few for a global batch, are dropped, a different set each epoch.

    Set `epoch` before each pass, and `start_step` to resume within an epoch: that many global batches are skipped.

    Attributes:
        steps_per_epoch: global batches an epoch.
        accumulation_steps: micro-batches of a rank a global batch.
        num_dropped: images dropped in an epoch.

    Raises:
        ValueError: the global batch is larger than the data set, or is not a multiple of micro_batch_size * world_size.
    """

    def __init__(
        self,
        num_images: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        shards: Shards | None = None,
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise ValueError(f"{global_batch_size} images do not divide into {world_size} x {micro_batch_size}")
        if not 0 < global_batch_size <= num_images:
            raise ValueError(f"a global batch of {global_batch_size} from {num_images} images is not possible")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} does not exist")
        self.num_images, self.global_batch_size, self.micro_batch_size = num_images, global_batch_size, micro_batch_size
        self.rank, self.world_size, self.seed, self.shards = rank, world_size, seed, shards
        self.epoch = self.start_step = 0
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
            self._epoch_order = epoch_order(self.num_images, self.seed, self.epoch, self.shards)
            self._ordered_epoch = self.epoch
        return self._epoch_order

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self._order()
        size, stride = self.micro_batch_size, self.micro_batch_size * self.world_size
        first = self.start_step * self.global_batch_size + self.rank * size
        # One at a time: to iterate over a tensor makes all its parts at once, and an epoch may have a million.
        for start in range(first, self.steps_per_epoch * self.global_batch_size, stride):
            yield [(epoch, index) for index in order[start : start + size].tolist()]


class LazyBatches(Sequence[Sequence[int]]):
    """Batches made on demand, as are slices of them: millions of images are never Python objects at once.

    Args:
        count: number of batches.
        make: number of a batch -> its images.
    """

    def __init__(self, count: int, make: Callable[[int], Sequence[int]]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Sequence[int]: ...
    @overload
    def __getitem__(self, place: slice) -> "LazyBatches": ...
    def __getitem__(self, place: int | slice) -> "Sequence[int] | LazyBatches":
        if isinstance(place, int):
            return self._make(range(self._count)[place])
        numbers = range(self._count)[place]
        return LazyBatches(len(numbers), lambda number: self._make(numbers[number]))


def consecutive_batches(start: int, stop: int, size: int) -> LazyBatches:
    """The images from `start` to before `stop`, `size` at a time; the last batch may be short."""
    return LazyBatches(
        -(-max(stop - start, 0) // size),
        lambda number: range(start + number * size, min(start + (number + 1) * size, stop)),
    )


class BatchKeys(Sampler[list[Key]]):
    """The keys of given batches in one epoch, made on demand; empty batches are skipped.

    Attributes:
        batches, epoch: may be set between two passes.
    """

    def __init__(self, batches: Iterable[Sequence[int]], epoch: int = 0) -> None:
        self.batches, self.epoch = batches, epoch

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch
        for batch in self.batches:
            if len(batch):
                yield [(epoch, int(index)) for index in batch]


def mixed_seed(*numbers: int) -> int:
    """63 well-mixed bits, so that neighbouring seeds do not give related streams.

    torch's CPU generator uses the lower 32 bits. Two views of an experiment may therefore share a stream, which is
    harmless, as it pairs views no more often than chance.
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
