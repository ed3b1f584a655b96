"""A fine-tuning that is stopped or killed goes on where it was and ends with the figures of one that was not."""

import json
from pathlib import Path
from typing import Any

import pytest
from rig import quick_first, run, status

STAGE = "evaluate_semi_supervised"
SETTINGS = {
    "evaluation.data.kind": "digits",
    "evaluation.data.limit_train": 101,
    "evaluation.data.limit_test": 101,
    "evaluation.sources": "[random]",
    "evaluation.knn.neighbours": "[5]",
    "evaluation.semi_supervised.fractions": "[0.3]",
    "evaluation.semi_supervised.classifier_learning_rates": "[1.0]",
    "evaluation.semi_supervised.epochs": 4,
    "evaluation.semi_supervised.global_batch_size": 9,
}


def figures(place: Path) -> dict[str, Any]:
    return json.loads((place / "run" / STAGE / "result.json").read_text())["figures"]


@pytest.fixture(scope="module")
def undisturbed(initialised: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("undisturbed")
    (place / "images").symlink_to(initialised / "images")
    finished = run(place, stage=STAGE, settings=SETTINGS)
    assert finished.wait() == [0, 0], finished.text()
    return figures(place)


ENDS = [("fine_tune:1:14:term", [75, 75]), ("fine_tune:1:14:kill", [3, -9])]


@pytest.mark.parametrize(("fault", "codes"), quick_first(ENDS, lambda case: case == ENDS[0]))
def test_it_goes_on_and_ends_alike(
    initialised: Path, tmp_path: Path, undisturbed: dict[str, Any], fault: str, codes: list[int]
) -> None:
    (tmp_path / "images").symlink_to(initialised / "images")
    ended = run(tmp_path, stage=STAGE, settings=SETTINGS, fault=fault)
    assert ended.wait() == codes, ended.text()
    assert status(tmp_path, STAGE)["state"] == {75: "stopped", 3: "failed"}[codes[0]]
    resumed = run(tmp_path, stage=STAGE, settings=SETTINGS)
    assert resumed.wait() == [0, 0], resumed.text()
    assert "resuming after" in resumed.text()
    assert figures(tmp_path) == undisturbed
    assert not list((tmp_path / "run" / STAGE / "trainings").glob("*.pt"))
