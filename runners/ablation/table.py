"""Results of the runs as rows of mean and standard deviation over seeds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from instance_ssl.run.directory import read_json
from settings import Ablation, Plan, Row


@dataclass(frozen=True)
class Values:
    """One figure of one row by seed; seeds without a result are absent."""

    by_seed: dict[int, float]

    @property
    def mean(self) -> float | None:
        """Mean over seeds; None without any."""
        return statistics.fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1); None for fewer than two seeds."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None

    def less(self, other: "Values") -> "Values":
        """Returns the difference seed by seed, from which the seed's own effect (weights, order, views) drops out."""
        shared = [seed for seed in self.by_seed if seed in other.by_seed]
        return Values({seed: self.by_seed[seed] - other.by_seed[seed] for seed in shared})


Results = dict[Row, dict[str, Values]]


def read_results(ablation: Ablation, plan: Plan, directory: Path) -> Results:
    """Reads every row's figures, as far as its runs are done.

    Args:
        directory: parent of the runs' directories.
    """
    results: Results = {}
    for row, names in plan.rows.items():
        figures: dict[str, dict[int, float]] = {figure: {} for figure in ablation.figures}
        for seed, name in names.items():
            records = _records(directory / name, plan.runs[name].stages)
            for figure, where in ablation.figures.items():
                value = _find(records, where)
                if value is not None:
                    figures[figure][seed] = value
        results[row] = {figure: Values(by_seed) for figure, by_seed in figures.items()}
    return results


def differences(ablation: Ablation, results: Results) -> Results:
    """Returns the drawn figures minus those of the reference of the same group and length, for all other rows."""
    found: Results = {}
    for row, figures in results.items():
        reference = results.get(Row(row.group, ablation.reference or "", row.epochs))
        if reference is not None and row.variant != ablation.reference:
            found[row] = {figure: figures[figure].less(reference[figure]) for figure in ablation.drawn}
    return found


def format_markdown(ablation: Ablation, results: Results) -> str:
    """Formats the table: mean ± standard deviation."""
    less = differences(ablation, results)
    groups = any(row.group for row in results)
    lengths = any(row.epochs is not None for row in results)
    compared = [f"{figure} less {ablation.reference}" for figure in ablation.drawn] if less else []
    head = ["table"] * groups + ["variant"] + ["epochs"] * lengths + ["seeds", *ablation.figures, *compared]
    lines = [head, ["---"] * len(head)]
    for row, figures in results.items():
        seeds = max(len(values.by_seed) for values in figures.values())
        cells = [row.group] * groups + [row.variant] + [str(row.epochs or "")] * lengths + [str(seeds)]
        cells += [_format(figures[figure]) for figure in ablation.figures]
        if less:
            cells += [_format(less[row][figure], sign="+") if row in less else "" for figure in ablation.drawn]
        lines.append(cells)
    return f"# {ablation.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def to_json(ablation: Ablation, plan: Plan, results: Results) -> dict[str, Any]:
    """Returns the same table with every seed's own figure and the names of the runs."""
    less = differences(ablation, results)

    def describe(figures: dict[str, Values]) -> dict[str, Any]:
        return {
            name: {"mean": values.mean, "std": values.std, "n": len(values.by_seed), "by_seed": values.by_seed}
            for name, values in figures.items()
        }

    rows = [
        {
            "group": row.group,
            "variant": row.variant,
            "epochs": row.epochs,
            "runs": plan.rows[row],
            "figures": describe(figures),
            "less_reference": describe(less.get(row, {})),
        }
        for row, figures in results.items()
    ]
    return {"title": ablation.title, "reference": ablation.reference, "rows": rows}


def _records(directory: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Reads the results of the stages that have one."""
    paths = {stage: directory / stage / "result.json" for stage in stages}
    return {stage: record for stage, path in paths.items() if (record := read_json(path)) is not None}


def _find(records: dict[str, Any], where: str) -> float | None:
    """Returns the number that `stage:key.key` names, or None."""
    stage, _, path = where.partition(":")
    for name in records if stage == "*" else [stage]:
        value = records.get(name)
        for key in path.split("."):
            value = _step_into(value, key)
        if isinstance(value, int | float):
            return float(value)
    return None


def _step_into(value: Any, key: str) -> Any:
    """Returns what a record has under a key, or None."""
    if isinstance(value, list):
        axis, is_between, place = key.partition("=")
        if is_between:
            return _between([point for point in value if isinstance(point, dict)], axis, float(place))
        value = dict(zip(map(str, range(len(value))), value, strict=True))
    if not isinstance(value, dict):
        return None
    return next(iter(value.values()), None) if key == "*" else value.get(key)


def _between(points: list[dict[str, Any]], axis: str, place: float) -> dict[str, float] | None:
    """Interpolates a curve's values linearly at `axis` = `place`; None outside the curve."""
    numbers = [{name: value for name, value in point.items() if isinstance(value, int | float)} for point in points]
    for before, after in pairwise(point for point in numbers if axis in point):
        if before[axis] <= place <= after[axis] and before[axis] < after[axis]:
            share = (place - before[axis]) / (after[axis] - before[axis])
            return {name: before[name] + share * (after[name] - before[name]) for name in before if name in after}
    return None


def _format(values: Values, sign: str = "") -> str:
    if values.mean is None:
        return "–"
    digits = 4 if abs(values.mean) < 1 and not sign else 2 if abs(values.mean) < 100 else 0
    spread = "" if values.std is None else f" ± {values.std:.{digits}f}"
    return f"{values.mean:{sign}.{digits}f}{spread}"
