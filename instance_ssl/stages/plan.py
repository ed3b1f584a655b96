"""Plans a training: a printed table of memory, traffic and FLOPs. Starts no process group."""

from collections.abc import Iterable, Mapping, Sequence

from instance_ssl.config.choices import LAYOUTS, Layout
from instance_ssl.run.build import describe_encoder, describe_stem_cost
from instance_ssl.run.console import tell
from instance_ssl.run.plan_request import PlanRequest
from instance_ssl.run.planner import Planner
from instance_ssl.training.memory_plan import Plan


def print_plan(request: PlanRequest, gib: float) -> None:
    """Prints what a training takes on every rank, and the largest N that fits into `gib` of memory."""
    config, world_size = request.config, request.world_size
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
