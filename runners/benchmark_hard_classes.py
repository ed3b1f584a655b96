"""Times the exact top-K of W Wᵀ against faiss and torch, in turns on equal threads; checks that the tables agree.

python runners/benchmark_hard_classes.py --num-classes 65536 131072 --threads 2 --repeats 3 --csv hard_classes.csv
"""

import argparse
import sys
from pathlib import Path

from instance_ssl.benchmarks.hard_classes import compare, describe, make_rows, write_csv
from instance_ssl.distributed import comm
from instance_ssl.errors import UserError


def main() -> int:
    """Runs the benchmark; exit code 2 where faiss is missing, 1 where a table is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--num-classes", type=int, nargs="+", default=[65_536, 131_072], help="N")
    parser.add_argument("--embedding-dim", type=int, default=128, help="D")
    parser.add_argument("--num-hard-classes", type=int, default=100, help="K")
    parser.add_argument("--clusters", type=int, default=0, help="centres around which the rows lie; 0: none")
    parser.add_argument("--block-mib", type=float, default=32, help="scratch memory of our search")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-torch", action="store_true", help="leave out torch.mm + torch.topk")
    parser.add_argument("--csv", type=Path, default=None, help="where every repeat is written")
    arguments = parser.parse_args()
    group = comm.initialize()
    timings = []
    try:
        for num_classes in arguments.num_classes:
            measured = compare(
                make_rows(num_classes, arguments.embedding_dim, arguments.clusters),
                arguments.num_hard_classes,
                group,
                repeats=arguments.repeats,
                threads=arguments.threads,
                block_bytes=int(arguments.block_mib * 2**20),
                with_torch=not arguments.no_torch,
            )
            print(describe(measured), flush=True)
            timings += measured
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        comm.finalize()
    if arguments.csv is not None:
        write_csv(arguments.csv, timings)
    return int(any(timing.wrong_rows for timing in timings))


if __name__ == "__main__":
    raise SystemExit(main())
