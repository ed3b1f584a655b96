"""How long this rank's own work takes, between the collectives in which it waits for others."""

import time

import torch


class Stopwatch:
    """Adds up stretches of work; on a GPU by events in its stream, so that the host need not wait."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._began = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Begins a stretch."""
        if self._on_cuda:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            self._events.append(pair)
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Ends it."""
        self._seconds += time.perf_counter() - self._began
        if self._on_cuda:
            self._events[-1][1].record()

    def seconds(self) -> float:
        """Of all stretches, the longer of host and GPU; call it once the GPU has reached the end of the last."""
        on_gpu = sum(start.elapsed_time(stop) for start, stop in self._events) / 1e3
        return max(self._seconds, on_gpu)
