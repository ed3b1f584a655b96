"""What a piece of code really allocates on the CPU, from the profiler's record of every allocation and release."""

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def measure_allocations(work: Callable[[], object]) -> tuple[int, int]:
    """(peak, kept) bytes of torch's CPU allocator above those before `work`; what it returns counts as kept."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak, live


def live_bytes() -> int:
    """Bytes of all tensors that Python knows, each storage once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
