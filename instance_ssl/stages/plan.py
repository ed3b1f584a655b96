"""The planner: prints what a training takes on every rank, and Table 1 and Figure 3. Starts no process group."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from instance_ssl.classifier.footprint import ClassifierSize
from instance_ssl.classifier.kernel_selection import choose_block_bytes
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.deepspeed import DeepSpeedSettings
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.errors import UserError
from instance_ssl.run.build import describe_encoder, describe_stem_cost, seeded_encoder
from instance_ssl.run.console import tell
from instance_ssl.training.memory_plan import LAYOUTS, EncoderCost, Layout, Plan, engine_size, measure_encoder
from instance_ssl.training.paper_tables import Training, draw_figure_3, table_1

_PLANNED = torch.device("cuda")
_WORLD_SIZES = tuple(2**exponent for exponent in range(11))  # of the picture


def print_plan(
    config: ExperimentConfig,
    settings_at: Callable[[int], DeepSpeedSettings],
    *,
    world_size: int,
    num_instances: int,
    gib: float,
    output: Path | None,
) -> None:
    """Prints what a training takes on every rank.

    Args:
        settings_at: world size → the resolved DeepSpeed JSON.
        num_instances: N.
        gib: memory of one rank, for the largest N.
        output: directory for figure3.png; None: no picture.

    Raises:
        UserError: where the picture cannot be drawn.
    """
    ds = settings_at(world_size)
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
    if output is not None:
        path = output / "figure3.png"
        draw_figure_3(path, functools.partial(_training_at, settings_at, config, cost), world_size, _WORLD_SIZES, gib)
        tell(f"picture: {path}")


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
    settings_at: Callable[[int], DeepSpeedSettings], config: ExperimentConfig, cost: EncoderCost, world_size: int
) -> Training | None:
    try:
        return _training(config, settings_at(world_size), cost, world_size, world_size)
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
