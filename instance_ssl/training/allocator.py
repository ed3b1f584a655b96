"""Tells glibc to keep freed memory for the next step of a training, within a bound."""

import ctypes
import os
from collections.abc import Callable, Mapping

# Of malloc.h. glibc accepts no larger M_MMAP_THRESHOLD than 32 MiB on 64-bit machines.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BLOCK = 32 * 2**20
_MOST_KEPT = 256 * 2**20


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Raises glibc's thresholds in this process and in those that it forks; returns whether it did.

    By default glibc maps large tensors each time and returns them when they are freed, so that the kernel clears the
    same pages in every step. Now blocks of up to 32 MiB come from the heap, and up to 256 MiB of free memory at its end
    are kept. Nothing happens under another C library, or where the user has set MALLOC_… or glibc's tunables.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if any(name.startswith("MALLOC_") for name in environment) or "glibc.malloc" in tunables:
        return False
    if (mallopt := _mallopt()) is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT))


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's `mallopt`; None under musl, macOS or Windows."""
    try:
        is_glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError):
        return None
    return ctypes.CDLL(None).mallopt if is_glibc else None
