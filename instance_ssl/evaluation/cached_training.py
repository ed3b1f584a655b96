"""Caches and resumes the trainings that evaluations run.

A training's name is the digest of all that decides its outcome. D/<stage>/trainings holds its state, <name>.pt, until
it ends, and then its metrics, <name>.json. The same command, or one with further fractions or grid points, reuses them.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instance_ssl.checkpoint.directory import read_tensors, replace_file
from instance_ssl.errors import UserError
from instance_ssl.evaluation.epoch_log import DivergedError, Progress
from instance_ssl.files.atomic import write_json
from instance_ssl.files.disk_space import saving
from instance_ssl.run.directory import read_json
from instance_ssl.run.stage import Stage

# A state is written at the end of an epoch, unless that would take more than this share of the time.
_SAVING_SHARE = 0.05
# Metrics that every training returns.
_ALWAYS_THERE = ("top1", "train_loss", "epochs")


def train_or_find(
    stage: Stage,
    title: str,
    decisive: dict[str, Any],
    train: Callable[[Any, Callable[[Progress], None]], dict[str, Any]],
) -> dict[str, Any]:
    """Returns the cached result, or trains. Collective.

    Args:
        decisive: all that decides the outcome, except the number of ranks.
        train: takes the state to resume from, if any, and a function to call with each epoch's progress.

    Raises:
        DivergedError: when the loss is not finite, now or in the cached training.
    """
    directory = stage.directory / "trainings"
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    name = stage.world.broadcast_object(digest[:16])
    figures_path, state_path = directory / f"{name}.json", directory / f"{name}.pt"
    found = _read_figures(figures_path) if stage.world.rank == 0 else None
    if (found := stage.world.broadcast_object(found)) is not None:
        stage.log.say(f"{title}: done before")
        if "diverged" in found:
            raise DivergedError(found["diverged"])
        return found
    directory.mkdir(parents=True, exist_ok=True)
    state = read_state(stage, state_path)
    if state is not None:
        stage.log.say(f"{title}: resuming after {state['epochs']} epochs")

    def conclude(figures: dict[str, Any]) -> None:
        with saving(figures_path):
            write_json(figures_path, figures)
        state_path.unlink(missing_ok=True)

    not_before = 0.0

    def offer(done: Progress) -> None:
        """Saves this state atomically, or skips it where the last one is recent or the disk is full."""
        nonlocal not_before
        began = time.monotonic()
        if stage.world.rank != 0 or began < not_before:
            return
        try:
            replace_file(state_path, done.state())
        except UserError as error:
            stage.log.say(f"warning: {error}; a stop now would lose the epochs")
        now = time.monotonic()
        not_before = now + (now - began) / _SAVING_SHARE

    try:
        figures = train(state, offer)
    except DivergedError as error:  # on all ranks, and it would diverge again
        figures = {"diverged": str(error)}
        stage.on_rank_0(lambda: conclude(figures))
        raise
    stage.on_rank_0(lambda: conclude(figures))
    return figures


def read_state(stage: Stage, path: Path) -> dict[str, Any] | None:
    """Reads a training's saved state on all ranks; a damaged file is logged and counts as missing. Collective."""
    if not stage.world.broadcast_object(path.exists()):
        return None
    try:
        return stage.together(lambda: read_tensors(path))
    except UserError as error:
        stage.log.say(f"warning: {error}; this training starts again")
        return None


def _read_figures(path: Path) -> dict[str, Any] | None:
    """Reads the metrics of a finished training; a damaged file counts as missing."""
    figures = read_json(path)
    if figures is None or isinstance(figures.get("diverged"), str):
        return figures
    return figures if all(isinstance(figures.get(name), int | float) for name in _ALWAYS_THERE) else None
