"""The examples run as they are, on one rank and on two, and learn."""

import json
import re
from typing import Any

import pytest
from processes import RUNNERS, run_bare, run_forked


def test_the_loop_is_short() -> None:
    assert len((RUNNERS / "examples/own_loop.py").read_text().splitlines()) <= 40


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_loop_of_ones_own_learns(ranks: int) -> None:
    finished = run_bare("examples/own_loop") if ranks == 1 else run_forked("examples/own_loop", ranks)
    assert finished.returncode == 0, finished.stderr
    lines = re.findall(r"^epoch (\d): loss ([\d.]+), k-NN ([\d.]+)%$", finished.stdout, flags=re.MULTILINE)
    assert [epoch for epoch, _, _ in lines] == list("123456")
    losses, accuracies = ([float(line[column]) for line in lines] for column in (1, 2))
    assert losses[-1] < losses[0] - 0.3
    assert accuracies[-1] > 98


@pytest.mark.full
def test_the_notebook_ends_in_a_picture(forked_runners: None) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    notebook = json.loads((RUNNERS / "examples/folder.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 5
    known: dict[str, Any] = {}
    for cell in cells:
        exec(cell.replace('"epochs": 20', '"epochs": 2').replace("plt.show()", ""), known)  # the project's own text
    assert known["features"].shape == (500, 128)
    assert sum(bool(axis.images) for axis in known["figure"].axes) == 8 * 7
    pyplot.close(known["figure"])
