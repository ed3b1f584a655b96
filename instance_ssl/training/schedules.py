"""Learning-rate schedules, pure functions from a step to a value, and in which epoch a step is."""

import math
from dataclasses import dataclass


def warmup_cosine(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up to `peak`, then half a cosine to 0 (paper, "Implementation details").

    Args:
        step: optimizer steps already taken, 0 … total_steps.
        peak: learning rate at the end of the warm-up.
        warmup_steps: step k of the warm-up runs at peak · (k + 1) / warmup_steps, so that none is lost at 0.
        total_steps: at which the rate reaches 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class EpochClock:
    """In which epoch each step of a training is, also where epochs have grown longer on the way.

    Steps are counted on and on. A training whose data set grows begins a stretch of longer epochs, with the epoch that
    it was in.

    Attributes:
        stretches: (first step, first epoch, steps an epoch) of each, in order; the first begins with step 0.
    """

    stretches: tuple[tuple[int, int, int], ...]

    @property
    def steps_per_epoch(self) -> int:
        """Of the last stretch."""
        return self.stretches[-1][2]

    def place(self, step: int) -> tuple[int, int]:
        """The epoch that step `step` is in, and the steps before it in that epoch; epoch -1 for step -1."""
        first_step, first_epoch, per_epoch = self._stretch(step)
        epochs, before = divmod(step - first_step, per_epoch)
        return first_epoch + epochs, before

    def done(self, steps: int) -> tuple[int, int]:
        """Whole epochs that so many steps have been, and the steps beyond."""
        epoch, before = self.place(steps - 1)
        return (epoch + 1, 0) if before + 1 == self._stretch(steps - 1)[2] else (epoch, before + 1)

    def epochs(self, steps: int) -> float:
        """How many epochs so many steps have been, for an axis; where an epoch begun began again, it goes back."""
        first_step, first_epoch, per_epoch = self._stretch(steps - 1)
        return first_epoch + (steps - first_step) / per_epoch

    def longer(self, step: int, steps_per_epoch: int) -> "EpochClock":
        """The clock of a training whose epochs have another length from `step` on; an epoch begun begins again."""
        epoch, _ = self.done(step)
        return EpochClock((*self.stretches, (step, epoch, steps_per_epoch)))

    def scheduled(self, step: int) -> int:
        """The step that `step` would be, had all epochs been as long as those of the last stretch."""
        first_step, first_epoch, per_epoch = self.stretches[-1]
        return first_epoch * per_epoch + step - first_step

    def total_steps(self, epochs: int) -> int:
        """Steps of so many epochs."""
        first_step, first_epoch, per_epoch = self.stretches[-1]
        return first_step + (epochs - first_epoch) * per_epoch

    def _stretch(self, step: int) -> tuple[int, int, int]:
        return next((stretch for stretch in reversed(self.stretches) if stretch[0] <= step), self.stretches[0])
