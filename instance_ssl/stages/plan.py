"""Plans a training: a printed table of memory, traffic and FLOPs. Starts no process group."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from instance_ssl.classifier.kernel_selection import choose_block_bytes
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.choices import LAYOUTS, Layout
from instance_ssl.run.build import describe_encoder, describe_stem_cost, seeded_encoder
from instance_ssl.run.console import tell
from instance_ssl.run.plan_request import PlanRequest
from instance_ssl.training.classifier_cost import ClassifierSize
from instance_ssl.training.memory_plan import EncoderCost, EngineSize, Plan, engine_size, measure_encoder, plan_layout

_PLANNED = torch.device("cuda")


@dataclass(frozen=True)
class Training:
    """A training on a given number of ranks, as far as its memory depends on it."""

    cost: EncoderCost
    engine: EngineSize
    classifier: ClassifierSize

    def plan(self, layout: Layout) -> Plan:
        """Plans one layout."""
        return plan_layout(layout, self.cost, self.engine, self.classifier)

    def peak_gib(self, layout: Layout, num_instances: int) -> float:
        """Peak memory of one rank in GiB, for another number of images."""
        size = replace(self.classifier, num_instances=num_instances)
        return replace(self, classifier=size).plan(layout).peak / 2**30

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
    """Plans one configuration on any number of ranks; the encoder is measured once, on fake tensors."""

    def __init__(self, request: PlanRequest) -> None:
        self._request = request
        config, ds = request.config, request.settings(request.world_size)
        # The micro-batch is the JSON's, whatever the number of ranks: one measurement serves all of them.
        self.cost = measure_encoder(
            lambda: seeded_encoder(config, recompute_stages=ds.recompute_stages),
            image_size=config.data.image_size,
            num_views=ds.micro_batch_size * config.augmentation.num_views,
            autocast_dtype=ds.autocast_dtype,
            optimizer=config.optimization.optimizer,
        )

    def training(self, world_size: int) -> Training:
        """Returns the training on this many ranks.

        Raises:
            UserError: the batch, or the JSON's group size, cannot be divided over them.
        """
        config, ds = self._request.config, self._request.settings(world_size)
        classifier, group_size = config.classifier, ds.group_size(world_size)
        block_bytes = choose_block_bytes(ds.block_bytes, _PLANNED)
        size = ClassifierSize(
            num_instances=self._request.num_instances,
            embedding_dim=config.model.embedding_dim,
            group_size=group_size,
            num_replicas=world_size // group_size,
            rows_per_rank=ds.micro_batch_size * config.augmentation.num_views,
            accumulation_steps=ds.accumulation_steps,
            num_hard_classes=classifier.num_hard_classes if classifier.smoothing_factor > 0 else 0,
            options=SoftmaxOptions(classifier.temperature, classifier.loss_form, ds.matmul_dtype, block_bytes),
            row_dtype=ds.row_dtype,
            momentum_dtype=ds.momentum_dtype,
            num_sampled_classes=None if classifier.sampling == "full" else classifier.num_sampled_classes,
            device=_PLANNED,
        )
        steps, dtype = ds.accumulation_steps, ds.autocast_dtype
        engine = engine_size(ds.engine, world_size=world_size, accumulation_steps=steps, autocast_dtype=dtype)
        return Training(self.cost, engine, size)


def print_plan(request: PlanRequest) -> None:
    """Prints what a training takes on every rank."""
    config, world_size, gib = request.config, request.world_size, request.gpu_memory_gib
    planner, ds = Planner(request), request.settings(world_size)
    training = planner.training(world_size)
    tell(f"{describe_encoder(config)}, {planner.cost.num_parameters / 1e6:.1f} M parameters")
    if (stem_cost := describe_stem_cost(config)) is not None:
        tell(stem_cost)
    batch = f"{ds.micro_batch_size} images x {ds.accumulation_steps} micro-batches x {world_size} ranks"
    tell(
        f"{request.num_instances:,} images; global batch {config.optimization.global_batch_size} = {batch}, "
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
