"""What a stage gets: its configuration, the world, the log, the images, and where its files go."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from instance_ssl.config.deepspeed import DeepSpeedSettings
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.distributed.comm import Group
from instance_ssl.run import agreement
from instance_ssl.run.log import RunLog
from instance_ssl.run.watchdog import Guard, Stopped

_T = TypeVar("_T")


@dataclass(frozen=True)
class Stage:
    """What a stage gets.

    Attributes:
        source: the training images.
        evaluation_sources: labelled images, train and test; None where no stage of the run needs them.
    """

    name: str
    run_directory: Path
    config: ExperimentConfig
    ds: DeepSpeedSettings
    world: Group
    log: RunLog
    guard: Guard
    source: ImageSource
    evaluation_sources: tuple[ImageSource, ImageSource] | None = None

    @property
    def directory(self) -> Path:
        """The stage's directory."""
        return self.run_directory / self.name

    def checkpoints_of(self, stage: str) -> Path:
        """Returns where a stage of this run keeps its checkpoints."""
        return self.run_directory / stage / "checkpoints"

    def check_together(self) -> None:
        """Raises `Stopped` on all ranks if any was asked to stop; for work that all do in step. Collective."""
        self.guard.beat()
        wanted = torch.tensor([int(self.guard.reason is not None)], device=self.world.device)
        if self.world.all_reduce_max_(wanted).item():
            self.stop_together()

    def stop_together(self) -> NoReturn:
        """Stops (`Stopped`) all ranks, with the reason given by any rank. Collective."""
        raise Stopped(next(reason for reason in self.world.all_gather_objects(self.guard.reason) if reason is not None))

    def together(self, load: Callable[[], _T]) -> _T:
        """Does work that may fail on one rank alone, and then fails on all: see `agreement.together`. Collective."""
        return agreement.together(load, self.world)

    def on_rank_0(self, work: Callable[[], _T]) -> _T:
        """Does work on rank 0, and returns its result or fails on all: see `agreement.rank_0_alone`. Collective."""
        return agreement.rank_0_alone(work, self.world)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Returns the JSON's autocast, for forward passes outside the engine."""
        dtype = self.ds.autocast_dtype
        return torch.autocast(self.world.device.type, dtype) if dtype else contextlib.nullcontext()
