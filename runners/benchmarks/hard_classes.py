"""Times the exact top-K of W Wᵀ beside faiss and torch, in turns on equal threads, and checks that the tables agree.

OMP_NUM_THREADS=2 python runners/benchmarks/hard_classes.py --num-classes 65536 131072 --output DIR
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from instance_ssl.errors import UserError
from instance_ssl.run.console import ArgumentParser, tell
from instance_ssl.run.main import run_measurement
from instance_ssl.run.shutdown import leave

if TYPE_CHECKING:
    from instance_ssl.distributed.comm import Group


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num-classes", type=int, nargs="+", default=[65_536, 131_072], metavar="N")
    parser.add_argument("--embedding-dim", type=int, default=128)
    parser.add_argument("--num-hard-classes", type=int, default=100)
    parser.add_argument("--clusters", type=int, default=0, help="number of centres of the rows; 0: none")
    parser.add_argument("--block-mib", type=float, default=32, help="workspace of our search")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-torch", action="store_true", help="skip torch.mm + torch.topk")
    parser.add_argument("--output", type=Path, help="directory for hard_classes.csv")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    return parser.parse_args()


def _run(arguments: argparse.Namespace, world: "Group") -> None:
    from measure import describe_machine, format_table, write_csv  # late, for it imports torch
    from search_times import compare, make_rows

    rows = []
    for num_classes in arguments.num_classes:
        rows += compare(
            make_rows(num_classes, arguments.embedding_dim, arguments.clusters),
            arguments.num_hard_classes,
            world,
            repeats=arguments.repeats,
            block_bytes=int(arguments.block_mib * 2**20),
            with_torch=not arguments.no_torch,
        )
    tell(f"{describe_machine(world)}; D = {arguments.embedding_dim}, clusters {arguments.clusters}")
    tell("\n" + format_table(rows))
    if arguments.output is not None:
        write_csv(arguments.output / "hard_classes.csv", rows)
    if any(row["wrong_rows"] for row in rows):
        raise UserError("a table is wrong, beyond what ties explain")


if __name__ == "__main__":
    leave(run_measurement(_arguments, _run))
