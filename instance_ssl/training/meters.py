"""Means of training metrics between two log lines, memory in use, and when to warn."""

import math
import resource
import sys
import time
from collections.abc import Sequence

import torch

from instance_ssl.training.step import StepReport


class TrainingMeter:
    """Means over the steps since the last reading, each of `images_per_step` images (not views)."""

    def __init__(self, images_per_step: int) -> None:
        self._images_per_step = images_per_step
        self._reports: list[StepReport] = []
        self._started = time.perf_counter()

    def add(self, report: StepReport) -> None:
        """Counts one step."""
        self._reports.append(report)

    def read(self, device: torch.device) -> dict[str, float | None]:
        """Returns the metrics by TensorBoard tag, None where nothing was measured, and resets."""
        reports, seconds = self._reports, time.perf_counter() - self._started
        self._reports, self._started = [], time.perf_counter()
        waited = sum(report.data_wait_seconds for report in reports)
        return {
            "train/loss": _mean([report.loss for report in reports]),
            "train/log_z": _mean([report.log_z for report in reports]),
            "train/positive_cosine": _mean([report.positive_cosine for report in reports]),
            "train/instance_accuracy": _mean([report.instance_accuracy for report in reports]),
            "train/learning_rate": reports[-1].learning_rate if reports else None,
            "train/zero_features": float(sum(report.num_zero_features for report in reports)),
            "train/skipped_steps": float(sum(not report.applied for report in reports)),
            "speed/images_per_second": len(reports) * self._images_per_step / seconds,
            "speed/data_wait_share": waited / seconds,
            "speed/own_seconds": _mean([report.own_seconds for report in reports]),
            "memory/peak_gib": peak_memory_gib(device),
        }


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory allocated on the GPU so far, or the process's peak resident size on the CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class InputWatch:
    """Rate-limits the input-bound warning, with exponential back-off; ignores the first interval: loaders start."""

    _SHARE = 0.1

    def __init__(self) -> None:
        self._intervals, self._pause, self._silent_until = 0, 20, 2

    def should_warn(self, share: float) -> bool:
        """Whether to warn now, given the share of an interval's time that the slowest rank waited."""
        self._intervals += 1
        if share <= self._SHARE or self._intervals < self._silent_until:
            return False
        self._silent_until, self._pause = self._intervals + self._pause, 2 * self._pause
        return True


class LossLevel:
    """Keeps a running mean of the loss and finds spikes, once the mean is of enough steps.

    Args:
        spike_nats: a loss that far above the mean is a spike; None finds none.
        level: the mean so far, of a resumed run.
    """

    _WEIGHT, _ENOUGH = 0.05, 10

    def __init__(self, spike_nats: float | None, level: float | None) -> None:
        self.level = level
        self._spike_nats = spike_nats
        self._count = 0 if level is None else self._ENOUGH

    def add(self, loss: float) -> bool:
        """Adds a finite loss to the mean and returns whether it is a spike."""
        before = loss if self.level is None else self.level
        self._count += 1
        self.level = before + max(self._WEIGHT, 1 / self._count) * (loss - before)
        return self._spike_nats is not None and self._count > self._ENOUGH and loss > before + self._spike_nats


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the finite values."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None
