"""Messages about a global batch that cannot be divided over ranks and micro-batches, with what can."""

from pathlib import Path


def no_share(global_batch_size: int, world_size: int) -> str:
    """Describes a batch that cannot be divided over the ranks, with the numbers of ranks that can share it."""
    fitting = [
        str(ranks) for ranks in range(1, min(global_batch_size, 2 * world_size) + 1) if global_batch_size % ranks == 0
    ]
    return (
        f"optimization.global_batch_size {global_batch_size} cannot be divided over {world_size} ranks: start "
        f"{' or '.join(fitting)}"
    )


def indivisible(global_batch_size: int, micro_batch_size: int, world_size: int, path: Path) -> str:
    """Describes a batch that does not divide, with two fixes: a smaller micro-batch, or the nearest batch that does."""
    at_once = micro_batch_size * world_size
    batch = max(world_size, global_batch_size - global_batch_size % world_size)
    smaller = max(d for d in range(1, micro_batch_size + 1) if batch // world_size % d == 0)
    kept = "keep it with" if batch == global_batch_size else f"--set optimization.global_batch_size={batch} and"
    return (
        f"optimization.global_batch_size {global_batch_size} is not a multiple of train_micro_batch_size_per_gpu "
        f"{micro_batch_size} x {world_size} ranks ({path}): {kept} {micro_batch_advice(smaller, path)}; or set "
        f"optimization.global_batch_size to a multiple, if there are enough images: the nearest is "
        f"{max(1, round(global_batch_size / at_once)) * at_once}"
    )


def micro_batch_advice(micro_batch_size: int, path: Path) -> str:
    """Describes how to change the micro-batch, for which there is no flag."""
    return f'"train_micro_batch_size_per_gpu": {micro_batch_size} in a copy of {path}, given as --deepspeed_config'
