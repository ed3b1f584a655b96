"""Learning-rate schedules: pure functions from a step to a value."""

import math


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
