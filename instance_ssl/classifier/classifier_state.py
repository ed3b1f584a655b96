"""State of an `InstanceClassifier`, whole whatever the number of ranks: in memory, and as a safetensors file.

    weight          (N, D)
    momentum        (N, D)
    hard_classes    (N, K) int32, where a table has been made
    steps_taken     () int64
    recent_classes  (M,) int64, with sampling `recent`

The file's metadata has the settings as JSON. A rank reads its own rows alone.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from instance_ssl.classifier.classifier_settings import ClassifierSettings
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.errors import escape, in_one_line, shorten
from instance_ssl.files.atomic import saved_file
from instance_ssl.files.structured import MalformedError, parse_json

_KIND = "instance_ssl.InstanceClassifier"
_ROWS = ("weight", "momentum", "hard_classes")
# Without these equal, the rows of one classifier mean nothing to another.
_IDENTITY = ("num_instances", "embedding_dim", "temperature", "loss_form")


def whole_state(shard: ClassifierShard) -> dict[str, Tensor]:
    """The state of all ranks, on the CPU of each. Collective."""
    shard.settle()
    rows = {"weight": shard.weight, "momentum": shard.momentum_buffer, "hard_classes": shard.hard_classes}
    state = {name: _whole(own, shard) for name, own in rows.items() if own is not None}
    state["steps_taken"] = torch.tensor(shard.steps_taken)
    if shard.sampler is not None and shard.sampler.mode == "recent":
        state["recent_classes"] = shard.sampler.recent_classes.clone()
    return state


def _whole(own: Tensor, shard: ClassifierShard) -> Tensor:
    """The rows of all ranks (N, …) on the CPU; only one rank's travel at a time."""
    whole = torch.empty(shard.partition.total, *own.shape[1:], dtype=own.dtype)
    for rank, count in enumerate(shard.partition.counts()):
        rows = own if rank == shard.group.rank else own.new_empty(count, *own.shape[1:])
        whole[slice(*shard.partition.bounds(rank))] = shard.group.broadcast_(rows, rank).cpu()
    return whole


def own_part(state: Mapping[str, Tensor], shard: ClassifierShard) -> dict[str, Tensor]:
    """Local rows of a `whole_state`, and what has no rows."""
    _check_shapes({name: tuple(value.shape) for name, value in state.items()}, shard)
    own = slice(shard.start, shard.stop)
    return {name: value[own] if name in _ROWS else value for name, value in state.items()}


@torch.no_grad()
def restore(own: Mapping[str, Tensor], shard: ClassifierShard, num_hard_classes: int) -> None:
    """Puts an `own_part` into the shard. A table of other than `num_hard_classes` columns is dropped."""
    table = own.get("hard_classes")
    shard.hard_classes = None
    keeps_table = table is not None and shard.smoothing_factor > 0 and table.shape[1] == num_hard_classes
    shard.settle()
    rows = {"weight": own["weight"], "momentum": own["momentum"], "steps_seen": None}
    shard.restore_rows(slice(None), slice(None), {**rows, "hard_classes": table if keeps_table else None})
    shard.steps_taken = int(own["steps_taken"])
    if shard.sampler is not None and "recent_classes" in own:
        shard.sampler.recent_classes = own["recent_classes"].cpu().clone()


def write_state(state: Mapping[str, Tensor], settings: ClassifierSettings, path: Path) -> None:
    """Writes a `whole_state` as safetensors, whole or not at all; a `UserError` where the file cannot be written."""
    safetensors = _safetensors()
    metadata = {"format": "pt", "kind": _KIND, "settings": json.dumps(asdict(settings))}
    with saved_file(path, sum(value.nbytes for value in state.values())) as temporary:
        temporary.touch()  # a missing folder is reported by its own error
        try:
            safetensors.torch.save_file(dict(state), temporary, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(escape(shorten(in_one_line(error)))) from None


def read_state(path: Path, settings: ClassifierSettings, shard: ClassifierShard) -> dict[str, Tensor]:
    """The `own_part` of a file's state.

    Raises:
        ValueError: the file cannot be read, is not a classifier's, or is that of another one.
    """
    safetensors, shown = _safetensors(), escape(str(path))
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata, slices = file.metadata() or {}, {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("kind") != _KIND:
                raise ValueError(f"{shown} is not the file of an InstanceClassifier")
            _check_identity(parse_json(metadata["settings"]), settings, shown)
            _check_shapes({name: tuple(value.get_shape()) for name, value in slices.items()}, shard)
            own = slice(shard.start, shard.stop)
            return {name: slices[name][own] if name in _ROWS else file.get_tensor(name) for name in slices}
    except (OSError, KeyError, TypeError, MalformedError, safetensors.SafetensorError) as error:
        raise ValueError(f"{shown} cannot be read: {escape(shorten(in_one_line(error)))}") from None


def _check_identity(found: Mapping[str, object], settings: ClassifierSettings, shown: str) -> None:
    for name in _IDENTITY:
        if found[name] != getattr(settings, name):
            theirs = escape(shorten(str(found[name])))
            raise ValueError(f"{shown} has {name} {theirs}, and this classifier has {getattr(settings, name)}")


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], shard: ClassifierShard) -> None:
    """Raises a `ValueError` unless the tensors of these names and shapes are a state of this classifier."""
    wide = shard.partition.total, shard.weight.shape[1]
    if missing := {"weight", "momentum", "steps_taken"} - shapes.keys():
        raise ValueError(f"the state has no {sorted(missing)[0]}: is it that of an InstanceClassifier?")
    for name in ("weight", "momentum"):
        if shapes[name] != wide:
            raise ValueError(f"the state's {name} is {shapes[name]}, and this classifier's {wide}")
    if "hard_classes" in shapes and (len(shapes["hard_classes"]) != 2 or shapes["hard_classes"][0] != wide[0]):
        raise ValueError(f"the state's hard_classes are {shapes['hard_classes']}, not ({wide[0]}, K)")


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError('save() and load() need safetensors: pip install -e ".[export]"') from None
    return safetensors
