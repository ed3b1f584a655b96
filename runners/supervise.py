"""Keeps a run going: checks the launch, passes signals on, starts again what has died; the last exit code is the run's.

python runners/supervise.py [--restarts R] deepspeed --hostfile hosts runners/pretrain.py --run-dir D …
python runners/supervise.py [--restarts R] torchrun --nproc-per-node 8 runners/pretrain.py --run-dir D …
"""

import argparse
import os

from instance_ssl.run.console import ArgumentParser, exit_code_of
from instance_ssl.run.launch import check_launch, take_apart
from instance_ssl.run.supervisor import Supervisor


def _parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=10, help="in a row, after failures (default: 10)")
    parser.add_argument("--pause-seconds", type=float, default=10.0, help="between a failure and the next start")
    parser.add_argument("--grace-seconds", type=float, default=300.0, help="from a signal until what is left is killed")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="deepspeed …", help="the whole command of the run")
    return parser.parse_args()


def _main() -> int:
    arguments = _parse_arguments()
    launch = take_apart(arguments.command)
    check_launch(launch, os.environ)
    supervisor = Supervisor(
        launch,
        restarts=arguments.restarts,
        pause_seconds=arguments.pause_seconds,
        grace_seconds=arguments.grace_seconds,
    )
    return supervisor.run()


if __name__ == "__main__":
    raise SystemExit(exit_code_of(_main))
