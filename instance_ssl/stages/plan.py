"""The planner: from the command line to a printed plan, and Table 1 and Figure 3. Starts no process group."""

import argparse
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from instance_ssl.classifier.footprint import ClassifierSize
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
from instance_ssl.training.memory_plan import LAYOUTS, EncoderCost, Layout, Plan, engine_size, measure_encoder
from instance_ssl.training.paper_tables import PAPER_GIB, Training, draw_figure_3, table_1

_CIFAR_IMAGES = 50_000
_PLANNED = torch.device("cuda")
_WORLD_SIZES = tuple(2**exponent for exponent in range(11))  # of the picture


def main(words: Sequence[str] | None = None) -> int:
    """Prints the plan and returns the process's exit code; `words` are the command line's, or None for its own."""
    return exit_code_of(lambda: _plan(_parse_arguments(words)))


def _parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--world-size", type=int, required=True, metavar="T", help="ranks to plan for")
    parser.add_argument("--num-instances", type=int, metavar="N", help="images (default: those of the config's data)")
    parser.add_argument("--gpu-memory-gib", type=float, default=PAPER_GIB, metavar="G", help="memory of one rank")
    parser.add_argument("--output", type=Path, help="directory for figure3.png")
    return parser.parse_args(words)


def _plan(arguments: argparse.Namespace) -> None:
    world_size, gib = arguments.world_size, arguments.gpu_memory_gib
    if world_size < 1:
        raise UserError(f"--world-size {world_size}: give at least one rank")
    if gib <= 0:
        raise UserError(f"--gpu-memory-gib {gib}: give a positive number")
    config = load_config(arguments.config, arguments.set)
    num_instances = count_images(config.data) if arguments.num_instances is None else arguments.num_instances
    ds = _settings(arguments, config, world_size)
    check_size(config, num_instances, ds.micro_batch_size, world_size, arguments.deepspeed_config)
    # The micro-batch is the JSON's, whatever the number of ranks: one measurement serves all of them.
    cost = measure_encoder(
        lambda: seeded_encoder(config, recompute_stages=ds.recompute_stages),
        image_size=config.data.image_size,
        num_views=ds.micro_batch_size * config.augmentation.num_views,
        autocast_dtype=ds.autocast_dtype,
    )
    training = _training(config, ds, cost, world_size, num_instances)
    tell(f"{describe_encoder(config)}, {cost.num_parameters / 1e6:.1f} M parameters")
    if (stem_cost := describe_stem_cost(config)) is not None:
        tell(stem_cost)
    batch = f"{ds.micro_batch_size} images x {ds.accumulation_steps} micro-batches x {world_size} ranks"
    tell(
        f"{num_instances:,} images; global batch {config.optimization.global_batch_size} = {batch}, "
        f"{config.augmentation.num_views} views each"
    )
    plans = {layout: training.plan(layout) for layout in LAYOUTS}
    _show([["MiB a rank", *LAYOUTS], *_memory_rows(plans)])
    limits = [f"{training.most_classes(layout, gib) / 1e6:,.1f} M" for layout in LAYOUTS]
    _show([[f"most classes in {gib:g} GiB", *limits]])
    _show(_step_rows(plans))
    tell(
        "Not counted: the CUDA context (about 0.5 GiB), workspaces of the libraries, gaps of the allocator. The dense\n"
        "layouts are not this code: two float32 copies of the logits, as DDP and as in the paper's own framework."
    )
    if training.is_the_papers:
        tell("\nTable 1 and Figure 3 (memory; the paper's times depend on its network and data loading, not on this)")
        _show(table_1(training, gib))
    if arguments.output is not None:
        path = arguments.output / "figure3.png"
        draw_figure_3(path, functools.partial(_training_at, arguments, config, cost), world_size, _WORLD_SIZES, gib)
        tell(f"picture: {path}")


def count_images(data: DataConfig) -> int:
    """N where it takes no look at every image.

    Raises:
        UserError: where it would.
    """
    if data.limit_train is not None:
        return data.limit_train
    if data.kind == "digits":
        return len(open_source("digits", "train", root=None, list_file=None, limit=None))
    if data.kind in ("cifar10", "cifar100"):
        return _CIFAR_IMAGES
    raise UserError(f"data.kind {data.kind} is not counted here: give the number of images with --num-instances")


def _settings(arguments: argparse.Namespace, config: ExperimentConfig, world_size: int) -> DeepSpeedSettings:
    return load_ds_config(
        arguments.deepspeed_config,
        global_batch_size=config.optimization.global_batch_size,
        max_grad_norm=config.optimization.max_grad_norm,
        world_size=world_size,
    )


def _training(
    config: ExperimentConfig, ds: DeepSpeedSettings, cost: EncoderCost, world_size: int, num_instances: int
) -> Training:
    classifier, group_size = config.classifier, ds.group_size(world_size)
    options = SoftmaxOptions(
        classifier.temperature,
        classifier.loss_form,
        ds.matmul_dtype,
        choose_block_bytes(ds.block_bytes, _PLANNED),
        kept_bytes=ds.kept_bytes,
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


def _training_at(
    arguments: argparse.Namespace, config: ExperimentConfig, cost: EncoderCost, world_size: int
) -> Training | None:
    try:
        return _training(config, _settings(arguments, config, world_size), cost, world_size, world_size)
    except UserError:  # this batch, or the JSON's group, cannot be divided over so many ranks
        return None


def _memory_rows(plans: Mapping[Layout, Plan]) -> list[list[str]]:
    """The parts that are always there, then each phase with its own, then the peak."""
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
    """Traffic and arithmetic of the layouts that this code has."""
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


def _show(rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: the first column to the left, figures to the right."""
    for first, *others in rows:
        tell(f"{first:<34}" + "".join(f"{cell:>19}" for cell in others))
    tell("")
