"""What the planner was asked: the command line and both files, checked before torch is imported."""

import argparse
from dataclasses import dataclass, replace

from instance_ssl.config.data import DataConfig
from instance_ssl.config.deepspeed import DeepSpeedFile, DeepSpeedSettings, read_ds_file
from instance_ssl.config.draft import Draft, load_draft
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.distributed import launched
from instance_ssl.errors import UserError
from instance_ssl.run import automatic
from instance_ssl.run.arguments import add_config_arguments, ds_path_of
from instance_ssl.run.checks import check_size
from instance_ssl.run.console import ArgumentParser, tell

_NUM_IMAGES = {"digits": 1437, "cifar10": 50_000, "cifar100": 50_000}


@dataclass(frozen=True)
class PlanRequest:
    """A training to plan.

    Attributes:
        num_instances: number of training images N.
        world_size: ranks to plan for.
        micro_batch_size: stands in for the JSON's where that is `auto`.
    """

    config: ExperimentConfig
    ds: DeepSpeedFile
    num_instances: int
    world_size: int
    micro_batch_size: int = 1

    def settings(self, world_size: int) -> DeepSpeedSettings:
        """Completes the DeepSpeed JSON for this many ranks; refuses ranks that cannot share the batch or the rows."""
        return self.ds.settings(
            global_batch_size=self.config.optimization.global_batch_size,
            max_grad_norm=self.config.optimization.max_grad_norm,
            world_size=world_size,
            optimizer=self.config.optimization.optimizer,
            micro_batch_size=self.micro_batch_size,
        )


def add_plan_arguments(parser: ArgumentParser, *, world_size: int | None = None) -> None:
    """Adds what the planner needs to know; `world_size` is the default, without which --world-size is required."""
    add_config_arguments(parser)
    ranks = {"required": True} if world_size is None else {"default": world_size}
    parser.add_argument("--world-size", type=int, metavar="T", help="ranks to plan for", **ranks)
    parser.add_argument("--num-instances", type=int, metavar="N", help="images (default: those of the config's data)")
    parser.add_argument("--gpu-memory-gib", type=float, default=32.0, metavar="G", help="of one rank (default: 32)")


def read_plan_request(arguments: argparse.Namespace) -> PlanRequest:
    """Reads the arguments of `add_plan_arguments`, and refuses (`UserError`) what a run would refuse.

    What the experiment and the JSON leave to `auto` is chosen as for GPUs of this memory, and printed.
    """
    if arguments.world_size < 1:
        raise UserError(f"--world-size {arguments.world_size}: give at least one rank")
    if arguments.gpu_memory_gib <= 0:
        raise UserError(f"--gpu-memory-gib {arguments.gpu_memory_gib}: give a positive number")
    draft, given = load_draft(arguments.config, arguments.set), arguments.num_instances
    num_instances = _count_images(draft.completed({}).data) if given is None else given
    ds, world_size = read_ds_file(ds_path_of(arguments, draft)), arguments.world_size
    config = _as_on_gpus(draft, num_instances, world_size, ds.micro_batch_size)
    request = PlanRequest(config, ds, num_instances, world_size)
    check_size(config, num_instances, request.settings(world_size).micro_batch_size, world_size, ds.path)
    if ds.micro_batch_size is None:
        import torch

        from instance_ssl.run.choosing import choose_micro_batch  # late, for it imports torch

        choice = choose_micro_batch(request, torch.device("cuda"), int(arguments.gpu_memory_gib * 2**30))
        tell(str(choice))
        request = replace(request, micro_batch_size=choice.value)
    return request


def _as_on_gpus(draft: Draft, num_instances: int, world_size: int, micro_batch_size: int | None) -> ExperimentConfig:
    """The experiment with the choices of a run on GPUs, except those that depend on the images' size or labels."""
    if not draft.auto:
        return draft.completed({})
    from instance_ssl.run.choosing import view_flops  # late, for it imports torch

    if "data.image_size" in draft.auto:
        raise UserError("data.image_size is auto, and no image is opened here: give --set data.image_size=224, say")
    facts = automatic.Facts(
        device=automatic.GPU,
        num_images=num_instances,
        short_side=0,
        class_size=None,
        world_size=world_size,
        cores=launched.cores_of_rank(),
        micro_batch_size=micro_batch_size,
        view_flops=view_flops,
    )
    return automatic.complete(draft, facts, tell)


def _count_images(data: DataConfig) -> int:
    """Returns N where it is known without looking at the images."""
    if data.limit_train is not None:
        return data.limit_train
    if data.kind not in _NUM_IMAGES:
        raise UserError(f"data.kind {data.kind} is not counted here: give the number of images with --num-instances")
    return _NUM_IMAGES[data.kind]
