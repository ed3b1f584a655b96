"""Checkpoints free of the world size, each a directory that exists only when it is whole.

    checkpoints/step_000000440/
        encoder.pt            encoder state and momentum by name, float32, whole (whatever the ZeRO stage)
        rows_000000000_000000719.pt …   rows [start, stop) of W, their momentum and hard classes, by global row
        sampling.pt           recent classes of sampled instance classification, where a run samples
        training.json         step, epoch, N, D, figures of the last epoch
        MANIFEST.json         size and SHA-256 of every file

Ranks write into a temporary directory, agree that all went well, and rank 0 renames it. A reader takes the newest
directory whose manifest verifies. Rows are found by number, so any number of ranks can read what any other wrote.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError

_MANIFEST = "MANIFEST.json"
_SAMPLING = "sampling.pt"


@dataclass(frozen=True)
class TrainingPosition:
    """Where training stands: optimizer steps and whole epochs done, the size of the problem, the last epoch's means."""

    step: int
    epoch: int
    num_instances: int
    embedding_dim: int
    figures: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint's directory and position."""

    directory: Path
    position: TrainingPosition


def save_checkpoint(
    parent: Path,
    position: TrainingPosition,
    encoder_state: dict[str, Tensor],
    encoder_momentum: dict[str, Tensor],
    shard: ClassifierShard,
    world: Group,
    *,
    keep: int,
) -> Path:
    """Writes `parent`/step_… on all ranks together, then removes all but the newest `keep`.

    Raises:
        UserError: when any rank could not write; nothing new is left then and older checkpoints stay.
    """
    final = parent / f"step_{position.step:09d}"
    temporary = parent / f".{final.name}.tmp"
    if world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    world.barrier()
    shard.settle()
    problem = None
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        if shard.replicas is None or shard.replicas.rank == 0:
            rows = {"weight": shard.weight, "momentum": shard.momentum_buffer, "hard_classes": shard.hard_classes}
            _save(temporary / f"rows_{shard.start:09d}_{shard.stop:09d}.pt", rows)
        if world.rank == 0:
            _save(temporary / "encoder.pt", {"state": encoder_state, "momentum": encoder_momentum})
            if shard.sampler is not None:
                _save(temporary / _SAMPLING, {"recent_classes": shard.sampler.recent_classes})
            (temporary / "training.json").write_text(json.dumps(asdict(position), indent=2) + "\n")
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        problem = f"rank {world.rank}: {' '.join(str(error).split())}"
    problems = [text for text in world.all_gather_objects(problem) if text is not None]
    if not problems:
        problems = [text for text in [world.broadcast_object(_commit(temporary, final, world))] if text is not None]
    if problems:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"checkpoint {final} could not be written ({problems[0]}); older checkpoints are untouched")
    if world.rank == 0:
        for old in _directories(parent)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def newest_checkpoint(parent: Path, group: Group) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where there is none at all. Rank 0 looks, all ranks agree.

    Raises:
        UserError: when there are checkpoints but not one is whole: training never starts over in silence.
    """
    found: Checkpoint | str | None = None
    if group.rank == 0:
        damage = []
        for directory in _directories(parent):
            problem = _verify(directory)
            if problem is None:
                position = TrainingPosition(**json.loads((directory / "training.json").read_text()))
                found = Checkpoint(directory, position)
                break
            damage.append(f"{directory}: {problem}")
        if found is None and damage:
            found = f"no checkpoint in {parent} is whole ({damage[0]}); restore one or remove the directory"
    found = group.broadcast_object(found)
    if isinstance(found, str):
        raise UserError(found)
    return found


def load_encoder(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Encoder state and momentum by name, on the CPU."""
    content = _load(checkpoint.directory / "encoder.pt")
    return content["state"], content["momentum"]


def load_rows(checkpoint: Checkpoint, shard: ClassifierShard) -> None:
    """Fills the shard's rows, momentum, hard classes and counters from whichever files hold them.

    Raises:
        UserError: when the checkpoint is of another number of images or embedding dimension, or lacks rows.
    """
    position = checkpoint.position
    found = (position.num_instances, position.embedding_dim)
    expected = (shard.partition.total, shard.weight.shape[1])
    if found != expected:
        raise UserError(f"{checkpoint.directory} holds {found[0]} x {found[1]} weights, this run needs {expected}")
    shard.steps_taken = position.step
    if shard.sampler is not None and (checkpoint.directory / _SAMPLING).exists():
        shard.sampler.recent_classes = _load(checkpoint.directory / _SAMPLING)["recent_classes"]
    filled = 0
    for path in sorted(checkpoint.directory.glob("rows_*.pt")):
        first, last = (int(part) for part in path.stem.split("_")[1:])
        start, stop = max(first, shard.start), min(last, shard.stop)
        if start >= stop:
            continue
        filled += stop - start
        content = _load(path)
        theirs, own = slice(start - first, stop - first), slice(start - shard.start, stop - shard.start)
        shard.weight[own] = content["weight"][theirs].to(shard.weight)
        shard.momentum_buffer[own] = content["momentum"][theirs].to(shard.momentum_buffer)
        hard = content["hard_classes"]
        if hard is not None:
            if shard.hard_classes is None:
                shard.hard_classes = torch.empty(
                    len(shard.weight), hard.shape[1], dtype=hard.dtype, device=shard.weight.device
                )
            shard.hard_classes[own] = hard[theirs].to(shard.weight.device)
    if filled != len(shard.weight):
        raise UserError(f"{checkpoint.directory} lacks rows of the classifier: {filled} of {len(shard.weight)} found")


def _save(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _commit(temporary: Path, final: Path, group: Group) -> str | None:
    """Rank 0 writes the manifest and renames; returns what went wrong, if anything."""
    if group.rank != 0:
        return None
    try:
        files = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
        (temporary / _MANIFEST).write_text(json.dumps(files, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except OSError as error:
        return f"rank 0: {error}"
    return None


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _directories(parent: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    return sorted(parent.glob("step_*"), reverse=True)


def _verify(directory: Path) -> str | None:
    """None when every file of the manifest is there with its size and digest, else the first problem."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
        for name, expected in manifest.items():
            if _describe(directory / name) != expected:
                return f"{name} has changed since it was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None
