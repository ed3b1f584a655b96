"""Prints what a training would take on every rank, before anything is allocated: bytes, traffic, FLOPs, the largest N.

python runners/plan.py --config F --deepspeed_config F --world-size T [--num-instances N] [--gpu-memory-gib G]
    [--output D] [--set key=value …]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from instance_ssl.config.data import DataConfig
from instance_ssl.config.deepspeed import DeepSpeedSettings, load_ds_config
from instance_ssl.config.experiment import load_config
from instance_ssl.errors import UserError
from instance_ssl.run.arguments import add_config_arguments
from instance_ssl.run.checks import check_size
from instance_ssl.run.console import ArgumentParser, exit_code_of

_NUM_IMAGES = {"digits": 1437, "cifar10": 50_000, "cifar100": 50_000}


def main(words: Sequence[str] | None = None) -> int:
    """Prints the plan and returns the process's exit code; `words` are the command line's, or None for its own."""
    return exit_code_of(lambda: _plan(_parse_arguments(words)))


def _parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--world-size", type=int, required=True, metavar="T", help="ranks to plan for")
    parser.add_argument("--num-instances", type=int, metavar="N", help="images (default: those of the config's data)")
    parser.add_argument("--gpu-memory-gib", type=float, default=32.0, metavar="G", help="of a rank (default: 32)")
    parser.add_argument("--output", type=Path, help="directory for figure3.png")
    return parser.parse_args(words)


def _plan(arguments: argparse.Namespace) -> None:
    world_size, gib = arguments.world_size, arguments.gpu_memory_gib
    if world_size < 1:
        raise UserError(f"--world-size {world_size}: give at least one rank")
    if gib <= 0:
        raise UserError(f"--gpu-memory-gib {gib}: give a positive number")
    config = load_config(arguments.config, arguments.set)
    num_instances = _count_images(config.data) if arguments.num_instances is None else arguments.num_instances

    def settings_at(world_size: int) -> DeepSpeedSettings:
        return load_ds_config(
            arguments.deepspeed_config,
            global_batch_size=config.optimization.global_batch_size,
            max_grad_norm=config.optimization.max_grad_norm,
            world_size=world_size,
        )

    micro_batch_size = settings_at(world_size).micro_batch_size
    check_size(config, num_instances, micro_batch_size, world_size, arguments.deepspeed_config)
    from instance_ssl.stages.plan import print_plan  # late, for it imports torch

    print_plan(
        config, settings_at, world_size=world_size, num_instances=num_instances, gib=gib, output=arguments.output
    )


def _count_images(data: DataConfig) -> int:
    """Returns N where it is known without a look at the images."""
    if data.limit_train is not None:
        return data.limit_train
    if data.kind not in _NUM_IMAGES:
        raise UserError(f"data.kind {data.kind} is not counted here: give the number of images with --num-instances")
    return _NUM_IMAGES[data.kind]


if __name__ == "__main__":
    raise SystemExit(main())
