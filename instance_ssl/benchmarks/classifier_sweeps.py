"""What `runners/benchmark_classifier.py` measures: steps over N and B, memory, the largest N, and weak scaling."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from instance_ssl.benchmarks.classifier import VARIANTS, Problem, Running, gradient_error
from instance_ssl.benchmarks.measure import Timing, peak_bytes, time_interleaved
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError

Row = dict[str, Any]


def check_gradients(names: Sequence[str], world: Group) -> list[Row]:
    """Relative errors against float64.

    Raises:
        UserError: where one is too large to be rounding: nothing wrong is worth timing.
    """
    rows = []
    for name in names:
        errors = gradient_error(VARIANTS[name], world)
        if max(errors.values()) > (2e-2 if "bfloat16" in name or "compiled" in name else 2e-5):
            raise UserError(f"{name} has wrong gradients: {errors}")
        rows.append({"variant": name, **errors})
    return rows


def measure_steps(
    names: Sequence[str],
    num_classes: int,
    num_rows: int,
    embedding_dim: int,
    num_hard_classes: int,
    repeats: int,
    world: Group,
) -> list[Row]:
    """Time of a step, interleaved over the variants; then each alone for its memory and what it sends."""
    problem = Problem.draw(num_classes, num_rows, embedding_dim, num_hard_classes, world.device)
    running = {name: VARIANTS[name](problem, world) for name in names}
    times = time_interleaved({name: variant.step for name, variant in running.items()}, repeats, world)
    running.clear()
    first = Timing.of(times[names[0]]).median
    rows = []
    for name in names:
        timing = Timing.of(times[name])
        total, sent = measure_memory(name, problem, world)
        own = Partition(num_classes, world.size).count(0) if "sharded" in name or name.startswith("streamed") else num_classes
        kept = 2 * own * embedding_dim * 4 + num_rows * embedding_dim * 4
        rows.append(
            {
                "variant": name,
                "N": num_classes,
                "B": num_rows,
                "T": world.size,
                "median_ms": timing.median,
                "quartiles_ms": f"{timing.low:.4g}-{timing.high:.4g}",
                "speed": first / timing.median,
                "gflop_s": 8 * num_rows * num_classes / world.size * embedding_dim / timing.median / 1e6,
                "total_MiB": total / 2**20,
                "extra_MiB": (total - kept) / 2**20,
                "sent_bytes": sent,
            }
        )
    return rows
