"""Times checkpoints of a large classifier beside `torch.save` and `torch.load` of the same tensors."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from instance_ssl.checkpoint.directory import DirectoryWriter
from instance_ssl.checkpoint.state import TrainingPosition, load_rows, newest_checkpoint, start_checkpoint
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.distributed.comm import Group
from measure import Timing


def measure_checkpoints(
    directory: Path, num_classes: int, embedding_dim: int, repeats: int, world: Group
) -> list[dict[str, Any]]:
    """Times saving and loading W (num_classes, embedding_dim) and its momentum; one row per operation.

    Times are those of the slowest rank. `ours, pause` is how long training waits; `ours, save` ends with the commit.
    torch.save is timed with and without fsync, which a checkpoint that survives a power cut needs. Nothing is removed
    between operations, because reused memory and disk blocks can be several times as fast as new ones, and pending
    writes are flushed before each.
    """
    shard = _shard(num_classes, embedding_dim, world)
    other = _shard(num_classes, embedding_dim, world)
    writer_steps = list(range(repeats + 1))
    saved: list[Path] = []
    tensors = {"weight": shard.weight, "momentum": shard.momentum_buffer}
    writer = DirectoryWriter(directory / "checkpoints", world, keep=repeats + 1, is_permanent=lambda step: False)

    def begin() -> None:
        position = TrainingPosition(writer_steps.pop(0), 0, num_classes, embedding_dim, world.size)
        start_checkpoint(writer, position, {}, {}, {}, shard, world)

    def save_with_torch(through: bool) -> None:
        folder = directory / f"torch_{len(saved)}_{world.rank}"
        folder.mkdir()
        saved.append(folder / "rows.pt")
        with saved[-1].open("wb") as file:
            torch.save(tensors, file)
            if through:
                file.flush()
                os.fsync(file.fileno())

    def load_ours() -> None:
        found = newest_checkpoint(directory / "checkpoints", world)
        assert found is not None
        load_rows(found, other)

    def load_with_torch() -> None:
        content = torch.load(saved[-1], weights_only=True)
        other.weight.copy_(content["weight"])
        other.momentum_buffer.copy_(content["momentum"])

    steps: dict[str, Callable[[], object]] = {
        "ours, pause": begin,
        "ours, save": writer.commit,
        "torch.save": lambda: save_with_torch(False),
        "torch.save and fsync": lambda: save_with_torch(True),
        "ours, verify and load": load_ours,
        "torch.load": load_with_torch,
    }
    seconds = _time_in_turns(steps, repeats, world)
    seconds["ours, save"] = [sum(parts) for parts in zip(seconds["ours, pause"], seconds["ours, save"], strict=True)]
    if not torch.equal(other.weight, shard.weight):
        raise AssertionError("what was loaded is not what was saved")
    size = sum(path.stat().st_size for path in (directory / "checkpoints/step_000000000").glob("*.pt"))
    world.barrier()
    if world.rank == 0:
        shutil.rmtree(directory)
    return [_row(name, values, seconds, size, num_classes, world) for name, values in seconds.items()]


def _time_in_turns(steps: dict[str, Callable[[], object]], repeats: int, world: Group) -> dict[str, list[float]]:
    """Seconds of every step on the slowest rank, after one warm-up turn and with pending writes flushed."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            os.sync()
            world.barrier()
            started = time.perf_counter()
            step()
            taken = torch.tensor([time.perf_counter() - started], device=world.device)
            slowest = world.all_reduce_max_(taken).item()
            if turn > 0:
                seconds[name].append(slowest)
    return seconds


def _row(
    name: str, values: list[float], seconds: dict[str, list[float]], size: int, num_classes: int, world: Group
) -> dict[str, Any]:
    against = {"ours, save": "torch.save and fsync", "ours, verify and load": "torch.load"}.get(name)
    timing = Timing.of(values)
    return {
        "what": name,
        "N": num_classes,
        "T": world.size,
        "median_s": timing.median,
        "quartiles_s": f"{timing.low:.4g}-{timing.high:.4g}",
        "times_torch": "" if against is None else timing.median / Timing.of(seconds[against]).median,
        "MB": size / 1e6,
    }


def _shard(num_classes: int, embedding_dim: int, world: Group) -> ClassifierShard:
    shard = ClassifierShard(num_classes, embedding_dim, world, SoftmaxOptions(0.15, "mixture", torch.float32))
    generator = torch.Generator(world.device).manual_seed(world.rank)
    shard.weight.normal_(generator=generator)
    shard.momentum_buffer.normal_(generator=generator)
    return shard
