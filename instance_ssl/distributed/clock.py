"""A clock that does not count the time for which the process was stopped."""

import time

# The most that one reading adds: a longer gap means that the process was stopped.
_LONGEST_SECONDS = 2.0


class AwakeClock:
    """Measures the seconds for which this process ran. Read it every second or more often.

    Unlike `time.monotonic`, it does not count time for which the process was stopped (Ctrl-Z, a freezer, a sleeping
    machine), when nothing that is waited for can happen.
    """

    def __init__(self) -> None:
        self._last, self._seconds = time.monotonic(), 0.0

    def read(self) -> float:
        """Returns the seconds since the clock was created."""
        now = time.monotonic()
        self._seconds += min(now - self._last, _LONGEST_SECONDS)
        self._last = now
        return self._seconds
