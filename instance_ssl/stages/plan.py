"""Plans a training: from the command line to a printed table of memory, traffic and FLOPs. Starts no process group."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from instance_ssl.classifier.kernel_selection import choose_block_bytes
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.deepspeed import DeepSpeedSettings, load_ds_config
from instance_ssl.config.experiment import DataConfig, ExperimentConfig, load_config
from instance_ssl.data.datasets import open_source
from instance_ssl.errors import UserError
from instance_ssl.run.arguments import add_config_arguments
from instance_ssl.run.build import describe_encoder, describe_stem_cost, seeded_encoder
from instance_ssl.run.checks import check_size
from instance_ssl.run.console import ArgumentParser, exit_code_of, tell
from instance_ssl.training import engine
from instance_ssl.training.classifier_cost import ClassifierSize
from instance_ssl.training.memory_plan import (
    LAYOUTS,
    EncoderCost,
    EngineSize,
    Layout,
    Plan,
    engine_size,
    measure_encoder,
    plan_layout,
)

_CIFAR_IMAGES = 50_000
_PLANNED = torch.device("cuda")


@dataclass(frozen=True)
class Training:
    """A training on a given number of ranks, as far as its memory depends on it."""

    cost: EncoderCost
    engine: EngineSize
    classifier: ClassifierSize

    def plan(self, layout: Layout, num_instances: int | None = None) -> Plan:
        """Plans one layout, for the training's own number of images or another."""
        count = self.classifier.num_instances if num_instances is None else num_instances
        return plan_layout(layout, self.cost, self.engine, replace(self.classifier, num_instances=count))

    def peak_gib(self, layout: Layout, num_instances: int) -> float:
        """Peak memory of one rank in GiB."""
        return self.plan(layout, num_instances).peak / 2**30

    def most_classes(self, layout: Layout, memory_gib: float) -> int:
        """Largest N that fits into this memory; 0 if not even one class a rank does."""
        low, high = 0, self.classifier.group_size
        while self.peak_gib(layout, high) <= memory_gib:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak_gib(layout, middle) <= memory_gib else (low, middle)
        return low


class Planner:
    """Plans one configuration on any number of ranks; the encoder is measured once, on fake tensors.

    Args:
        arguments: the command line, as `add_arguments` defines it.
        world_size: a number of ranks on which the configuration is checked as a run would check it.

    Raises:
        UserError: a mistake in the files, or a batch that these ranks cannot divide.
    """

    def __init__(self, arguments: argparse.Namespace, world_size: int) -> None:
        if world_size < 1:
            raise UserError(f"--world-size {world_size}: give at least one rank")
        if arguments.gpu_memory_gib <= 0:
            raise UserError(f"--gpu-memory-gib {arguments.gpu_memory_gib}: give a positive number")
        self._arguments = arguments
        self.config = load_config(arguments.config, arguments.set)
        given = arguments.num_instances
        self.num_instances = count_images(self.config.data) if given is None else given
        ds = self.settings(world_size)
        check_size(self.config, self.num_instances, ds.micro_batch_size, world_size, arguments.deepspeed_config)
        engine.check_zero_section(ds)
        # The micro-batch is the JSON's, whatever the number of ranks: one measurement serves all of them.
        self.cost = measure_encoder(
            lambda: seeded_encoder(self.config, recompute_stages=ds.recompute_stages),
            image_size=self.config.data.image_size,
            num_views=ds.micro_batch_size * self.config.augmentation.num_views,
            autocast_dtype=ds.autocast_dtype,
        )

    def settings(self, world_size: int) -> DeepSpeedSettings:
        """The DeepSpeed JSON on this many ranks.

        Raises:
            UserError: the batch, or the JSON's group size, cannot be divided over them.
        """
        return load_ds_config(
            self._arguments.deepspeed_config,
            global_batch_size=self.config.optimization.global_batch_size,
            max_grad_norm=self.config.optimization.max_grad_norm,
            world_size=world_size,
        )

    def training(self, world_size: int) -> Training:
        """The training on this many ranks; raises UserError as `settings` does."""
        return _training(self.config, self.settings(world_size), self.cost, world_size, self.num_instances)


def main(words: Sequence[str] | None = None) -> int:
    """Prints the plan and returns the process's exit code; `words` are the command line's, or None for its own."""
    return exit_code_of(lambda: _plan(_parse_arguments(words)))


def add_arguments(parser: ArgumentParser, *, world_size: int | None = None) -> None:
    """Adds what the planner needs to know; `world_size` is the default, without which --world-size is required."""
    add_config_arguments(parser)
    ranks = {"required": True} if world_size is None else {"default": world_size}
    parser.add_argument("--world-size", type=int, metavar="T", help="ranks to plan for", **ranks)
    parser.add_argument("--num-instances", type=int, metavar="N", help="images (default: those of the config's data)")
    parser.add_argument("--gpu-memory-gib", type=float, default=32.0, metavar="G", help="memory of one rank")


def _parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser)
    return parser.parse_args(words)


def _plan(arguments: argparse.Namespace) -> None:
    world_size, gib = arguments.world_size, arguments.gpu_memory_gib
    planner = Planner(arguments, world_size)
    config, ds, training = planner.config, planner.settings(world_size), planner.training(world_size)
    tell(f"{describe_encoder(config)}, {planner.cost.num_parameters / 1e6:.1f} M parameters")
    if (stem_cost := describe_stem_cost(config)) is not None:
        tell(stem_cost)
    batch = f"{ds.micro_batch_size} images x {ds.accumulation_steps} micro-batches x {world_size} ranks"
    tell(
        f"{planner.num_instances:,} images; global batch {config.optimization.global_batch_size} = {batch}, "
        f"{config.augmentation.num_views} views each"
    )
    plans = {layout: training.plan(layout) for layout in LAYOUTS}
    show([["MiB a rank", *LAYOUTS], *_memory_rows(plans)])
    limits = [f"{training.most_classes(layout, gib) / 1e6:,.1f} M" for layout in LAYOUTS]
    show([[f"most classes in {gib:g} GiB", *limits]])
    show(_step_rows(plans))
    tell(
        "Not counted: the CUDA context (about 0.5 GiB), library workspaces, allocator fragmentation. The dense\n"
        "layouts are not this code: two float32 copies of the logits, as DDP and the paper's own framework hold them."
    )


def count_images(data: DataConfig) -> int:
    """Number of training images N, where that needs no look at every file.

    Raises:
        UserError: for the kinds of data that would have to be opened.
    """
    if data.limit_train is not None:
        return data.limit_train
    if data.kind == "digits":
        return len(open_source("digits", "train", root=None, list_file=None, limit=None))
    if data.kind in ("cifar10", "cifar100"):
        return _CIFAR_IMAGES
    raise UserError(f"data.kind {data.kind} is not counted here: give the number of images with --num-instances")


def _training(
    config: ExperimentConfig, ds: DeepSpeedSettings, cost: EncoderCost, world_size: int, num_instances: int
) -> Training:
    classifier, group_size = config.classifier, ds.group_size(world_size)
    options = SoftmaxOptions(
        classifier.temperature,
        classifier.loss_form,
        ds.matmul_dtype,
        choose_block_bytes(ds.block_bytes, _PLANNED),
    )
    size = ClassifierSize(
        num_instances=num_instances,
        embedding_dim=config.model.embedding_dim,
        group_size=group_size,
        num_replicas=world_size // group_size,
        rows_per_rank=ds.micro_batch_size * config.augmentation.num_views,
        accumulation_steps=ds.accumulation_steps,
        num_hard_classes=classifier.num_hard_classes if classifier.smoothing_factor > 0 else 0,
        options=options,
        row_dtype=ds.row_dtype,
        momentum_dtype=ds.momentum_dtype,
        num_sampled_classes=None if classifier.sampling == "full" else classifier.num_sampled_classes,
        device=_PLANNED,
    )
    around = engine_size(
        ds.engine,
        world_size=world_size,
        accumulation_steps=ds.accumulation_steps,
        autocast_dtype=ds.autocast_dtype,
    )
    return Training(cost, around, size)


def _memory_rows(plans: Mapping[Layout, Plan]) -> list[list[str]]:
    """Resident parts, then each phase with its parts, then the peak."""
    rows = _part_rows([plan.resident for plan in plans.values()])
    for phase in _names(plan.phases for plan in plans.values()):
        phases = [plan.phases.get(phase, {}) for plan in plans.values()]
        rows.append([f"in the {phase} phase", *(_mib(sum(parts.values())) for parts in phases)])
        rows += _part_rows(phases, "  ")
    rows.append(["peak", *(_mib(plan.peak) for plan in plans.values())])
    rows.append(["  in the phase", *(plan.largest_phase for plan in plans.values())])
    return rows


def _part_rows(columns: Sequence[Mapping[str, int]], indent: str = "") -> list[list[str]]:
    rows = [[indent + part, *(_mib(parts.get(part, 0)) for parts in columns)] for part in _names(columns)]
    return [row for row in rows if set(row[1:]) != {"-"}]


def _step_rows(plans: Mapping[Layout, Plan]) -> list[list[str]]:
    """Traffic and FLOPs of a step, for the layouts that this code has."""
    ours = {layout: plan for layout, plan in plans.items() if plan.sent}
    rows = [["a step, of one rank", *ours]]
    for part in ("encoder", "classifier"):
        for collective in _names(plan.sent[part] for plan in ours.values()):
            values = [plan.sent[part][collective] / 1e6 for plan in ours.values()]
            rows.append([f"{part}: {collective}, MB sent", *(f"{value:,.2f}" for value in values)])
    for part in ("encoder", "classifier"):
        rows.append([f"{part}: TFLOP", *(f"{plan.flops[part] / 1e12:,.3f}" for plan in ours.values())])
    return rows


def _names(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    """All keys, in order of first appearance."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _mib(value: int) -> str:
    return "-" if value == 0 else f"{value / 2**20:,.1f}"


def show(rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, its first column left-aligned and the others right-aligned."""
    for first, *others in rows:
        tell(f"{first:<34}" + "".join(f"{cell:>19}" for cell in others))
    tell("")
