"""What a run writes as it goes: console (rank 0), metrics.jsonl, TensorBoard, and a progress bar."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class RunLog:
    """Console lines of rank 0, and the run directory's metrics once there is one. Other ranks stay silent.

    Lines go through tqdm, so that they never break into a progress bar.
    """

    def __init__(self, *, is_main: bool) -> None:
        self.is_main = is_main
        self._metrics_path: Path | None = None
        self._writer: Any = None

    def say(self, line: str) -> None:
        """One line on standard output."""
        if self.is_main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    @contextmanager
    def metrics_in(self, directory: Path) -> Iterator[None]:
        """Metrics go to `directory`/metrics.jsonl and `directory`/tensorboard while this lasts."""
        if not self.is_main:
            yield
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self._metrics_path = directory / "metrics.jsonl"
        self._writer = SummaryWriter(str(directory / "tensorboard"))
        try:
            yield
        finally:
            self._writer.close()
            self._metrics_path = self._writer = None

    def metrics(self, step: int, values: dict[str, float | None]) -> None:
        """Appends the values that are there to metrics.jsonl and TensorBoard."""
        if self._metrics_path is None:
            return
        known = {name: value for name, value in values.items() if value is not None}
        with self._metrics_path.open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **known}) + "\n")
        for name, value in known.items():
            self._writer.add_scalar(name, value, step)

    def progress(self, label: str, total: int, unit: str, initial: int = 0) -> "Progress":
        """A bar on a terminal, a plain line now and then elsewhere; nothing on ranks other than 0."""
        return Progress(self, label, total, unit, initial)


class Progress:
    """Progress with rate and time left, on rank 0."""

    def __init__(self, log: RunLog, label: str, total: int, unit: str, initial: int) -> None:
        self._log, self._label, self._total, self._unit = log, label, total, unit
        self._done, self._initial, self._note = initial, initial, ""
        self._started = self._last_line = time.perf_counter()
        on_terminal = log.is_main and sys.stderr.isatty()
        self._bar = tqdm(desc=label, total=total, unit=unit, initial=initial, disable=not on_terminal, leave=False)
        self._lines = log.is_main and not on_terminal

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Adds `count` done units; `note` stands beside the rate."""
        self._done += count
        self._note = note
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.perf_counter()
        if self._lines and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._log.say(self._line())

    def set(self, done: int, total: int) -> None:
        """Moves to `done` of `total`, for work whose size is only known once it has begun."""
        self._total = self._bar.total = total
        self.advance(done - self._done)

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self._done - self._initial) / max(1e-9, time.perf_counter() - self._started)

    def _line(self) -> str:
        rate = self.rate
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        parts = [f"{self._label}: {self._done}/{self._total} {self._unit}", f"{rate:.1f} {self._unit}/s"]
        return ", ".join([*parts, f"{left:.0f} s left", *([self._note] if self._note else [])])
