"""Draws an ablation: curves over epochs if there are several lengths, else points; bars show the spread over seeds."""

from pathlib import Path
from typing import Any

from settings import Ablation, Row
from table import Results, Values

_COLOURS = ("#2a6f97", "#e9a03b", "#4a9c5d", "#b5485b", "#7b5ea7", "#5c5c5c", "#3fb5b5", "#b58a3f")


def draw(path: Path, ablation: Ablation, results: Results) -> None:
    """Writes a PNG with a row of panels per group."""
    from matplotlib.figure import Figure  # late: it takes a second

    groups = list(dict.fromkeys(row.group for row in results))
    width, height = 4.5 * len(ablation.drawn), 3.2 * len(groups)
    picture = Figure(figsize=(width, height), layout="constrained")
    panels = picture.subplots(len(groups), len(ablation.drawn), squeeze=False)
    for line, group in zip(panels, groups, strict=True):
        rows = [row for row in results if row.group == group]
        curves = len({row.epochs for row in rows}) > 1
        for axes, figure in zip(line, ablation.drawn, strict=True):
            values = {row: results[row][figure] for row in rows if results[row][figure].mean is not None}
            (_draw_curves if curves else _draw_points)(axes, values)
            axes.set_title(f"{group}: {figure}" if group else figure, fontsize=10)
            axes.grid(axis="y" if curves else "x", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=110)


def _draw_curves(axes: Any, values: dict[Row, Values]) -> None:
    for place, name in enumerate(dict.fromkeys(row.variant for row in values)):
        points = [(row.epochs or 0, figures) for row, figures in values.items() if row.variant == name]
        points.sort(key=lambda point: point[0])
        means = [figures.mean for _, figures in points]
        spreads = [figures.std or 0.0 for _, figures in points]
        colour = _COLOURS[place % len(_COLOURS)]
        axes.errorbar([e for e, _ in points], means, spreads, label=name, color=colour, marker="o", ms=3, capsize=3)
    axes.set_xlabel("epochs")
    if values:
        axes.legend(fontsize=8)


def _draw_points(axes: Any, values: dict[Row, Values]) -> None:
    """Draws points, because bars from 0 would hide differences of a point or two."""
    names = [row.variant for row in values]
    means = [figures.mean for figures in values.values()]
    spreads = [figures.std or 0.0 for figures in values.values()]
    axes.errorbar(means, range(len(names)), xerr=spreads, fmt="o", color=_COLOURS[0], ecolor="#777777", capsize=3)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
