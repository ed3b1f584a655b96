"""Logs a run: console lines of rank 0, metrics.jsonl, TensorBoard and a progress bar."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from instance_ssl.files.atomic import write_lines
from instance_ssl.files.structured import read_json_lines
from instance_ssl.run.console import heard_or_not, one_line

_SECONDS_BETWEEN_LINES = 10.0


class RunLog:
    """Logs console lines, and metrics once there is a directory for them, on rank 0; other ranks stay silent.

    Lines go through tqdm, so that they never break into a progress bar. Metrics that cannot be written (on a full
    disk, say) are dropped with one warning: they never end a run.

    Args:
        is_main: whether this is rank 0.
        on_progress: called on every rank whenever its work advances.
    """

    def __init__(self, *, is_main: bool, on_progress: Callable[[], None] = lambda: None) -> None:
        self.is_main = is_main
        self.on_progress = on_progress
        self._directory: Path | None = None
        self._resumed_at: int | None = None
        self._scalars: _ScalarFile | None = None
        self._complained = False

    def say(self, line: str) -> None:
        """Logs one line on standard output."""
        if self.is_main:
            with heard_or_not(sys.stdout):
                tqdm.write(one_line(line, sys.stdout.encoding), file=sys.stdout)

    @contextmanager
    def metrics_in(self, directory: Path) -> Iterator[None]:
        """Sends metrics to `directory`/metrics.jsonl and `directory`/tensorboard inside the block."""
        self._directory = directory if self.is_main else None
        try:
            yield
        finally:
            if self._scalars is not None:
                self._unless_broken(self._scalars.records.close)
            self._directory = self._resumed_at = self._scalars = None

    def forget_after(self, step: int) -> None:
        """Drops the metrics of later steps, which a resumed run repeats."""
        if self._directory is None:
            return
        self._resumed_at, path = step, self._directory / "metrics.jsonl"
        if path.exists():
            self._unless_broken(lambda: self._cut_metrics(path, step))

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """Appends the values other than None to metrics.jsonl and TensorBoard."""
        if self._directory is not None:
            known = {name: value for name, value in values.items() if value is not None}
            self._unless_broken(lambda: self._write(step, known))

    def progress(self, label: str, total: int, unit: str, initial: int = 0) -> "Progress":
        """Shows progress on rank 0: a bar on a terminal, a plain line every 10 s elsewhere."""
        return Progress(self, label, total, unit, initial)

    def _write(self, step: int, known: dict[str, float]) -> None:
        assert self._directory is not None
        with (self._directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **known}) + "\n")
        if self._scalars is None:
            self._scalars = _ScalarFile(self._directory / "tensorboard", self._resumed_at)
        self._scalars.write(step, known)

    def _cut_metrics(self, path: Path, step: int) -> None:
        lines, num_broken = read_json_lines(path)
        sound = [line for line in lines if type(line.get("step")) is int]
        num_broken += len(lines) - len(sound)
        write_lines((json.dumps(line) for line in sound if line["step"] <= step), path)
        if num_broken:
            self.say(f"warning: {path}: {num_broken} broken lines dropped")

    def _unless_broken(self, write: Callable[[], object]) -> None:
        try:
            write()
        except (OSError, RuntimeError, ValueError) as error:
            if not self._complained:
                self.say(f"warning: metrics are not written ({error}); the run continues without them")
            self._complained = True


class _ScalarFile:
    """Writes TensorBoard's file of scalars, in the caller's thread.

    torch's `SummaryWriter` writes in a thread of its own, where a full disk is a traceback that nobody catches.

    Args:
        resumed_at: TensorBoard ignores later steps of earlier files; None for a new run.
    """

    def __init__(self, directory: Path, resumed_at: int | None) -> None:
        # Slow to import, and needed by rank 0 alone.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._event = Event
        self.records = RecordWriter((directory / name).open("wb"))
        self._append(file_version="brain.Event:2")
        if resumed_at is not None:
            self._append(step=resumed_at + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one step's values, by tag."""
        self._append(step=step, summary={"value": [{"tag": tag, "simple_value": values[tag]} for tag in values]})

    def _append(self, **fields: Any) -> None:
        self.records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self.records.flush()


class Progress:
    """Shows progress, rate and time left on rank 0."""

    def __init__(self, log: RunLog, label: str, total: int, unit: str, initial: int) -> None:
        self._log, self._label, self._total, self._unit = log, label, total, unit
        self._done, self._initial, self._note = initial, initial, ""
        self._started = self._last_line = time.perf_counter()
        on_terminal = log.is_main and sys.stderr.isatty()
        shown = one_line(label, sys.stderr.encoding)
        self._bar = tqdm(desc=shown, total=total, unit=unit, initial=initial, disable=not on_terminal, leave=False)
        self._lines = log.is_main and not on_terminal

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Adds `count` finished units; `note` is shown beside the rate."""
        self._log.on_progress()
        self._done, self._note = self._done + count, note
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.perf_counter()
        if self._lines and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._log.say(self._line())

    def set(self, done: int, total: int) -> None:
        """Sets progress to `done` of `total`, for work whose size is known only once it has begun."""
        self._total = self._bar.total = total
        self.advance(done - self._done)

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self._done - self._initial) / max(1e-9, time.perf_counter() - self._started)

    def _line(self) -> str:
        rate = self.rate
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        parts = [f"{self._label}: {self._done}/{self._total} {self._unit}", f"{rate:.1f} {self._unit}/s"]
        return ", ".join(filter(None, [*parts, f"{left:.0f} s left", self._note]))
