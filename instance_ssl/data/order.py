"""In which order an epoch visits the images: from (seed, epoch) alone, whatever the number of ranks."""

import hashlib
import struct
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

Key = tuple[int, int]  # (epoch, image index)


def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """(num_images,) int64: the permutation in which an epoch visits the images, from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    return torch.randperm(num_images, generator=generator)


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


def mixed_seed(*numbers: int) -> int:
    """63 well-mixed bits, for neighbouring seeds must not give related streams.

    torch's CPU generator uses the lower 32 of them: two of an experiment's views may share a stream, which is harmless,
    as no two views are so paired more often than chance has it.
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
