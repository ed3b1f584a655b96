"""What a piece of code really allocates on the CPU, from the profiler's record of every allocation and release."""

from collections.abc import Callable

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
