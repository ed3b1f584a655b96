"""What the planner was asked: the command line and both files, checked before torch is imported."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from instance_ssl.config.data import DataConfig
from instance_ssl.config.deepspeed import DeepSpeedSettings, load_ds_config
from instance_ssl.config.experiment import ExperimentConfig, load_config
from instance_ssl.errors import UserError
from instance_ssl.run.arguments import add_config_arguments
from instance_ssl.run.checks import check_size
from instance_ssl.run.console import ArgumentParser

_NUM_IMAGES = {"digits": 1437, "cifar10": 50_000, "cifar100": 50_000}


@dataclass(frozen=True)
class PlanRequest:
    """A training to plan.

    Attributes:
        num_instances: number of training images N.
        world_size: ranks to plan for.
        gpu_memory_gib: memory of one rank, for the largest N that fits.
    """

    config: ExperimentConfig
    ds_path: Path
    num_instances: int
    world_size: int
    gpu_memory_gib: float

    def settings(self, world_size: int) -> DeepSpeedSettings:
        """Reads the DeepSpeed JSON for this many ranks, and refuses ranks that cannot share the batch or the rows."""
        return load_ds_config(
            self.ds_path,
            global_batch_size=self.config.optimization.global_batch_size,
            max_grad_norm=self.config.optimization.max_grad_norm,
            world_size=world_size,
            optimizer=self.config.optimization.optimizer,
        )


def add_plan_arguments(parser: ArgumentParser, *, world_size: int | None = None) -> None:
    """Adds what the planner needs to know; `world_size` is the default, without which --world-size is required."""
    add_config_arguments(parser)
    ranks = {"required": True} if world_size is None else {"default": world_size}
    parser.add_argument("--world-size", type=int, metavar="T", help="ranks to plan for", **ranks)
    parser.add_argument("--num-instances", type=int, metavar="N", help="images (default: those of the config's data)")
    parser.add_argument("--gpu-memory-gib", type=float, default=32.0, metavar="G", help="of one rank (default: 32)")


def read_plan_request(arguments: argparse.Namespace) -> PlanRequest:
    """Reads the arguments of `add_plan_arguments`, and refuses (`UserError`) what a run would refuse."""
    if arguments.world_size < 1:
        raise UserError(f"--world-size {arguments.world_size}: give at least one rank")
    if arguments.gpu_memory_gib <= 0:
        raise UserError(f"--gpu-memory-gib {arguments.gpu_memory_gib}: give a positive number")
    config, given = load_config(arguments.config, arguments.set), arguments.num_instances
    num_instances = _count_images(config.data) if given is None else given
    ds_path, world_size = arguments.deepspeed_config, arguments.world_size
    request = PlanRequest(config, ds_path, num_instances, world_size, arguments.gpu_memory_gib)
    check_size(config, num_instances, request.settings(world_size).micro_batch_size, world_size, ds_path)
    return request


def _count_images(data: DataConfig) -> int:
    """Returns N where it is known without looking at the images."""
    if data.limit_train is not None:
        return data.limit_train
    if data.kind not in _NUM_IMAGES:
        raise UserError(f"data.kind {data.kind} is not counted here: give the number of images with --num-instances")
    return _NUM_IMAGES[data.kind]
