"""Times a step of the classifier and measures its peak memory, beside plain PyTorch.

deepspeed --num_gpus T runners/benchmarks/classifier.py --num-classes 65536 262144 --batch 256 --output DIR
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instance_ssl.run.console import ArgumentParser, tell
from instance_ssl.run.main import run_measurement
from instance_ssl.run.shutdown import leave

if TYPE_CHECKING:
    from instance_ssl.distributed.comm import Group

_DEFAULT = ["replicated-dense", "sharded-dense", "streamed", "streamed-bfloat16"]


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="V",
        default=_DEFAULT,
        help="the first is the reference; an unknown one lists all",
    )
    parser.add_argument("--num-classes", type=int, nargs="+", default=[65_536], metavar="N", help="over all ranks")
    parser.add_argument("--batch", type=int, nargs="+", default=[256], metavar="B", help="rows of the global batch")
    parser.add_argument("--embedding-dim", type=int, default=128)
    parser.add_argument("--num-hard-classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=11, help="steps of each variant, interleaved")
    parser.add_argument("--memory-budget-gib", type=float, help="instead: find the largest N whose step fits")
    parser.add_argument("--weak-scaling", action="store_true", help="instead: time 1, 2, 4 … ranks with N classes each")
    parser.add_argument("--output", type=Path, help="directory for steps.csv and steps.png")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    return parser.parse_args()


def _measure(arguments: argparse.Namespace, world: "Group") -> list[dict[str, Any]]:
    import classifier_sweeps as sweeps

    shape = (arguments.embedding_dim, arguments.num_hard_classes)
    if arguments.memory_budget_gib is not None:
        budget = int(arguments.memory_budget_gib * 2**30)
        cases = [(v, b) for b in arguments.batch for v in arguments.variants]
        return [sweeps.largest_problem(v, budget, b, *shape, world) for v, b in cases]
    sizes = [(n, b) for b in arguments.batch for n in arguments.num_classes]
    if arguments.weak_scaling:
        return [
            row
            for n, b in sizes
            for v in arguments.variants
            for row in sweeps.weak_scaling(v, n, b, *shape, arguments.repeats, world)
        ]
    steps = (sweeps.measure_steps(arguments.variants, n, b, *shape, arguments.repeats, world) for n, b in sizes)
    return [row for rows in steps for row in rows]


def _run(arguments: argparse.Namespace, world: "Group") -> None:
    import classifier_sweeps as sweeps  # late, for it imports torch
    from measure import describe_machine, format_table, write_csv

    errors = sweeps.check_gradients(arguments.variants, world)
    rows = _measure(arguments, world)
    if world.rank > 0:
        return
    tell(f"{describe_machine(world)}; D = {arguments.embedding_dim}, K = {arguments.num_hard_classes}")
    tell("\nrelative errors against float64, checked first\n" + format_table(errors))
    tell("\n" + format_table(rows))
    if arguments.output is not None:
        write_csv(arguments.output / "steps.csv", rows)
        if not arguments.weak_scaling and arguments.memory_budget_gib is None:
            sweeps.plot_steps(rows, arguments.output / "steps.png")


if __name__ == "__main__":
    leave(run_measurement(_arguments, _run))
