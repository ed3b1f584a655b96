"""What a run directory has recorded: whether it is of this very experiment, and whether a stage of it is complete."""

import hashlib
import json
from pathlib import Path
from typing import Any

from instance_ssl.checkpoint.directory import newest_sound_directory, step_of
from instance_ssl.config.experiment import ExperimentConfig, flatten, load_config, read_yaml
from instance_ssl.errors import UserError
from instance_ssl.run.directory import read_json
from instance_ssl.run.log import RunLog

# Keys that may change while a run goes on: they do not touch what was learned. All others are bound.
FREE_KEYS = (
    *("evaluation", "export", "log", "checkpoint", "safety"),
    *("data.num_workers", "data.augment_on", "data.limit_test", "data.root", "data.shards"),
    *("data.on_broken", "data.max_broken_share", "data.allow_lost"),
)
# What the result.json of every stage holds.
_RESULT_KEYS = {"stage", "newest_checkpoint", "data", "seconds", "date", "world_size"}
# What became of files before these keys existed, and the kinds that have no files.
_AS_BEFORE = {"data.exif": "stored", "data.alpha": "drop"}
_IN_MEMORY = ("digits", "cifar10", "cifar100")
BOUND_STAGES = ("initialize_classifier", "pretrain")


def config_digest(config: ExperimentConfig) -> str:
    """SHA-256 of all keys that a run is bound to."""
    # Runs from before the keys of `_AS_BEFORE` keep their digest.
    bound = {key: value for key, value in _bound(config).items() if (key, value) not in _AS_BEFORE.items()}
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def _bound(config: ExperimentConfig) -> dict[str, Any]:
    """The keys, dotted, that a run is bound to."""
    free = FREE_KEYS if config.data.kind not in _IN_MEMORY else (*FREE_KEYS, *_AS_BEFORE)
    return {key: value for key, value in flatten(config).items() if not key.startswith(free)}


def check_unchanged(config: ExperimentConfig, run_directory: Path) -> None:
    """A run directory belongs to one experiment; what was learned under another is not mixed in.

    Raises:
        UserError: naming the first key that differs, and what may.
    """
    for stage in BOUND_STAGES:
        path = run_directory / stage / "config.yaml"
        if not path.exists():
            continue
        then, now = flatten(load_recorded(path, "restore it, or give another --run-dir")), _bound(config)
        changed = [key for key, value in now.items() if then.get(key) != value]
        if changed and set(changed) <= set(_AS_BEFORE):
            cure = " ".join(f"{key}={then[key]}" for key in changed)
            raise UserError(
                f"{run_directory} holds a run with other {' and '.join(changed)}: go on with --set {cure}, or give "
                "another --run-dir"
            )
        if changed:
            key, others = changed[0], changed[1:]
            more = f" (and {', '.join(others)})" if others else ""
            raise UserError(
                f"{run_directory} holds a run with {key} = {then.get(key)}, not {now[key]}{more}; give another "
                f"--run-dir or the same value (only {', '.join(FREE_KEYS)} may change in a run)"
            )


def sound_result(directory: Path) -> dict[str, Any] | None:
    """A stage's result.json, where it is there and holds what every stage writes at its end."""
    result = read_json(directory / "result.json")
    is_sound = result is not None and result.keys() >= _RESULT_KEYS and result["stage"] == directory.name
    return result if is_sound else None


def is_complete(
    directory: Path, config: ExperimentConfig, newest_checkpoint: str | None, images_digest: str, log: RunLog
) -> bool:
    """Whether a stage's own record says that it is complete, and agrees with what it is a record of.

    Args:
        newest_checkpoint: what an evaluation would be of now (`what_is_evaluated`).
        images_digest: of the training images as they are now; steps have other numbers once these have changed.

    Raises:
        UserError: when the stage's config.yaml cannot be read, or a training is complete but its checkpoints are gone.
    """
    result, config_path = sound_result(directory), directory / "config.yaml"
    if result is None:
        return False
    if directory.name not in BOUND_STAGES:
        if not config_path.exists():
            return False
        recorded = load_recorded(config_path, "remove it, and the evaluation is done again")
        of = result["data"].get("digest") if isinstance(result["data"], dict) else None
        return flatten(recorded) == flatten(config) and (result["newest_checkpoint"], of) == (
            newest_checkpoint,
            images_digest,
        )
    steps, newest = result.get("steps", 0), newest_sound_directory(directory / "checkpoints")
    if newest is None:
        raise UserError(
            f"{directory / 'result.json'} says complete, but {directory / 'checkpoints'} holds no whole checkpoint: "
            "restore it, or remove result.json to have the stage run again"
        )
    if step_of(newest) != steps:
        log.say(
            f"{directory.name}: result.json says {steps} steps, but the newest whole checkpoint is {newest.name}: not "
            "complete"
        )
    return step_of(newest) == steps


def load_recorded(path: Path, cure: str) -> ExperimentConfig:
    """The configuration that a stage has recorded, with the images as they were taken where that is not in it.

    Args:
        cure: for the error, what to do where the record is damaged.

    Raises:
        UserError: as `load_config`.
    """
    try:
        values = read_yaml(path)
        evaluation = values.get("evaluation")
        data = {"": values.get("data"), "evaluation.": evaluation.get("data") if isinstance(evaluation, dict) else None}
        lacking = [
            f"{prefix}{key}={value}"
            for prefix, section in data.items()
            if isinstance(section, dict) and section.get("kind") not in _IN_MEMORY
            for key, value in _AS_BEFORE.items()
            if key.removeprefix("data.") not in section
        ]
        return load_config(path, lacking)
    except UserError as error:
        raise UserError(f"{str(error).removeprefix('--config ')}; this is the stage's own record: {cure}") from None
