"""Table 1 and Figure 3 of the paper, from the planner: memory per rank and the most classes that fit, by layout.

Memory only: Table 1's times depend on the authors' network, data loading and kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from instance_ssl.config.choices import LAYOUTS, Layout

if TYPE_CHECKING:
    from instance_ssl.run.planner import Training

# Images, and Table 1's GB a GPU of DDP and DHP on 64 V100; None: out of memory.
TABLE_1: dict[str, tuple[int, dict[Layout, float | None]]] = {
    "ImageNet-1K": (1_281_167, {"replicated, dense": 15.6, "sharded, dense": 9.18}),
    "ImageNet-21K": (14_197_122, {"replicated, dense": None, "sharded, dense": 21.51}),
}
# Figure 3 and its text: the most classes in 32 GB.
MOST_CLASSES: dict[Layout, int] = {"replicated, dense": 4_700_000, "sharded, dense": 30_000_000}
PAPER_RANKS, PAPER_BATCH, PAPER_GIB = 64, 4096, 32.0

_FIRST_CLASSES, _LAST_CLASSES, _POINTS = 10_000, 100_000_000, 60
_COLOURS: dict[Layout, str] = {
    "sharded": "#1a9850",
    "replicated": "#4575b4",
    "sharded, dense": "#f46d43",
    "replicated, dense": "#a50026",
}
_NAMES: dict[Layout, str] = {
    "sharded": "this code, sharded",
    "replicated": "this code, replicated",
    "sharded, dense": "dense logits, sharded (the paper's DHP)",
    "replicated, dense": "dense logits, replicated (DDP)",
}


def is_the_papers(training: "Training") -> bool:
    """Whether this is Table 1's and Figure 3's setting: 64 ranks, a batch of 4096 images in two views."""
    rows = training.classifier.rows_per_rank * training.engine.world_size * training.engine.accumulation_steps
    return training.engine.world_size == PAPER_RANKS and rows == 2 * PAPER_BATCH


def table_1(training: "Training", memory_gib: float) -> list[list[str]]:
    """Table 1's memory and Figure 3's limits as rows of text, planned and published (blank if the paper has none)."""
    rows = [["GiB a rank", *LAYOUTS]]
    for name, (num_instances, published) in TABLE_1.items():
        cells = [_gib(training.peak_gib(layout, num_instances), memory_gib) for layout in LAYOUTS]
        rows.append([f"{name}, {num_instances / 1e6:.2f} M", *cells])
        rows.append(["  the paper's GB", *(_published(published, layout) for layout in LAYOUTS)])
    limits = [f"{training.most_classes(layout, memory_gib) / 1e6:.1f} M" for layout in LAYOUTS]
    rows.append([f"most classes in {memory_gib:g} GiB", *limits])
    paper = [f"{MOST_CLASSES[layout] / 1e6:.1f} M" if layout in MOST_CLASSES else "" for layout in LAYOUTS]
    rows.append(["  the paper's, in 32 GB", *paper])
    return rows


def _gib(value: float, limit: float) -> str:
    return f"{value:.2f}" if value <= limit else f"OOM ({value:.0f})"


def _published(figures: Mapping[Layout, float | None], layout: Layout) -> str:
    if layout not in figures:
        return ""
    value = figures[layout]
    return "OOM" if value is None else f"{value:g}"


def draw_figure_3(
    path: Path, training_at: "Callable[[int], Training | None]", ranks: int, world_sizes: Sequence[int], gib: float
) -> None:
    """Draws GiB per rank against N on `ranks` ranks, and the most classes in `gib` GiB against the number of ranks.

    Args:
        path: the PNG to write.
        training_at: the training on a number of ranks; None where the batch cannot be divided over them.
        world_sizes: numbers of ranks in the second panel.
    """
    from matplotlib.figure import Figure

    training = training_at(ranks)
    assert training is not None  # the caller has checked this number of ranks
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    memory, limit = figure.subplots(1, 2)
    ratio = (_LAST_CLASSES / _FIRST_CLASSES) ** (1 / (_POINTS - 1))
    counts = [round(_FIRST_CLASSES * ratio**point) for point in range(_POINTS)]
    for layout in LAYOUTS:
        style = {"color": _COLOURS[layout], "label": _NAMES[layout]}
        memory.plot(counts, [training.peak_gib(layout, count) for count in counts], **style)
        at = [(size, found.most_classes(layout, gib)) for size in world_sizes if (found := training_at(size))]
        limit.plot([size for size, _ in at], [count for _, count in at], marker="o", markersize=4, **style)
    memory.axhline(gib, color="#777777", linestyle="--", linewidth=1)
    if is_the_papers(training):
        _mark_paper(memory, limit)
    memory.set(xscale="log", xlabel="classes N", ylabel="GiB a rank", ylim=(0, 1.25 * gib))
    memory.set_title(f"Memory on {ranks} rank{'s' if ranks > 1 else ''}")
    limit.set(xscale="log", yscale="log", xlabel="ranks", ylabel="classes N")
    sizes = [size for size in world_sizes if training_at(size)]
    limit.set_xticks(sizes, [str(size) for size in sizes])
    limit.minorticks_off()
    limit.set_title(f"Most classes in {gib:g} GiB a rank")
    for axes in (memory, limit):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    limit.legend(*memory.get_legend_handles_labels(), fontsize=8, loc="upper left", framealpha=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _mark_paper(memory: object, limit: object) -> None:
    """Draws the paper's measurements as crosses."""
    for axes, points in ((memory, _paper_memory()), (limit, _paper_limits())):
        for layout, x, y in points:
            axes.plot(x, y, marker="x", markersize=9, markeredgewidth=2, color=_COLOURS[layout], linestyle="none")  # type: ignore[attr-defined]
    memory.plot([], [], "kx", label="the paper's measurements")  # type: ignore[attr-defined]


def _paper_memory() -> list[tuple[Layout, float, float]]:
    measured = [
        (layout, float(count), value)
        for count, published in TABLE_1.values()
        for layout, value in published.items()
        if value is not None
    ]
    return measured + [(layout, float(count), PAPER_GIB) for layout, count in MOST_CLASSES.items()]


def _paper_limits() -> list[tuple[Layout, float, float]]:
    return [(layout, float(PAPER_RANKS), float(count)) for layout, count in MOST_CLASSES.items()]
