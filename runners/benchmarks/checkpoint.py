"""Times saving and loading a large classifier's checkpoint beside torch.save and torch.load of the same tensors.

deepspeed --num_gpus T runners/benchmarks/checkpoint.py --num-classes 1000000 --directory DIR
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from instance_ssl.run.console import ArgumentParser, tell
from instance_ssl.run.main import run_measurement
from instance_ssl.run.shutdown import leave

if TYPE_CHECKING:
    from instance_ssl.distributed.comm import Group


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num-classes", type=int, default=1_000_000, metavar="N", help="over all ranks")
    parser.add_argument("--embedding-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="of each operation, in turns")
    parser.add_argument("--directory", type=Path, default=Path("runs/benchmark_checkpoint"), help="new; removed after")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    return parser.parse_args()


def _run(arguments: argparse.Namespace, world: "Group") -> None:
    from checkpoint_times import measure_checkpoints  # late, for it imports torch
    from measure import describe_machine, format_table

    if world.rank == 0:
        arguments.directory.mkdir(parents=True)
    world.barrier()
    shape = arguments.num_classes, arguments.embedding_dim
    rows = measure_checkpoints(arguments.directory, *shape, arguments.repeats, world)
    if world.rank == 0:
        tell(f"{describe_machine(world)}; D = {arguments.embedding_dim}\n\n{format_table(rows)}")


if __name__ == "__main__":
    leave(run_measurement(_arguments, _run))
