"""How long a process has waited, not counting the time for which it was stopped."""

import time

# What one reading adds at most: a later one came late because the process was stopped.
_LONGEST_SECONDS = 2.0


class AwakeClock:
    """Seconds for which this process ran, for waits that read it every second or more often.

    Time for which the process was stopped (Ctrl-Z, a freezer, a machine that slept) does not count, as it does for
    `time.monotonic`: what is to happen within a time cannot happen then.
    """

    def __init__(self) -> None:
        self._last, self._seconds = time.monotonic(), 0.0

    def read(self) -> float:
        """Seconds since the clock was made."""
        now = time.monotonic()
        self._seconds += min(now - self._last, _LONGEST_SECONDS)
        self._last = now
        return self._seconds
