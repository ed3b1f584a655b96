"""An update of a run's images, applied whole or not at all, wherever it is interrupted.

The new state is written beside the run and committed by one rename. From then on it replaces the old state file by
file, and whoever opens the run directory next finishes what was interrupted. In D/update, until it is finished:

    checkpoints/                       becomes D/pretrain/checkpoints; the old ones are kept under another name
    metrics.jsonl                      becomes D/pretrain/metrics.jsonl
    instances.txt, data.json, …        become D's
"""

from itertools import count
from pathlib import Path

from instance_ssl.checkpoint.directory import clear_leftovers, remove_directory
from instance_ssl.errors import UserError
from instance_ssl.files.atomic import sync_directory
from instance_ssl.files.disk_space import why_not_written
from instance_ssl.run.broken_record import left_out_path
from instance_ssl.run.directory import UPDATE, locked

_FILES = ("unreadable.txt", "instances.txt", "instance_sizes.npy", "data_changes.jsonl", "data.json")
_MAPS = "instances_map_*.npy"
_DRAFT = ".writing-update"


def begin(run_directory: Path) -> Path:
    """An empty folder for the new state, on the run's file system."""
    clear_leftovers(run_directory)
    (run_directory / _DRAFT).mkdir(parents=True)
    return run_directory / _DRAFT


def commit(run_directory: Path) -> None:
    """Makes the new state the run's, and finishes that. The caller has the training's directory locked."""
    sync_directory(run_directory / _DRAFT)
    (run_directory / _DRAFT).rename(run_directory / UPDATE)
    sync_directory(run_directory)
    _apply(run_directory)


def finish(run_directory: Path) -> None:
    """Finishes an update that was committed and then interrupted, if there is one; one process alone calls it.

    Raises:
        UserError: when another run has the training's directory, or it cannot be written to.
    """
    training = run_directory / "pretrain"
    if not (run_directory / UPDATE).is_dir():
        return
    try:
        training.mkdir(exist_ok=True)
        with locked(training):
            _apply(run_directory)
    except OSError as error:
        raise UserError(f"{run_directory}: {why_not_written(error, run_directory, 0)}") from error


def retired_checkpoints(run_directory: Path) -> Path:
    """Where the next update moves the checkpoints of the training before it."""
    paths = (run_directory / f"pretrain/checkpoints_before_update_{number}" for number in count(1))
    return next(path for path in paths if not path.exists())


def _apply(run_directory: Path) -> None:
    """Each step either has been done before or is done now."""
    folder, training = run_directory / UPDATE, run_directory / "pretrain"
    (training / "left_out_steps.json").unlink(missing_ok=True)  # steps have other numbers from here on
    if (folder / "checkpoints").exists():
        checkpoints = training / "checkpoints"
        if checkpoints.exists():
            checkpoints.rename(retired_checkpoints(run_directory))
        _move(folder / "checkpoints", checkpoints)
    _move(folder / "metrics.jsonl", training / "metrics.jsonl")
    left_out_path(run_directory).unlink(missing_ok=True)
    for path in folder.glob(_MAPS):
        _move(path, run_directory / path.name)
    for name in _FILES:
        _move(folder / name, run_directory / name)
    sync_directory(run_directory)
    remove_directory(folder)


def _move(path: Path, target: Path) -> None:
    if path.exists():
        path.replace(target)
        sync_directory(target.parent)
