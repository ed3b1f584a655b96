"""Which experiment a checkpoint is of: the keys and images that a run is bound to, and their digests."""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from instance_ssl.errors import UserError

if TYPE_CHECKING:
    from instance_ssl.checkpoint.state import Checkpoint

# Keys that may change between two starts of a run, since they do not touch what is learned. All others are bound.
FREE_KEYS = (
    *("evaluation", "export", "log", "checkpoint", "safety"),
    *("data.num_workers", "data.augment_on", "data.limit_test", "data.root", "data.shards"),
    *("data.on_broken", "data.max_broken_share", "data.allow_lost"),
)
# How files were read before these keys existed, and the kinds of data that have no files.
FORMER_VALUES = {"data.exif": "stored", "data.alpha": "drop"}
# Keys that came later, with the value that stands for what was done before.
LATER_KEYS: dict[str, Any] = {
    "model.initial_weights": None,
    "model.freeze_epochs": 0,
    "classifier.learning_rate": None,
    "optimization.optimizer": "sgd",
    "optimization.backbone_learning_rate_multiplier": 1.0,
    "optimization.layer_decay": None,
}
KINDS_WITHOUT_FILES = ("digits", "cifar10", "cifar100")


def bound_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a run is bound to, of all keys of an experiment (dotted) and their JSON values."""
    free = FREE_KEYS if keys["data.kind"] not in KINDS_WITHOUT_FILES else (*FREE_KEYS, *FORMER_VALUES)
    return {key: value for key, value in keys.items() if not key.startswith(free)}


def keys_digest(keys: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of the keys that a run is bound to."""
    # A key at the value of the time before it existed is excluded: runs from then keep their digest.
    former = {**FORMER_VALUES, **LATER_KEYS}.items()
    bound = {key: value for key, value in bound_keys(keys).items() if (key, value) not in former}
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def require_same_keys(recorded: Mapping[str, Any], now: Mapping[str, Any], run: str) -> None:
    """Refuses (`UserError`) to continue a run with other keys: what was learned under some is not mixed with others.

    Args:
        recorded: dotted keys of the experiment as the run has recorded them, free ones included.
        now: those asked for.
        run: names the run in the message.
    """
    bound = bound_keys(now)
    changed = [key for key, value in bound.items() if recorded.get(key) != value]
    if changed and set(changed) <= set(FORMER_VALUES):
        cure = " ".join(f"{key}={recorded[key]}" for key in changed)
        raise UserError(
            f"{run} holds a run with other {' and '.join(changed)}: resume with --set {cure}, or give another --run-dir"
        )
    if changed:
        key, others = changed[0], changed[1:]
        more = f" (and {', '.join(others)})" if others else ""
        raise UserError(
            f"{run} holds a run with {key} = {recorded.get(key)}, not {bound[key]}{more}; give another --run-dir or "
            f"the same value (only {', '.join(FREE_KEYS)} may change in a run)"
        )


def require_same_run(checkpoint: "Checkpoint", digests: Mapping[str, str]) -> None:
    """Refuses (`UserError`) a checkpoint of another experiment.

    Args:
        digests: of this experiment, by what they are of: "configuration", "images", ….
    """
    for name, digest in digests.items():
        if checkpoint.position.digests.get(name, digest) != digest:
            raise UserError(f"{checkpoint.directory} is of a run with other {name}: give that run's own --run-dir")
