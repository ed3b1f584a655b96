"""Tables of whatever a stage's result.json holds: nothing here knows the stages, so a new one needs no new code."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from instance_ssl.report.runs import SURROUNDINGS, Run, StageRecord

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
# Paths of what the page shows anyway.
_UNSAID = ("picture",)
_LONGEST_LIST = 8
# Keys of a recipe that still stand in a line of small print; a longer one is folded up.
_SHORT_RECIPE = 10
_LONG_TEXT = 48
_FEW_ROWS = 6
_HASH = re.compile("[0-9a-f]{40,64}")


@dataclass
class Rows:
    """What a result holds, taken apart.

    Attributes:
        rows: labelled rows of plain values.
        inner: labelled rows of the tables inside them, by the tables' name.
        recipe: dotted keys of what is no figure.
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
        """Takes over what is no figure."""
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


def stage_rows(record: StageRecord) -> Rows:
    """A result's figures as rows, numbers beside them too where there are none called figures; the rest as recipe."""
    result = {key: value for key, value in (record.result or {}).items() if key not in (*SURROUNDINGS, *_UNSAID)}
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


def stage_tables(runs: Sequence[Run], stage: str) -> str:
    """One table of the stage's figures in all runs, then the tables that are inside, folded up."""
    named = len(runs) > 1
    recipes, together = [], []
    inner: dict[str, list[tuple[list[str], dict[str, Any]]]] = {}
    for run in runs:
        record = run.stages.get(stage)
        if record is None or record.result is None:
            continue
        rows = stage_rows(record)
        prefix = [run.name] if named else []
        together += [([*prefix, label], values) for label, values in rows.rows]
        for name, table in rows.inner.items():
            inner.setdefault(name, []).extend(([*prefix, label], values) for label, values in table)
        recipes.append(_footnote(run, rows.recipe, record.result, named))
    label_names = [*(["run"] if named else []), ""]
    parts = [_labelled_table(together, label_names)] if together else []
    for name, found in inner.items():
        summary = f"<summary>{escape(name)} ({len(found)} rows)</summary>"
        unfolded = " open" if len(found) <= _FEW_ROWS else ""
        parts.append(f"<details{unfolded}>{summary}{_labelled_table(found, label_names)}</details>")
    return "".join([*parts, *recipes])


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Collection[int] = ()) -> str:
    """A table of cells that are HTML already; the `numeric` columns stand to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [
            ' class="n"' if place in numeric else ' class="long"' if len(cell) > _LONG_TEXT and "<" not in cell else ""
            for place, cell in enumerate(row)
        ]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def show(value: Any) -> str:
    """A plain value as HTML: figures short, lists in a line."""
    if value is None:
        return '<span class="none">–</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return _figure(value)
    if isinstance(value, list | tuple):
        return ", ".join(show(item) for item in value) or '<span class="none">none</span>'
    text = str(value)
    return f"{text[:12]}…" if _HASH.fullmatch(text) else escape(text)


def _figure(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return f"{value:.0f}" if abs(value) < 1000 else f"{value:,.0f}"
    if abs(value) >= 1:
        return f"{value:,.2f}"
    return f"{value:.4g}"


def _labelled_table(rows: Sequence[tuple[Sequence[str], Mapping[str, Any]]], label_names: Sequence[str]) -> str:
    keys = list(dict.fromkeys(key for _, values in rows for key in values if _is_plain(values[key])))
    if len(label_names) and not any(labels[-1] for labels, _ in rows):
        rows = [(labels[:-1], values) for labels, values in rows]
        label_names = label_names[:-1]
    header = [escape(name) for name in [*label_names, *(word(key) for key in keys)]]
    cells = [
        [*(escape(label) for label in labels), *(show(values[key]) if key in values else "" for key in keys)]
        for labels, values in rows
    ]
    numeric = {
        len(label_names) + place
        for place, key in enumerate(keys)
        if all(isinstance(values.get(key), int | float | None) for _, values in rows)
    }
    return html_table(header, cells, numeric)


def _footnote(run: Run, recipe: Mapping[str, Any], result: Mapping[str, Any], named: bool) -> str:
    """Recipe and surroundings in small print."""
    parts = [f"<b>{escape(run.name)}</b>"] if named else []
    short = {key: value for key, value in recipe.items() if len(recipe) <= _SHORT_RECIPE and value is not None}
    parts += [f"{escape(word(key))}: {show(value)}" for key, value in short.items()]
    checkpoint = result.get("newest_checkpoint")
    around = [
        f"checkpoint {escape(str(checkpoint))}" if checkpoint else "",
        f"{show(result['world_size'])} rank(s)" if "world_size" in result else "",
        f"{show(result['seconds'])} s" if "seconds" in result else "",
        escape(str(result.get("date", "")).replace("T", " ").replace("+00:00", " UTC")),
        f"commit {escape(str(result['commit']))}" if result.get("commit") else "",
    ]
    line = f'<p class="small">{" · ".join([*parts, *(part for part in around if part)])}</p>'
    if len(recipe) <= _SHORT_RECIPE:
        return line
    cells = [[f"<code>{escape(key)}</code>", show(value)] for key, value in recipe.items()]
    title = f"recipe of {run.name}" if named else "recipe"
    return f"{line}<details><summary>{escape(title)}</summary>{html_table(['key', 'value'], cells)}</details>"


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
