"""Charts as inline SVG, drawn by matplotlib in colours that the page's style sheet sets, and PNGs as data URIs."""

import base64
import colorsys
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

NUM_COLOURS = 8
# matplotlib draws in these colours; in the finished SVG they become the variables of style.css, so that a chart
# follows the page into dark mode.
_RUNS = [f"#0000f{place}" for place in range(NUM_COLOURS)]
_TEXT, _LINE = "#0000e0", "#0000e1"
_VARIABLES = {
    **{colour: f"var(--run{place})" for place, colour in enumerate(_RUNS)},
    _TEXT: "var(--pale)",
    _LINE: "var(--line)",
}
_STYLE: Any = {  # matplotlib types its keys one by one
    "svg.fonttype": "none",
    "font.size": 8,
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,  # a $ in a name is a dollar
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
}
_GROUP_ID = re.compile('<g id="[^"]*"')
_MOST_POINTS, _MOST_MARKERS = 300, 45
_LABEL_COLOURS = (
    "#4e79a7", "#f28e2b", "#e15759", "#59a14f", "#b07aa1", "#d4a72c", "#9c755f", "#ff9da7", "#4fb3ac", "#8f8f8f",
)  # fmt: skip


class Line(NamedTuple):
    """A curve of points (x, y) by ascending x, in the colour of the run at this `place` on the page."""

    place: int
    points: Sequence[tuple[float, float]]


def line_chart(lines: Sequence[Line], references: Mapping[str, float], y_name: str) -> Markup:
    """Curves over epochs, one or more, and dashed horizontal lines with their names."""
    with _drawing((4.2, 2.5)) as (figure, axes):
        for line in lines:
            count = min(len(line.points), _MOST_POINTS)  # evenly spaced, both ends included
            points = [line.points[round(i * (len(line.points) - 1) / max(count - 1, 1))] for i in range(count)]
            style = "o-" if len(points) <= _MOST_MARKERS else "-"
            axes.plot(*zip(*points, strict=True), style, lw=1.5, ms=3.5, color=_RUNS[line.place % NUM_COLOURS])
        for place, (name, value) in enumerate(references.items()):
            axes.axhline(value, color=_TEXT, lw=1, ls="--")
            side = place % 2  # names of neighbouring lines at opposite ends
            axes.annotate(f"{name} {value:.4g}", (1 - side, value), (0, 2), xycoords=axes.get_yaxis_transform(),
                          textcoords="offset points", ha="left" if side else "right", fontsize=7)  # fmt: skip
        axes.set_xlabel("epochs", loc="right")
        axes.set_title(y_name, loc="left", fontsize=8)
        axes.grid(axis="x", visible=False)
        return _inline(figure)


def scatter_map(points_n2: Tensor, colours: Sequence[str]) -> Markup:
    """Points in a plane whose axes mean nothing: square, without ticks."""
    with _drawing((3.6, 3.6)) as (figure, axes):
        xs, ys = points_n2.nan_to_num(0, 0, 0).T.tolist()
        axes.scatter(xs, ys, s=14, c=list(colours), linewidths=0, alpha=0.8)
        axes.axis("off")
        return _inline(figure)


def label_colour(label: int, count: int) -> str:
    """A hex colour for each of `count` classes: ten distinct ones, or hues evenly spaced."""
    if count <= len(_LABEL_COLOURS):
        return _LABEL_COLOURS[label]
    return to_hex(colorsys.hls_to_rgb(label / count, 0.52 if label % 2 else 0.62, 0.62))


def png_uri(data: bytes) -> str:
    """A PNG's bytes as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def png_file(run: Path, name: object) -> str | None:
    """A PNG below the run directory as a data URI; None where there is none of that name."""
    if not isinstance(name, str):
        return None
    try:
        path = (run / name).resolve()
        # A result.json from elsewhere must not put any other file into a page that is sent around.
        data = path.read_bytes() if path.is_relative_to(run.resolve()) else b""
    except (OSError, ValueError):
        return None
    return png_uri(data) if data.startswith(b"\x89PNG") else None


@contextmanager
def _drawing(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    """A figure of this size in inches, and its axes, drawn in the page's style."""
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        yield figure, axes


def _inline(figure: Figure) -> Markup:
    """The figure as an <svg> element without a size of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = _GROUP_ID.sub("<g", text[text.index("<svg") :])  # the same in every figure, and referred to by none
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return Markup(text)  # matplotlib has escaped every text in it
