"""The page: its sections in order, each leaving out what the runs do not have (yet)."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from instance_ssl.config.experiment import ExperimentConfig, flatten
from instance_ssl.report.pictures import embedding_maps, hard_class_gallery, picture
from instance_ssl.report.runs import Run
from instance_ssl.report.svg import Dot, Series, bar_chart, line_chart, scatter_chart
from instance_ssl.report.tables import html_table, show, stage_tables, stage_title, word

# Nothing is fetched, and nothing runs.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_COLOURS = 8
# Curves of the training: tag, title, name of the axis, factor.
_CURVES = (
    ("train/loss", "Loss", "loss, nats", 1.0),
    ("train/instance_accuracy", "Instance accuracy", "% of measured batches", 100.0),
    ("train/learning_rate", "Learning rate", "learning rate", 1.0),
    ("train/positive_cosine", "Cosine to the own row", "mean cosine", 1.0),
    ("speed/images_per_second", "Speed", "images a second", 1.0),
)
# Figures at the top of a run: title, stage, keys within the result, factor, unit.
_TILES: tuple[tuple[str, str, tuple[str, ...], float, str], ...] = (
    ("k-NN", "evaluate_knn", ("figures", "trained", "top1"), 1.0, " %"),
    ("linear", "evaluate_linear", ("figures", "trained", "top1"), 1.0, " %"),
    ("retrieval top-1", "evaluate_retrieval", ("figures", "trained", "top1"), 1.0, " %"),
    ("fine-tuned", "evaluate_fine_tune", ("figures", "trained", "top1"), 1.0, " %"),
    ("detection AP50", "evaluate_detection", ("figures", "trained", "AP50"), 1.0, ""),
    ("instance accuracy", "pretrain", ("instance_accuracy",), 100.0, " %"),
    ("loss", "pretrain", ("loss",), 1.0, ""),
    ("epochs", "pretrain", ("epochs",), 1.0, ""),
)


def build_page(runs: Sequence[Run]) -> str:
    """The whole page as HTML, with everything it shows inside it."""
    sections: list[tuple[str, str, str]] = []
    makers: tuple[tuple[str, str, Callable[[Sequence[Run]], str]], ...] = (
        ("curves", "Curves", _curves),
        ("results", "Results", _results),
        ("paper", "The paper's figures 1(b) and 4", _paper_figures),
        ("map", "Test images in the plane", _maps),
        ("neighbours", "Nearest neighbours", _neighbours),
        ("hardest", "Hardest classes", _galleries),
        ("recipe", "Recipe", _recipe),
    )
    for name, title, make in makers:
        content = make(runs)
        if content:
            sections.append((name, title, content))
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{escape(title)}</h2>{text}</section>' for name, title, text in sections)
    names = ", ".join(run.name for run in runs)
    css = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    cards = "".join(_card(run, place) for place, run in enumerate(runs))
    shape = "runs single" if len(runs) == 1 else "runs"
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(names)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{css}</style></head><body><header><h1>{escape(names)}</h1>"
        f'<p class="small">instance_ssl · written {written}{_still_going(runs)}</p>'
        f'<div class="{shape}">{cards}</div><nav>{links}</nav>'
        f"</header>{body}</body></html>\n"
    )


def _colour(place: int) -> str:
    return f"var(--run{place % _COLOURS})"


def _still_going(runs: Sequence[Run]) -> str:
    going = [run.name for run in runs if run.state == "running"]
    return f" while {escape(', '.join(going))} was still going" if going else ""


def _card(run: Run, place: int) -> str:
    values = [(title, value * factor, unit) for title, stage, keys, factor, unit in _TILES
              if isinstance(value := run.figure(stage, *keys), int | float)]  # fmt: skip
    if not any(title == "epochs" for title, _, _ in values):
        values += _progress(run)
    shown = [(title, f"{value:.2f} %" if unit else show(value)) for title, value, unit in values]
    tiles = "".join(f"<div><b>{value}</b><span>{title}</span></div>" for title, value in shown)
    config = run.config
    about = ""
    if config is not None:
        images = f"{run.num_instances:,} images" if run.num_instances else "images"
        about = f"{images} ({config.data.kind}, {config.data.image_size} px), {config.model.backbone}"
        about += f", {config.classifier.initialization} initialisation, seed {config.seed}"
    return (
        f'<div class="run" style="border-top-color:{_colour(place)}"><h3>{escape(run.name)}</h3>'
        f'<span class="state {escape(run.state)}">{escape(run.state)}</span> <span class="small">{escape(about)}</span>'
        f'<div class="tiles">{tiles}</div></div>'
    )


def _progress(run: Run) -> list[tuple[str, float, str]]:
    """Of a training that is not complete: where it is, from its metrics."""
    record = run.stages.get("pretrain")
    found = []
    for title, tag, factor, unit in (
        ("loss now", "train/loss", 1.0, ""),
        ("instance accuracy now", "train/instance_accuracy", 100.0, " %"),
    ):
        series = record.series(tag) if record else []
        if series:
            found.append((title, series[-1][1] * factor, unit))
            place = _epochs(run, series[-1][0])
    if found:
        found.append(("epochs done" if run.steps_per_epoch else "steps done", place, ""))
    return found


def _curves(runs: Sequence[Run]) -> str:
    charts = []
    for tag, title, axis, factor in _CURVES:
        series = [_curve(run, place, tag, factor) for place, run in enumerate(runs)]
        charts.append(_chart(title, [line for line in series if line.points], axis))
        if tag == "train/instance_accuracy":
            charts.append(_chart("k-NN", _knn_curves(runs), "top-1, %"))
    shown = "".join(charts)
    return f'{_run_legend(runs)}<div class="charts">{shown}</div>' if shown else ""


def _chart(title: str, series: Sequence[Series], axis: str) -> str:
    if not any(line.points and not line.reference for line in series):
        return ""
    lines = [line for line in series if not line.reference]
    last = f"<span>{lines[0].points[-1][1]:.4g} at the end</span>" if len(lines) == 1 else ""
    chart = line_chart(series, x_name="epochs", y_name=axis)
    return f'<figure class="chart"><figcaption>{escape(title)}{last}</figcaption>{chart}</figure>'


def _curve(run: Run, place: int, tag: str, factor: float) -> Series:
    record = run.stages.get("pretrain")
    points = record.series(tag) if record else []
    return Series(run.name, _colour(place), [(_epochs(run, step), value * factor) for step, value in points])


def _epochs(run: Run, steps: int) -> float:
    """Steps in epochs; unchanged where the length of an epoch is not known."""
    return steps / run.steps_per_epoch if run.steps_per_epoch else steps


def _knn_curves(runs: Sequence[Run]) -> list[Series]:
    """Over the kept checkpoints and whenever k-NN was run; pixels and the random network as lines of a single run."""
    lines = []
    for place, run in enumerate(runs):
        points: dict[float, float] = {}
        for stage, tag in (("evaluate_checkpoints", "checkpoints/knn_top1"), ("evaluate_knn", "knn/trained_top1")):
            if stage in run.stages:
                points |= dict(run.stages[stage].series(tag))
        lines.append(Series(run.name, _colour(place), sorted(points.items())))
        for source in ("pixels", "random"):
            value = run.figure("evaluate_knn", "figures", source, "top1")
            if value is not None and len(runs) == 1:
                lines.append(Series(word(source), "var(--pale)", [(0.0, value)], reference=True))
    return lines


def _run_legend(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    keys = "".join(
        f'<span class="key" style="background:{_colour(place)}"></span>{escape(run.name)}'
        for place, run in enumerate(runs)
    )
    return f'<p class="legend">{keys}</p>'


def _results(runs: Sequence[Run]) -> str:
    stages = list(dict.fromkeys(stage for run in runs for stage in run.stages))
    parts = []
    for stage in stages:
        tables = stage_tables(runs, stage)
        waiting = [_waiting(run, stage) for run in runs if stage in run.stages and run.stages[stage].result is None]
        if tables or waiting:
            parts.append(f"<h3>{escape(stage_title(stage))}</h3>{tables}{''.join(waiting)}{_own_pictures(runs, stage)}")
    return "".join(parts)


def _waiting(run: Run, stage: str) -> str:
    status = run.stages[stage].status
    reason = f": {status['reason']}" if status.get("reason") else ""
    return f'<p class="small">{escape(run.name)}: {escape(str(status.get("state", "no result")))}{escape(reason)}</p>'


def _own_pictures(runs: Sequence[Run], stage: str) -> str:
    """Pictures of stages that this page draws nothing of by itself."""
    if stage in ("evaluate_knn", "evaluate_similarity", "evaluate_checkpoints"):
        return ""
    found = [(run, run.figure(stage, "picture")) for run in runs]
    return "".join(picture(run.directory / path, f"{stage} of {run.name}") for run, path in found if path)


def _paper_figures(runs: Sequence[Run]) -> str:
    charts = [_correlation(runs)]
    for run in runs:
        figures = run.figure("evaluate_similarity", "figures")
        if isinstance(figures, dict) and figures:
            charts += [_similarity(run, figures, kind, len(runs) > 1) for kind in ("class", "gap")]
    shown = "".join(charts)
    return f'<div class="charts">{shown}</div>' if shown else ""


def _correlation(runs: Sequence[Run]) -> str:
    dots, notes = [], []
    for place, run in enumerate(runs):
        points = run.figure("evaluate_checkpoints", "figures")
        for point in points if isinstance(points, list) else []:
            x, y = point["instance_accuracy"], point["knn_top1"]
            title = f"{run.name}, epoch {point['epoch']}: instances {x:.2f} %, k-NN {y:.2f} %"
            dots.append(Dot(x, y, _colour(place), title))
        pearson = run.figure("evaluate_checkpoints", "correlation", "pearson")
        if isinstance(pearson, float):
            key = f'<span class="key" style="background:{_colour(place)}"></span>{escape(run.name)} '
            notes.append(f"{key if len(runs) > 1 else ''}Pearson's r = {pearson:.2f}")
    if not dots:
        return ""
    chart = scatter_chart(dots, x_name="instance accuracy, %", y_name="k-NN top-1, %")
    caption = "<figcaption>Instance and semantic accuracy</figcaption>"
    return f'<figure class="chart">{caption}{chart}<p class="legend">{"<br>".join(notes)}</p></figure>'


def _similarity(run: Run, figures: dict[str, Any], kind: str, named: bool) -> str:
    modes = list(figures)
    names = {
        "class": (("same instance", "intra_class"), ("other instances", "inter_class")),
        "gap": (("view and row", "class_gap"), ("two views", "view_gap")),
    }
    title = {"class": "Cosine of a view and rows of W", "gap": "Gap: same less other instance"}
    bars = [
        Series(name, _colour(number), [(place, figures[mode][key]) for place, mode in enumerate(modes)])
        for number, (name, key) in enumerate(names[kind])
    ]
    key = "".join(f'<span class="key" style="background:{bar.colour}"></span>{bar.name}' for bar in bars)
    caption = f"<figcaption>{title[kind]} <span>{escape(run.name) if named else ''}</span></figcaption>"
    chart = bar_chart(modes, bars, y_name="difference of cosines" if kind == "gap" else "mean cosine")
    return f'<figure class="chart">{caption}{chart}<p class="legend">{key}</p></figure>'


def _by_run(runs: Sequence[Run], make: Callable[[Run], str]) -> str:
    """One part for each run that has one, headed by its name where there are several runs."""
    parts = [(run, make(run)) for run in runs]
    return "".join((f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else "") + text for run, text in parts if text)


def _maps(runs: Sequence[Run]) -> str:
    return _by_run(runs, lambda run: embedding_maps(run.directory / "evaluate_knn/map.pt"))


def _neighbours(runs: Sequence[Run]) -> str:
    return _by_run(runs, lambda run: picture(run.directory / "evaluate_knn/neighbours.png", f"neighbours, {run.name}"))


def _galleries(runs: Sequence[Run]) -> str:
    return _by_run(runs, hard_class_gallery)


def _recipe(runs: Sequence[Run]) -> str:
    """What the runs' configurations change of the defaults, differences between the runs first; then everything."""
    recipes = [run.recipe() for run in runs]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    if not keys:
        return ""
    defaults = flatten(ExperimentConfig())
    differing = [key for key in keys if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)]
    changed = [key for key in keys if key not in differing and recipes[0].get(key) != defaults.get(key)]
    header = ["key", *(escape(run.name) for run in runs), "default"]

    def table(chosen: Sequence[str]) -> str:
        cells = [
            [f"<code>{escape(key)}</code>", *(show(recipe.get(key)) for recipe in recipes), show(defaults.get(key))]
            for key in chosen
        ]
        return html_table(header, cells)

    parts = [f"<h3>Where the runs differ</h3>{table(differing)}"] if differing else []
    if changed:
        parts.append(f"<h3>Other than the defaults</h3>{table(changed)}")
    return "".join([*parts, f"<details><summary>all {len(keys)} keys</summary>{table(keys)}</details>"])
