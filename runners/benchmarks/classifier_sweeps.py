"""What `classifier.py` measures: steps over N and B, memory, the largest N, and weak scaling."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from classifier_variants import VARIANTS, Problem, Running, gradient_error
from instance_ssl.classifier.matmul_rates import matmul_rate
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.training.classifier_cost import step_flops
from measure import Timing, peak_bytes, time_interleaved

Row = dict[str, Any]


def check_gradients(names: Sequence[str], world: Group) -> list[Row]:
    """Measures relative errors against float64, one row per variant.

    Raises:
        UserError: an unknown variant, or an error too large to be rounding; wrong results are not timed.
    """
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"--variants {unknown[0]}: give some of {', '.join(VARIANTS)}")
    rows = []
    for name in names:
        errors = gradient_error(VARIANTS[name], world)
        if max(errors.values()) > (2e-2 if any(word in name for word in ("bfloat16", "auto", "compiled")) else 2e-5):
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
    """Times a step of every variant in turns, then measures each alone for memory and traffic; one row per variant."""
    problem = Problem.draw(num_classes, num_rows, embedding_dim, num_hard_classes, world.device)
    running = {name: VARIANTS[name](problem, world) for name in names}
    times = time_interleaved({name: variant.step for name, variant in running.items()}, repeats, world)
    kept = {
        name: variant.weight.nbytes + variant.momentum().nbytes + problem.x_BD.nbytes
        for name, variant in running.items()
    }
    running.clear()
    first = Timing.of(times[names[0]]).median
    rate = matmul_rate(torch.bfloat16, world.device)
    flop = step_flops(num_rows, num_classes, embedding_dim) / world.size
    rows = []
    for name in names:
        timing = Timing.of(times[name])
        total, sent = measure_memory(name, problem, world)
        rows.append(
            {
                "variant": name,
                "N": num_classes,
                "B": num_rows,
                "T": world.size,
                "median_ms": timing.median,
                "quartiles_ms": f"{timing.low:.4g}-{timing.high:.4g}",
                "speed": first / timing.median,
                "share_of_bf16_rate": flop / timing.median / 1e6 / rate,
                "ns_per_class": timing.median * 1e6 / num_classes,
                "total_MiB": total / 2**20,
                "extra_MiB": (total - kept[name]) / 2**20,
                "sent_bytes": sent,
            }
        )
    return rows


def measure_memory(name: str, problem: Problem, world: Group) -> tuple[int, int]:
    """Peak bytes of W, momentum and two steps on this rank, and bytes it sends per step."""
    sent = 0

    def work() -> None:
        nonlocal sent
        running = VARIANTS[name](problem, world)
        running.step()
        before = _sent_bytes(running)
        running.step()
        sent = _sent_bytes(running) - before

    world.barrier()
    return peak_bytes(work, world.device), sent


def _sent_bytes(running: Running) -> int:
    return sum(sum(group.sent_bytes.values()) for group in running.groups)


def largest_problem(
    name: str, budget_bytes: int, num_rows: int, embedding_dim: int, num_hard_classes: int, world: Group
) -> Row:
    """Finds the largest N whose steps fit the budget on every rank: extrapolates from two sizes, then verifies.

    The row has the measured peak at that N and at 1.05 N, which exceeds the budget.
    """

    def peak(num_classes: int) -> int:
        problem = Problem.draw(num_classes, num_rows, embedding_dim, num_hard_classes, world.device)
        measured, _ = measure_memory(name, problem, world)
        slowest = world.all_reduce_max_(torch.tensor([measured], device=world.device))
        return int(slowest.item())

    small, large = 100_000 * world.size, 300_000 * world.size
    at_small, at_large = peak(small), peak(large)
    bytes_per_class = (at_large - at_small) / (large - small)
    num_classes = int((budget_bytes - at_large) / bytes_per_class) + large
    fitting = peak(num_classes)
    while fitting > budget_bytes:  # memory is not quite linear in N
        num_classes = int(num_classes * 0.99)
        fitting = peak(num_classes)
    beyond = peak(int(1.05 * num_classes))
    return {
        "variant": name,
        "T": world.size,
        "B": num_rows,
        "largest_N": num_classes,
        "peak_MiB": fitting / 2**20,
        "peak_at_1.05N_MiB": beyond / 2**20,
        "bytes_per_class": bytes_per_class * world.size,
    }


def weak_scaling(
    name: str,
    classes_per_rank: int,
    num_rows: int,
    embedding_dim: int,
    num_hard_classes: int,
    repeats: int,
    world: Group,
) -> list[Row]:
    """Times a step on the first 1, 2, 4 … ranks, with the same classes per rank and the same batch."""
    rows: list[Row] = []
    for size in sorted({2**power for power in range(world.size.bit_length())} | {world.size}):
        part = comm.first_ranks(world, size)
        if part is not None:
            problem = Problem.draw(classes_per_rank * size, num_rows, embedding_dim, num_hard_classes, world.device)
            running = VARIANTS[name](problem, part)
            timing = Timing.of(time_interleaved({name: running.step}, repeats, part)[name])
            row = {"variant": name, "T": size, "N": problem.num_classes, "B": num_rows, "median_ms": timing.median}
            rows.append({**row, "efficiency": rows[0]["median_ms"] / timing.median if rows else 1.0})
        world.barrier()
    return rows


def plot_steps(rows: Sequence[Row], path: Path) -> None:
    """Draws time and memory beyond W and momentum against N, one line per variant, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for column, label, axis in (("median_ms", "ms a step", axes[0]), ("extra_MiB", "MiB beyond W, momentum", axes[1])):
        for name in dict.fromkeys(row["variant"] for row in rows):
            own = sorted((row["N"], row[column]) for row in rows if row["variant"] == name)
            axis.plot(*zip(*own, strict=True), marker="o", markersize=4, label=name)
        axis.set(xscale="log", yscale="log", xlabel="classes N", ylabel=label)
        axis.grid(True, which="both", alpha=0.2)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
