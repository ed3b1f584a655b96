"""Measures time and memory of steps so that a noisy machine disturbs all variants alike."""

import csv
import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from instance_ssl.distributed.comm import Group

_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of the repeats, in their own unit."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Timing":
        """Computes the quartiles of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Timing(median, low, high)


def time_interleaved(steps: Mapping[str, Callable[[], object]], repeats: int, group: Group) -> dict[str, list[float]]:
    """Times one of each step in turn, `repeats` times, so that all meet the same disturbances; milliseconds.

    All ranks start a step together; its time is that of the slowest rank.
    """
    results: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(_WARM_UP_STEPS + repeats):
        for name, step in steps.items():
            group.barrier()
            started = time.perf_counter()
            step()
            if group.device.type == "cuda":
                torch.cuda.synchronize(group.device)
            elapsed = torch.tensor([time.perf_counter() - started], device=group.device)
            milliseconds = group.all_reduce_max_(elapsed).item() * 1e3
            if turn >= _WARM_UP_STEPS:
                results[name].append(milliseconds)
    return results


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Peak memory of `work` in bytes, beyond what was held before: allocated on the GPU, or resident in RAM.

    In RAM it is the kernel's count (Linux), library workspaces included, after free memory has been returned to it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident_bytes("VmRSS")
    work()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def describe_machine(group: Group) -> str:
    """Describes hardware and versions in one line."""
    if group.device.type == "cuda":
        device = f"{group.size} x {torch.cuda.get_device_name(group.device)}"
    else:
        device = f"{group.size} ranks x {torch.get_num_threads()} threads, {_processor()}"
    return f"{device}; torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a CSV with a header; the columns are all keys in the order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats rows as text in columns; floats have four significant digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_format(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)] + [[_format(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
