"""The page: what the runs' directories hold as plain values, rendered by page.html.j2."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from instance_ssl.checkpoint.directory import read_tensors
from instance_ssl.config.experiment import ExperimentConfig, flatten
from instance_ssl.errors import UserError
from instance_ssl.evaluation.embedding_map import plane
from instance_ssl.report.gallery import THUMBNAIL_PIXELS, hard_class_gallery
from instance_ssl.report.pictures import NUM_COLOURS, Line, label_colour, line_chart, png_file, scatter_map
from instance_ssl.report.runs import Run
from instance_ssl.report.tables import Table, show, stage_tables, stage_title, word

_HERE = Path(__file__).parent
# Curves of the training: tag, title, name of the axis, factor.
_CURVES = (
    ("train/loss", "Loss", "loss, nats", 1.0),
    ("train/instance_accuracy", "Instance accuracy", "% of measured batches", 100.0),
    ("train/learning_rate", "Learning rate", "learning rate", 1.0),
    ("train/positive_cosine", "Cosine to the own row", "mean cosine", 1.0),
    ("speed/images_per_second", "Speed", "images a second", 1.0),
)
# Metrics at the top of a run: title, stage, keys within the result, factor, unit.
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
# The paper's figure that a stage's own picture is.
_PAPER_FIGURES = {"evaluate_checkpoints": "Figure 1(b)", "evaluate_similarity": "Figure 4"}
_MOST_LEGEND_LABELS = 20
# A title, a note beside it, and the drawing.
_Chart = tuple[str, str, Markup]


def build_page(runs: Sequence[Run]) -> str:
    """The whole page as HTML, with everything that it shows inside it."""

    def by_run(parts: Iterable[Any]) -> list[tuple[str, Any]]:
        """The parts that there are, with their run's name where there are several runs."""
        return [(run.name if len(runs) > 1 else "", part) for run, part in zip(runs, parts, strict=True) if part]

    jinja = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return jinja.get_template("page.html.j2").render(
        runs=runs,
        css=Markup((_HERE / "style.css").read_text(encoding="utf-8")),  # the only style there is, and our own
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        running=[run.name for run in runs if run.state == "running"],
        num_colours=NUM_COLOURS,
        thumbnail_pixels=THUMBNAIL_PIXELS,
        tiles=_tiles,
        about=_about,
        curves=_curves(runs),
        stages=_stages(runs),
        paper=_pictures(runs, _PAPER_FIGURES),
        maps=by_run(map(_class_map, runs)),
        neighbours=_pictures(runs, {"evaluate_knn": "Neighbours"}),
        galleries=by_run(map(hard_class_gallery, runs)),
        recipe=_recipe(runs),
    )


def curve(run: Run, tag: str, factor: float = 1.0) -> list[tuple[float, float]]:
    """A metric of the training over epochs, or over steps where the length of an epoch is not known."""
    record = run.stages.get("pretrain")
    points = record.series(tag) if record else []
    return [(step / run.steps_per_epoch if run.steps_per_epoch else step, value * factor) for step, value in points]


def _tiles(run: Run) -> list[tuple[str, str]]:
    """(value, title) of the metrics at the top; of an unfinished training the newest ones."""
    found = [(title, value * factor, unit) for title, stage, keys, factor, unit in _TILES
             if isinstance(value := run.figure(stage, *keys), int | float)]  # fmt: skip
    if not any(title == "epochs" for title, _, _ in found):
        newest = [
            ("loss now", curve(run, "train/loss"), ""),
            ("instance accuracy now", curve(run, "train/instance_accuracy", 100.0), " %"),
        ]
        found += [(title, points[-1][1], unit) for title, points, unit in newest if points]
        if points := newest[0][1] or newest[1][1]:
            found.append(("epochs done" if run.steps_per_epoch else "steps done", points[-1][0], ""))
    return [(f"{value:.2f} %" if unit else show(value), title) for title, value, unit in found]


def _about(run: Run) -> str:
    config = run.config
    if config is None:
        return ""
    images = f"{run.num_instances:,} images" if run.num_instances else "images"
    return (
        f"{images} ({config.data.kind}, {config.data.image_size} px), {config.model.backbone}, "
        f"{config.classifier.initialization} initialisation, seed {config.seed}"
    )


def _curves(runs: Sequence[Run]) -> list[_Chart]:
    charts: list[_Chart] = []

    def add(title: str, curves: Iterable[list[tuple[float, float]]], axis: str, references: dict[str, float]) -> None:
        drawn = [Line(place, points) for place, points in enumerate(curves) if points]
        if drawn:
            note = f"{drawn[0].points[-1][1]:.4g} at the end" if len(drawn) == 1 else ""
            charts.append((title, note, line_chart(drawn, references, axis)))

    for tag, title, axis, factor in _CURVES:
        add(title, [curve(run, tag, factor) for run in runs], axis, {})
        if tag == "train/instance_accuracy":
            add("k-NN", map(knn_curve, runs), "top-1, %", _baselines(runs[0]) if len(runs) == 1 else {})
    return charts


def knn_curve(run: Run) -> list[tuple[float, float]]:
    """k-NN's top-1 in per cent over epochs: of the kept checkpoints, and whenever `evaluate_knn` was run."""
    points: dict[float, float] = {}
    for stage, tag in (("evaluate_checkpoints", "checkpoints/knn_top1"), ("evaluate_knn", "knn/trained_top1")):
        if stage in run.stages:
            points |= dict(run.stages[stage].series(tag))
    return sorted(points.items())


def _baselines(run: Run) -> dict[str, float]:
    found = {word(source): run.figure("evaluate_knn", "figures", source, "top1") for source in ("pixels", "random")}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _stages(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each stage its tables, a line for each run without a result, and its own pictures."""
    sections = []
    for stage in dict.fromkeys(stage for run in runs for stage in run.stages):
        tables, waiting, title = stage_tables(runs, stage), [], stage_title(stage)
        for run in runs:
            if stage in run.stages and run.stages[stage].result is None:
                status = run.stages[stage].status
                reason = f": {status['reason']}" if status.get("reason") else ""
                waiting.append(f"{run.name}: {status.get('state', 'no result')}{reason}")
        shown_below = stage == "evaluate_knn" or stage in _PAPER_FIGURES
        pictures = [] if shown_below else _pictures(runs, {stage: title})
        if any(tables.values()) or waiting:
            sections.append({**tables, "title": title, "waiting": waiting, "pictures": pictures})
    return sections


def _pictures(runs: Sequence[Run], titles: dict[str, str]) -> list[tuple[str, str, str]]:
    """Pictures that the stages have drawn, as (heading, text in place of the picture, data URI)."""
    found = []
    for stage, title in titles.items():
        for run in runs:
            if uri := png_file(run.directory, run.figure(stage, "picture")):
                heading = [run.name] * (len(runs) > 1) + [title] * (len(titles) > 1)
                found.append((", ".join(heading), f"{title} of {run.name}", uri))
    return found


def _class_map(run: Run) -> tuple[list[_Chart], list[tuple[str, str]], str] | None:
    """The test images in the plane, a chart for each source, (colour, class) of the legend, and a note.

    None where no sample was kept.
    """
    file = run.directory / "evaluate_knn/map.pt"
    if not file.exists():
        return None
    try:
        content = read_tensors(file)
        labels, names = content["labels"], content["class_names"]
        count = int(labels.max()) + 1
        charts = []
        for source, sample in content["sources"].items():
            points_n2, method = plane(sample["components"])
            colours = [label_colour(label, count) for label in labels[sample["ids"]].tolist()]
            charts.append((word(source), f"{method}, {len(colours)} images", scatter_map(points_n2, colours)))
    except (UserError, KeyError) as error:
        return [], [], f"{file.name} cannot be shown ({error})"
    if count > _MOST_LEGEND_LABELS:
        return charts, [], f"{count} classes, in the order of their labels round the circle of hues"
    return charts, [(label_colour(i, count), str(names[i] if names else i)) for i in range(count)], ""


def _recipe(runs: Sequence[Run]) -> list[tuple[str, Table]]:
    """Configuration keys: those in which the runs differ, other changes of the defaults, and then all of them."""
    recipes = [flatten(run.config) if run.config else {} for run in runs]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    defaults = flatten(ExperimentConfig())
    differing = [key for key in keys if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)]
    changed = [key for key in keys if key not in differing and recipes[0].get(key) != defaults.get(key)]

    def table(chosen: Sequence[str]) -> Table:
        cells = [[key, *(show(recipe.get(key)) for recipe in recipes), show(defaults.get(key))] for key in chosen]
        return Table(["key", *(run.name for run in runs), "default"], cells)

    titled = {"Where the runs differ": differing, "Other than the defaults": changed, f"all {len(keys)} keys": keys}
    return [(title, table(chosen)) for title, chosen in titled.items() if chosen]
