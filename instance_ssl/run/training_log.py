"""Logs the metrics of a training; warns of slow ranks, of waiting for images and of zero embeddings."""

import os
import socket
import statistics

from instance_ssl.data.image_sources import FileImages
from instance_ssl.run.stage import Stage
from instance_ssl.training.meters import InputWatch, TrainingMeter
from instance_ssl.training.step import StepReport

# A rank is a straggler when its own work takes so many times the median's, and so many seconds a step more.
_STRAGGLER_RATIO, _STRAGGLER_SECONDS = 1.5, 0.01


class TrainingLog:
    """Collects the reports of a training's steps. Every rank calls the same methods in the same order."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        images_per_step = stage.config.optimization.global_batch_size
        self._interval, self._epoch = TrainingMeter(images_per_step), TrainingMeter(images_per_step)
        self._input = InputWatch()
        self._noted: dict[str, float] = {}

    def add(self, report: StepReport) -> None:
        """Counts one step."""
        self._interval.add(report)
        self._epoch.add(report)

    def note(self, name: str, value: float) -> None:
        """Adds a value to the next metrics, by TensorBoard tag."""
        self._noted[name] = value

    def write(self, step: int) -> None:
        """Logs the metrics since the last call, with what was noted. Collective."""
        metrics = self._interval.read(self._stage.world.device) | self._noted
        self._noted = {}
        own, waited = metrics["speed/own_seconds"] or 0.0, metrics["speed/data_wait_share"] or 0.0
        by_rank = self._stage.world.all_gather_objects((own, waited, socket.gethostname()))
        metrics["speed/data_wait_share"] = self._check_waiting([(waited, host) for _, waited, host in by_rank])
        metrics |= self._check_stragglers([(own, host) for own, _, host in by_rank])
        self._stage.log.metrics(step, metrics)

    def epoch_means(self) -> dict[str, float | None]:
        """The epoch's means by plain name, and a new start; warns of embeddings that were 0."""
        metrics = self._epoch.read(self._stage.world.device)
        if metrics["train/zero_features"]:
            self._stage.log.say(
                f"warning: {metrics['train/zero_features']:.0f} embeddings of this epoch were 0 and got no gradient"
            )
        return {name.split("/")[1]: value for name, value in metrics.items()}

    def _check_stragglers(self, seconds: list[tuple[float, str]]) -> dict[str, float]:
        """The slowest rank's own seconds a step; warns, and gives its number, where all others wait for it."""
        median = statistics.median(value for value, _ in seconds)
        slowest = max(range(len(seconds)), key=lambda rank: seconds[rank][0])
        worst, host = seconds[slowest]
        if worst <= _STRAGGLER_RATIO * median or worst - median <= _STRAGGLER_SECONDS:
            return {"speed/slowest_rank_seconds": worst}
        self._stage.log.say(
            f"warning: rank {slowest} on {host} takes {worst:.3f} s a step for its own work, the median rank "
            f"{median:.3f} s: all wait for it"
        )
        return {"speed/slowest_rank_seconds": worst, "speed/straggler_rank": float(slowest)}

    def _check_waiting(self, shares: list[tuple[float, str]]) -> float:
        """The largest share of the time that a rank waited for images; warns when it is large."""
        rank = max(range(len(shares)), key=lambda rank: shares[rank][0])
        share, host = shares[rank]
        if self._input.should_warn(share):
            cures = self._cures_of_waiting()
            self._stage.log.say(
                f"warning: input-bound: rank {rank} on {host} waits for images {share:.0%} of the time; "
                f"{', or '.join(cures) or 'all cores here are at work'}"
            )
        return share

    def _cures_of_waiting(self) -> list[str]:
        data, cores = self._stage.config.data, len(os.sched_getaffinity(0))
        on_gpu = self._stage.world.device.type != "cpu"
        processes = (len(self._stage.guard.local_peers) + 1) * (data.num_workers + (0 if on_gpu else 1))
        cures = [f"raise data.num_workers ({data.num_workers} a rank, {cores} cores here)"] * (processes < cores)
        cures += ["set data.augment_on=device"] if on_gpu and data.augment_on == "cpu" else []
        return cures + ["pack the images (runners/pack_dataset.py)"] * isinstance(self._stage.source, FileImages)
