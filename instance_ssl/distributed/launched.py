"""What the launcher told this process about its place among the ranks; readable before torch is imported."""

import os


def rank() -> int:
    """Returns this process's rank in the world; 0 when it runs bare."""
    return int(os.environ.get("RANK") or 0)


def world_size() -> int:
    """Returns the number of ranks; 1 when this process runs bare."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_rank() -> int:
    """Returns this process's place among the ranks of its machine, which is its GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def local_size() -> int:
    """Returns the number of ranks on this machine, which deepspeed and torchrun set; 1 where it is unset."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
