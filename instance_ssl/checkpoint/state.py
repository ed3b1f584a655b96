"""Writes and reads the state of a training, whatever the number of ranks.

    checkpoints/step_000000440/
        encoder.pt            encoder state and its optimizer's by name, float32, whole (whatever the ZeRO stage);
                              batch-norm statistics are the ranks' mean
        rows_000000000_000000719.pt …   rows [start, stop) of W, their momentum, hard classes and clock, by global row
        rank_00000.pt …       one rank's batch-norm statistics and random generators
        sampling.pt           state of the class sampler, where a run samples
        training.json         `TrainingPosition`
        MANIFEST.json         size and SHA-256 of every file

Rows are found by number, so any number of ranks reads what any other wrote; the same number resumes bit for bit.
`torch.distributed.checkpoint` would do the first too, but its index is a pickle and it has no hashes.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from instance_ssl.checkpoint.committed import POSITION, committed_directories, foreign_files, verify
from instance_ssl.checkpoint.directory import Content, DirectoryWriter, read_tensors
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError, reason
from instance_ssl.files.structured import MalformedError, read_json

_ENCODER, _SAMPLING = "encoder.pt", "sampling.pt"
_ROWS = ("weight", "momentum", "hard_classes", "steps_seen")
# What a reader of the encoder alone has to verify.
ENCODER_FILES = (_ENCODER, POSITION)


@dataclass(frozen=True)
class TrainingPosition:
    """Where training stands.

    Attributes:
        step: global batches of data done, skipped ones included.
        epoch: whole epochs done.
        num_instances: N.
        embedding_dim: D.
        world_size: ranks that wrote.
        figures: metrics of the last whole epoch.
        digests: of the configuration and of the images; a run that resumes must have the same.
        loss_scale: state of float16's loss scale.
        skipped_in_a_row: skipped steps up to this one.
        loss_level: what the next loss is compared with, for spikes.
        matmul_dtype: precision of the classifier's products; None before the first step.
        stretches: in checkpoints of an earlier version, (first step, first epoch, steps an epoch) of each part of the
            training, one more for each time that its data set grew. `update_images` renumbers the steps of several.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    step: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=0)]
    num_instances: Annotated[int, Field(ge=1)]
    embedding_dim: Annotated[int, Field(ge=1)]
    world_size: Annotated[int, Field(ge=1)] = 1
    figures: dict[str, float | None] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    loss_scale: dict[str, Any] | None = None
    skipped_in_a_row: int = 0
    loss_level: float | None = None
    stretches: list[tuple[int, int, int]] = field(default_factory=list)
    matmul_dtype: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        passed_over: what was wrong with newer ones.
        foreign: names of files in it that are not this project's.
    """

    directory: Path
    position: TrainingPosition
    passed_over: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()


def start_checkpoint(
    writer: DirectoryWriter,
    position: TrainingPosition,
    encoder_state: dict[str, Tensor],
    optimizer_state: dict[str, dict[str, Tensor]],
    own_buffers: dict[str, Tensor],
    shard: ClassifierShard,
    world: Group,
) -> None:
    """Starts to write a copy of the state, so that training may continue; `writer.commit` completes it.

    A state with rows that are not finite is not committed: it must not replace a good one. A finite loss keeps them
    finite (‖∂J/∂w‖ ≤ 2/(τ ‖w‖), and rows as short as 1e-12 have no gradient), so only broken memory is left.
    """
    files: dict[str, Content] = {}
    if shard.replicas is None or shard.replicas.rank == 0:
        files[f"rows_{shard.start:09d}_{shard.stop:09d}.pt"] = shard.own_state()
    random = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(world.device)
    files[f"rank_{world.rank:05d}.pt"] = {"buffers": own_buffers, "random": random}
    if world.rank == 0:
        files[_ENCODER] = {"state": encoder_state, "optimizer": optimizer_state}
        files[POSITION] = json.dumps(asdict(position), indent=2) + "\n"
        if shard.sampler is not None:
            files[_SAMPLING] = shard.sampling_state()
    writer.start(position.step, files, lambda: _find_infinite_rows(files))


def _find_infinite_rows(files: dict[str, Content]) -> str | None:
    for name, content in files.items():
        if name.startswith("rows_") and not isinstance(content, str):
            for tensor in (content["weight"], content["momentum"]):
                # First the Euclidean norm, which may overflow but costs a fifteenth of the largest absolute value.
                if not torch.linalg.vector_norm(tensor.flatten()).isfinite() and not tensor.isfinite().all():
                    return f"{name}: rows of W are not finite"
    return None


def newest_checkpoint(parent: Path, group: Group, names: tuple[str, ...] | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where there is none at all. Collective.

    Args:
        names: the only files whose content matters, `ENCODER_FILES` say; None: all.

    Raises:
        UserError: there are checkpoints but not one is whole: training never starts over silently.
    """
    directories = group.broadcast_object(committed_directories(parent) if group.rank == 0 else None)
    damage: list[str] = []
    for directory in directories:
        position = _verified_position(directory, group, names)
        if isinstance(position, TrainingPosition):
            return Checkpoint(directory, position, tuple(damage), _foreign(directory, group))
        damage.append(f"{directory}: {position}")
    if damage:
        raise UserError(f"no checkpoint in {parent} is whole ({damage[0]}); restore one or remove the directory")
    return None


def checkpoint_at(path: Path, group: Group, names: tuple[str, ...] | None = None) -> Checkpoint:
    """The checkpoint in a directory step_…, or the newest that verifies of the training in a run directory. Collective.

    Raises:
        UserError: when there is none, or what is there is damaged.
    """
    below = path / "pretrain/checkpoints"
    if group.broadcast_object(below.is_dir()) and (newest := newest_checkpoint(below, group, names)) is not None:
        return newest
    is_there = group.broadcast_object(path.is_dir())
    position = _verified_position(path, group, names) if is_there else "there is no such directory"
    if isinstance(position, str):
        raise UserError(f"{path} is not a checkpoint ({position}): give a directory step_… or a run directory")
    return Checkpoint(path, position, foreign=_foreign(path, group))


def intact_checkpoints(parent: Path, group: Group) -> list[Checkpoint]:
    """All checkpoints that verify, oldest first. Collective."""
    directories = group.broadcast_object(committed_directories(parent) if group.rank == 0 else None)
    found = [(directory, _verified_position(directory, group)) for directory in reversed(directories)]
    return [Checkpoint(directory, position) for directory, position in found if isinstance(position, TrainingPosition)]


def _verified_position(directory: Path, group: Group, names: tuple[str, ...] | None = None) -> TrainingPosition | str:
    """What training.json of a checkpoint holds, or what is wrong with the checkpoint. Collective.

    Once it returns on rank 0, no other rank reads the directory any more, and rank 0 may remove it.
    """
    problem = verify(directory, group, names)
    if problem is not None:
        return problem
    return cast(TrainingPosition | str, group.broadcast_object(_read_position(directory) if group.rank == 0 else None))


def _foreign(directory: Path, group: Group) -> tuple[str, ...]:
    return cast(tuple[str, ...], group.broadcast_object(tuple(foreign_files(directory)) if group.rank == 0 else None))


def _read_position(directory: Path) -> TrainingPosition | str:
    """What training.json holds, or what is wrong with it (another version of this project wrote it, say)."""
    try:
        text = json.dumps(read_json(directory / POSITION))  # as JSON, whose lists may stand for tuples
        return TypeAdapter(TrainingPosition).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{POSITION}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, MalformedError) as error:
        return f"{POSITION}: {reason(error)}"


def load_encoder(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Encoder state, and its optimizer's by parameter and slot, on the CPU.

    Earlier versions had SGD alone, and saved its momentum by parameter.
    """
    content = _read(checkpoint.directory / _ENCODER, "state")
    if "momentum" in content:
        return content["state"], {name: {"momentum_buffer": value} for name, value in content["momentum"].items()}
    return content["state"], _read(checkpoint.directory / _ENCODER, "optimizer")["optimizer"]


def _read(path: Path, *names: str) -> dict[str, Any]:
    content = read_tensors(path)
    if absent := [name for name in names if name not in content]:
        raise UserError(f"{path} cannot be loaded: it holds no {absent[0]}; give an intact one")
    return content


def load_own_buffers(checkpoint: Checkpoint, world: Group) -> dict[str, Tensor] | None:
    """This rank's buffers, and its random generators restored; None when another number of ranks wrote."""
    path = checkpoint.directory / f"rank_{world.rank:05d}.pt"
    if checkpoint.position.world_size != world.size or not path.exists():
        return None
    content = _read(path, "buffers", "random")
    torch.set_rng_state(content["random"]["cpu"])
    if world.device.type == "cuda" and "cuda" in content["random"]:
        torch.cuda.set_rng_state(content["random"]["cuda"], world.device)
    return content["buffers"]


def load_rows(checkpoint: Checkpoint, shard: ClassifierShard, old_ids_n: Tensor | None = None) -> None:
    """Fills the shard's rows, momentum, hard classes and counters from whichever files hold them.

    Args:
        old_ids_n: (n,) int64 on the CPU, for a checkpoint of other images: the row of the checkpoint that each local
            row takes, -1 for a row that keeps its values. Then hard classes are dropped, and rows that a sampled
            softmax has yet to update are updated. None: row i takes row i.

    Raises:
        UserError: the checkpoint lacks rows, or has another embedding dimension or (without `old_ids_n`) other rows.
    """
    position = checkpoint.position
    found, expected = (position.num_instances, position.embedding_dim), (shard.partition.total, shard.weight.shape[1])
    if found[1] != expected[1] or (old_ids_n is None and found[0] != expected[0]):
        raise UserError(f"{checkpoint.directory} holds {found[0]} x {found[1]} weights, this run needs {expected}")
    shard.steps_taken = position.step
    if shard.sampler is not None and (checkpoint.directory / _SAMPLING).exists():
        shard.restore_sampling(_read(checkpoint.directory / _SAMPLING))
    filled = 0
    for path in sorted(checkpoint.directory.glob("rows_*.pt")):
        first, last = (int(part) for part in path.stem.split("_")[1:])
        if old_ids_n is not None:
            own = ((old_ids_n >= first) & (old_ids_n < last)).nonzero()[:, 0]
            if len(own):
                shard.restore_rows(own, old_ids_n[own] - first, _read(path, *_ROWS))
            filled += len(own)
        elif (start := max(first, shard.start)) < (stop := min(last, shard.stop)):
            own_part, their_part = slice(start - shard.start, stop - shard.start), slice(start - first, stop - first)
            shard.restore_rows(own_part, their_part, _read(path, *_ROWS))
            filled += stop - start
    needed = shard.stop - shard.start if old_ids_n is None else int((old_ids_n >= 0).sum())
    if filled != needed:
        raise UserError(f"{checkpoint.directory} lacks rows of the classifier: {filled} of {needed} found")
    if old_ids_n is not None:
        shard.hard_classes = None
        shard.settle()  # rows that are added later have missed no step


def checkpoint_bytes(shard: ClassifierShard, num_hard_classes: int, encoder_bytes: int) -> int:
    """What one checkpoint of all ranks takes on disk, within a few per cent.

    Args:
        encoder_bytes: of the encoder's parameters and buffers, and of its optimizer's state.
    """
    row = shard.weight.shape[1] * (shard.weight.element_size() + shard.momentum_buffer.element_size())
    return shard.partition.total * (row + 4 * num_hard_classes) + encoder_bytes
