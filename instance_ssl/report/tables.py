"""Tables of whatever a stage's result.json holds; nothing here knows the stages, so a new one needs no new code."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from instance_ssl.report.runs import Run

# Words for what results call by one.
_WORDS = {
    "pixels": "raw pixels",
    "random": "random network",
    "trained": "trained",
    "running_prior": "random network, running batch norms",
    "top1": "top-1",
    "top5": "top-5",
    "knn_top1": "k-NN top-1",
    "chance_top1": "chance",
}
_STAGES = {
    "initialize_classifier": "Initialisation of the classifier",
    "pretrain": "Training",
    "evaluate_knn": "k-NN",
    "evaluate_linear": "Linear classification",
    "evaluate_fine_tune": "Fine-tuning",
    "evaluate_semi_supervised": "Semi-supervised",
    "evaluate_similarity": "Similarities of the initialisations",
    "evaluate_checkpoints": "Instance against semantic accuracy",
}
# Keys of a result about where it was computed, not about what came out, and what the page shows anyway.
_UNSAID = {"date", "commit", "versions", "world_size", "device", "seconds", "data", "newest_checkpoint", "stage"}
_UNSAID |= {"picture"}
_LONGEST_LIST = 8
# Most keys of a recipe that are shown in a line of small print; a longer one is folded.
_SHORT_RECIPE = 10
_Labelled = list[tuple[list[str], dict[str, Any]]]
_HASH = re.compile("[0-9a-f]{40,64}")


@dataclass
class Rows:
    """What a result holds, taken apart.

    Attributes:
        rows: labelled rows of plain values.
        inner: labelled rows of the tables inside them, by the tables' name.
        recipe: dotted keys of what is not a metric.
    """

    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    inner: dict[str, list[tuple[str, dict[str, Any]]]] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    def add(self, label: str, values: Mapping[str, Any]) -> None:
        """Plain values are a row, mappings in it further rows, lists of mappings tables, a `recipe` no row.

        Of an `origin` (see `evaluation/frozen_encoder.py`) the row has the checkpoint's or file's name.
        """
        plain = {key: value for key, value in values.items() if _is_plain(value)}
        if isinstance(origin := values.get("origin"), Mapping) and origin:
            plain["of"] = Path(str(origin.get("checkpoint") or origin.get("file"))).name
        if plain:
            self.rows.append((label, plain))
        for key, value in values.items():
            inner_label = f"{label} · {word(key)}" if label else word(key)
            if key == "recipe" and isinstance(value, Mapping):
                self.keep(label, value)
            elif isinstance(value, Mapping) and key != "origin":
                self.add(inner_label, value)
            elif _is_table(value):
                self.inner.setdefault(word(key), []).extend((label, dict(row)) for row in value)

    def keep(self, prefix: str, values: Mapping[str, Any]) -> None:
        """Adds to the recipe."""
        for key, value in values.items():
            name = f"{prefix}.{key}" if prefix else key
            if isinstance(value, Mapping):
                self.keep(name, value)
            else:
                self.recipe[name] = value


def word(key: str) -> str:
    """A key as the page shows it."""
    return _WORDS.get(key, key.replace("_", " "))


def stage_title(stage: str) -> str:
    """A stage's name as the page shows it."""
    return _STAGES.get(stage) or word(stage.removeprefix("evaluate_")).capitalize()


def stage_rows(result: Mapping[str, Any]) -> Rows:
    """A result's figures as rows, numbers beside them too where there are none called figures; the rest as recipe."""
    result = {key: value for key, value in result.items() if key not in _UNSAID}
    figures = result.pop("figures", None)
    rows = Rows()
    if isinstance(figures, Mapping):
        rows.add("", figures)
    elif _is_table(figures):
        rows.inner["figures"] = [("", dict(row)) for row in figures]
    numbers = {key: value for key, value in result.items() if _is_numeric(value, alone=figures is None)}
    rows.add("", numbers)
    rows.keep("", {key: value for key, value in result.items() if key not in numbers})
    return rows


class Table(NamedTuple):
    """A header, rows of text as wide, and which columns are numbers."""

    header: list[str]
    rows: list[list[str]]
    numeric: frozenset[int] = frozenset()


def stage_tables(runs: Sequence[Run], stage: str) -> dict[str, Any]:
    """The tables of one stage, the runs below each other.

    Returns:
        "main", the table of all runs or None; "inner", the tables inside the results by name; "footnotes": of each run
        its name, a line, and the recipe as a table where it is too long for the line.
    """
    named = len(runs) > 1
    together: _Labelled = []
    footnotes = []
    inner: dict[str, _Labelled] = {}
    for run in runs:
        result = run.stages[stage].result if stage in run.stages else None
        if result is None:
            continue
        rows = stage_rows(result)
        prefix = [run.name] if named else []
        together += [([*prefix, label], values) for label, values in rows.rows]
        for name, table in rows.inner.items():
            inner.setdefault(name, []).extend(([*prefix, label], values) for label, values in table)
        footnotes.append((run.name if named else "", *_footnote(rows.recipe, result)))
    label_names = ["run", ""] if named else [""]
    tables = {name: _table(found, label_names) for name, found in inner.items()}
    return {"main": _table(together, label_names) if together else None, "inner": tables, "footnotes": footnotes}


def show(value: Any) -> str:
    """A plain value as text: numbers rounded, lists in a line, hashes shortened."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float) and math.isfinite(value):
        if value == int(value) and abs(value) < 1e6:
            return f"{value:,.0f}"
        return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(show(item) for item in value) or "none"
    text = str(value)
    return f"{text[:12]}…" if _HASH.fullmatch(text) else text


def _table(rows: _Labelled, label_names: Sequence[str]) -> Table:
    keys = list(dict.fromkeys(key for _, values in rows for key in values if _is_plain(values[key])))
    if not any(labels[-1] for labels, _ in rows):
        rows = [(labels[:-1], values) for labels, values in rows]
        label_names = label_names[:-1]
    numeric = {
        len(label_names) + place
        for place, key in enumerate(keys)
        if all(isinstance(values.get(key), int | float | None) for _, values in rows)
    }
    cells = [[*labels, *(show(values[key]) if key in values else "" for key in keys)] for labels, values in rows]
    return Table([*label_names, *(word(key) for key in keys)], cells, frozenset(numeric))


def _footnote(recipe: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, Table | None]:
    """Recipe and surroundings of a result."""
    is_short = len(recipe) <= _SHORT_RECIPE
    parts = [f"{word(key)}: {show(value)}" for key, value in recipe.items() if is_short and value is not None]
    if checkpoint := result.get("newest_checkpoint"):
        parts.append(f"checkpoint {checkpoint}")
    if "world_size" in result:
        parts.append(f"{show(result['world_size'])} rank(s)")
    if "seconds" in result:
        parts.append(f"{show(result['seconds'])} s")
    if date := result.get("date"):
        parts.append(str(date).replace("T", " ").replace("+00:00", " UTC"))
    if commit := result.get("commit"):
        parts.append(f"commit {commit}")
    table = None if is_short else Table(["key", "value"], [[key, show(value)] for key, value in recipe.items()])
    return " · ".join(parts), table


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= _LONGEST_LIST and all(isinstance(item, str | int | float) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def _is_numeric(value: Any, *, alone: bool) -> bool:
    """Whether a value beside the figures is one itself: mappings of numbers; single numbers only where `alone`."""
    if isinstance(value, Mapping):
        return bool(value) and all(_is_numeric(item, alone=True) for item in value.values())
    return alone and (value is None or isinstance(value, int | float))


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
