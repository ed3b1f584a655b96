"""Reads what the stages of a run have recorded: their configuration, and whether they are complete."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instance_ssl.checkpoint.committed import newest_sound_directory, step_of
from instance_ssl.checkpoint.identity import FORMER_VALUES, KINDS_WITHOUT_FILES, require_same_keys
from instance_ssl.config.experiment import ExperimentConfig, flatten, load_config, read_yaml
from instance_ssl.errors import UserError
from instance_ssl.run.directory import read_json
from instance_ssl.run.log import RunLog

# What the result.json of every stage holds.
_RESULT_KEYS = {"stage", "newest_checkpoint", "data", "seconds", "date", "world_size"}
# Stages that learn: a run directory belongs to the experiment that they were run with.
BOUND_STAGES = ("initialize_classifier", "pretrain")


def check_unchanged(config: ExperimentConfig, run_directory: Path) -> None:
    """Refuses an experiment other than the one that a run directory belongs to, naming the first key that differs."""
    for stage in BOUND_STAGES:
        path = run_directory / stage / "config.yaml"
        if path.exists():
            recorded = flatten(load_recorded(path, "restore it, or give another --run-dir"))
            require_same_keys(recorded, flatten(config), str(run_directory))


def recorded_choices(keys: Sequence[str], run_directory: Path) -> dict[str, Any]:
    """Returns what a run has recorded of these dotted keys, as JSON values; empty for a run that has learned nothing.

    Raises:
        UserError: the record is damaged.
    """
    paths = (run_directory / stage / "config.yaml" for stage in BOUND_STAGES)
    path = next((path for path in paths if path.exists()), None)
    if path is None or not keys:
        return {}
    recorded = flatten(load_recorded(path, "restore it, or give another --run-dir"))
    return {key: recorded[key] for key in keys}


def sound_result(directory: Path) -> dict[str, Any] | None:
    """A stage's result.json; None where it is missing or lacks what every stage writes at its end."""
    result = read_json(directory / "result.json")
    is_sound = result is not None and result.keys() >= _RESULT_KEYS and result["stage"] == directory.name
    return result if is_sound else None


def is_complete(
    directory: Path, config: ExperimentConfig, newest_checkpoint: str | None, images_digest: str, log: RunLog
) -> bool:
    """Whether a stage's record says that it is complete, and agrees with what it is a record of.

    Args:
        newest_checkpoint: the checkpoint that an evaluation would use now (`what_is_evaluated`).
        images_digest: of the training images as they are now; steps have other numbers once these have changed.

    Raises:
        UserError: the stage's config.yaml cannot be read, or a training is complete but its checkpoints are gone.
    """
    result, config_path = sound_result(directory), directory / "config.yaml"
    if result is None or (directory.name not in BOUND_STAGES and not config_path.exists()):
        return False
    if directory.name not in BOUND_STAGES:
        recorded = load_recorded(config_path, "remove it to repeat the evaluation")
        of = result["data"].get("digest") if isinstance(result["data"], dict) else None
        now = newest_checkpoint, images_digest
        return flatten(recorded) == flatten(config) and (result["newest_checkpoint"], of) == now
    steps, newest = result.get("steps", 0), newest_sound_directory(directory / "checkpoints")
    if newest is None:
        raise UserError(
            f"{directory / 'result.json'} says complete, but {directory / 'checkpoints'} holds no intact checkpoint: "
            "restore it, or remove result.json to have the stage run again"
        )
    if step_of(newest) != steps:
        log.say(
            f"{directory.name}: result.json says {steps} steps, but the newest intact checkpoint is {newest.name}: not "
            "complete"
        )
    return step_of(newest) == steps


def load_recorded(path: Path, cure: str) -> ExperimentConfig:
    """The configuration that a stage has recorded; keys that are newer than the record get their former values.

    Args:
        cure: for the message, what to do where the record is damaged.
    """
    try:
        values = read_yaml(path)
        evaluation = values.get("evaluation")
        data = {"": values.get("data"), "evaluation.": evaluation.get("data") if isinstance(evaluation, dict) else None}
        lacking = [
            f"{prefix}{key}={value}"
            for prefix, section in data.items()
            if isinstance(section, dict) and section.get("kind") not in KINDS_WITHOUT_FILES
            for key, value in FORMER_VALUES.items()
            if key.removeprefix("data.") not in section
        ]
        return load_config(path, lacking)
    except UserError as error:
        raise UserError(f"{str(error).removeprefix('--config ')}; this is the stage's own record: {cure}") from None
