"""Tables of whatever a stage's result.json holds: nothing here knows the stages, so a new one needs no new code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
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
}
_LONGEST_LIST = 8


@dataclass
class Rows:
    """Labelled rows of plain values, and below them the tables that are inside: by label, lists of rows."""

    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    inner: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=list)

    def add(self, label: str, values: Mapping[str, Any]) -> None:
        """Takes a mapping apart: its plain values are a row, mappings in it further rows, lists of mappings tables."""
        plain = {key: value for key, value in values.items() if _is_plain(value)}
        if plain:
            self.rows.append((label, plain))
        for key, value in values.items():
            if isinstance(value, Mapping):
                self.add(f"{label} · {word(key)}" if label else word(key), value)
            elif _is_table(value):
                self.inner.append((f"{label} · {word(key)}" if label else word(key), list(value)))


def word(key: str) -> str:
    """A key as the page shows it."""
    return _WORDS.get(key, key.replace("_", " "))


def stage_rows(record: StageRecord) -> tuple[Rows, dict[str, Any]]:
    """A result's figures as rows, and what else it says (its recipe) as plain values."""
    result = {key: value for key, value in (record.result or {}).items() if key not in SURROUNDINGS}
    figures = result.pop("figures", None)
    rows = Rows()
    if isinstance(figures, Mapping):
        rows.add("", figures)
    elif _is_table(figures):
        rows.inner.append(("", list(figures)))
    recipe = {key: value for key, value in result.items() if _is_plain(value)}
    nested = {key: value for key, value in result.items() if not _is_plain(value)}
    if figures is None:
        rows.add("", result)
        return rows, {}
    rows.add("", nested)
    return rows, recipe


def stage_tables(runs: Sequence[Run], stage: str) -> str:
    """One table of the stage's figures in all runs, then the tables that are inside, folded up."""
    together, recipes, inner = [], [], []
    for run in runs:
        record = run.stages.get(stage)
        if record is None or record.result is None:
            continue
        rows, recipe = stage_rows(record)
        prefix = [run.name] if len(runs) > 1 else []
        together += [([*prefix, label], values) for label, values in rows.rows]
        recipes.append((run, recipe, record.result))
        inner += [(" · ".join([*prefix, *([label] if label else [])]), table) for label, table in rows.inner]
    parts = []
    if together:
        parts.append(_labelled_table(together, [*(["run"] if len(runs) > 1 else []), ""]))
    for label, table in inner:
        summary = f"{escape(label)} ({len(table)} rows)" if label else f"{len(table)} rows"
        parts.append(f"<details><summary>{summary}</summary>{table_of(table)}</details>")
    parts += [_footnote(run, recipe, result, len(runs) > 1) for run, recipe, result in recipes]
    return "".join(parts)


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of plain values as a table."""
    return _labelled_table([([], dict(row)) for row in rows], [])


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], first_numeric: int = 1) -> str:
    """A table of cells that are HTML already; columns from `first_numeric` on stand to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = ['class="n"' if place >= first_numeric else "" for place in range(len(row))]
        return "".join(f"<{tag} {kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

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
    return escape(str(value))


def _figure(value: float) -> str:
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
    return html_table(header, cells, first_numeric=len(label_names))


def _footnote(run: Run, recipe: Mapping[str, Any], result: Mapping[str, Any], named: bool) -> str:
    """Recipe and surroundings in small print."""
    parts = [f"<b>{escape(run.name)}</b>"] if named else []
    parts += [f"{escape(word(key))}: {show(value)}" for key, value in recipe.items() if value is not None]
    checkpoint = result.get("newest_checkpoint")
    around = [
        f"checkpoint {escape(str(checkpoint))}" if checkpoint else "",
        f"{show(result['world_size'])} rank(s)" if "world_size" in result else "",
        f"{show(result['seconds'])} s" if "seconds" in result else "",
        escape(str(result.get("date", ""))),
        f"commit {escape(str(result['commit']))}" if result.get("commit") else "",
    ]
    return f'<p class="small">{" · ".join([*parts, *(part for part in around if part)])}</p>'


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= _LONGEST_LIST and all(isinstance(item, str | int | float) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
