"""Prints what a training would take on every rank, before anything is allocated: bytes, traffic, FLOPs, the largest N.

python runners/plan.py --config F --deepspeed_config F --world-size T [--num-instances N] [--gpu-memory-gib G]
    [--set key=value …]
"""

import argparse
from collections.abc import Sequence

from instance_ssl.run.console import ArgumentParser, exit_code_of
from instance_ssl.run.plan_request import add_plan_arguments, read_plan_request


def main(words: Sequence[str] | None = None) -> int:
    """Prints the plan and returns the process's exit code; `words` are the command line's, or None for its own."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_plan_arguments(parser)
    return exit_code_of(lambda: _plan(parser.parse_args(words)))


def _plan(arguments: argparse.Namespace) -> None:
    request = read_plan_request(arguments)
    from instance_ssl.stages.plan import print_plan  # late, for it imports torch

    print_plan(request, arguments.gpu_memory_gib)


if __name__ == "__main__":
    raise SystemExit(main())
