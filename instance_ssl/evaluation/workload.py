"""Logs the amount of training that an evaluation has ahead, and its duration once a minute has been measured."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MEASURED_SECONDS = 60.0


class Workload:
    """The trainings of an evaluation, one after another, in steps of about equal duration.

    Args:
        say: logs a line.
        what: names the evaluation in the log.
        trainings: the steps of each, including trainings that turn out to be cached.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        what: str,
        trainings: list[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._what, self._clock = say, what, clock
        self._left = sum(trainings)
        self._began: float | None = None
        self._measured = 0
        self._is_told = False
        number = f"{len(trainings)} trainings" if len(trainings) != 1 else "1 training"
        say(f"{what}: {number}, {self._left:,} steps in all; an estimate of the time follows after a minute")

    @contextmanager
    def training(self, steps: int) -> Iterator[None]:
        """Runs one training; afterwards none of its steps is left, however it ended."""
        left = self._left - steps
        try:
            yield
        finally:
            self._left = left

    def advance(self, steps: int = 1, *, done_before: bool = False) -> None:
        """Counts steps that were trained, or `done_before` in a saved state; the first one starts the clock."""
        self._left -= steps
        if self._is_told or done_before:
            return
        now = self._clock()
        if self._began is None:
            self._began = now
            return
        self._measured += steps
        if (seconds := now - self._began) >= _MEASURED_SECONDS:
            self._is_told = True
            rate = self._measured / seconds
            self._say(f"{self._what}: about {duration(self._left / rate)} left, at {rate:.2g} steps/s")


def duration(seconds: float) -> str:
    """Formats a duration in days, hours, minutes or seconds."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
