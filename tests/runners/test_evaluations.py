"""Retrieval, similarities and the correlation over checkpoints of a real run: the same figures on 1 and 2 ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from processes import run_bare
from shared_pipeline import EVALUATED_EPOCHS, FLAGS, FURTHER, TRAIN

from instance_ssl.report.command import main

EVALUATIONS = ("evaluate_knn", "evaluate_retrieval", "evaluate_similarity", "evaluate_checkpoints")


def _result(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "result.json").read_text())


@pytest.fixture(scope="module")
def one_rank(evaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank evaluates what two have trained and evaluated."""
    run = tmp_path_factory.mktemp("evaluations") / "one_rank"
    shutil.copytree(evaluated, run)
    for stage in EVALUATIONS:
        shutil.rmtree(run / stage)
    finished = run_bare("pipeline", "--run-dir", str(run), *FLAGS, *FURTHER, "evaluate_knn")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return run


def _same(one: Any, two: Any, tolerance: float, where: str = "") -> None:
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            if key == "origin":  # where each run lies
                continue
            _same(one[key], two[key], tolerance, f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for place, (mine, theirs) in enumerate(zip(one, two, strict=True)):
            _same(mine, theirs, tolerance, f"{where}[{place}]")
    elif isinstance(one, float):
        assert two == pytest.approx(one, abs=tolerance), where
    else:
        assert one == two, where


# In per cent of counted images, or cosines. A batch of another size rounds otherwise: cosines differ in the last bits.
@pytest.mark.parametrize("stage", EVALUATIONS)
def test_one_and_two_ranks_have_the_same_figures(one_rank: Path, evaluated: Path, stage: str) -> None:
    one, two = _result(one_rank, stage), _result(evaluated, stage)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    _same(one["figures"], two["figures"], 1e-5 if stage == "evaluate_similarity" else 1e-9)


def test_results_hold_their_recipe(one_rank: Path) -> None:
    knn = _result(one_rank, "evaluate_knn")["figures"]["trained"]
    assert (knn["layer"], knn["embeddings"]["layer"]) == ("backbone output", "projection output")
    assert {(row["k"], row["temperature"]) for row in knn["embeddings"]["grid"]} == {
        (k, t) for k in (10, 20, 100, 200) for t in (0.07, 0.1, 0.2)
    }
    retrieval = _result(one_rank, "evaluate_retrieval")["figures"]
    assert {"running_prior", "random", "trained"} <= set(retrieval)
    assert retrieval["running_prior"]["batch_norm"] == "running"
    assert all(figures["queries"] == TRAIN for figures in retrieval.values())
    assert retrieval["trained"]["top1"] > 3 * retrieval["trained"]["chance_top1"]
    similarity = _result(one_rank, "evaluate_similarity")
    assert similarity["sample"] == "all images"
    gaps = {mode: figures["class_gap"] for mode, figures in similarity["figures"].items()}
    assert gaps["running"] > 3 * gaps["frozen"] > 0  # the paper: 9.3 % and 1.5 %
    assert abs(gaps["gaussian"]) < 0.01
    checkpoints = _result(one_rank, "evaluate_checkpoints")
    assert [point["epoch"] for point in checkpoints["figures"]] == EVALUATED_EPOCHS
    assert set(checkpoints["correlation"]) >= {"pearson", "spearman"}


def test_checkpoints_that_were_measured_are_not_measured_again(one_rank: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(one_rank, run)
    (run / "evaluate_checkpoints/result.json").unlink()  # as if stopped while it measured the last one
    points = json.loads((run / "evaluate_checkpoints/points.json").read_text())
    last = max(points["points"])
    del points["points"][last]
    first = min(points["points"])
    points["points"][first]["knn_top1"] = 12.5
    (run / "evaluate_checkpoints/points.json").write_text(json.dumps(points))
    finished = run_bare("evaluate_checkpoints", "--run-dir", str(run), *FLAGS)
    assert finished.returncode == 0, finished.stderr
    found = _result(run, "evaluate_checkpoints")["figures"]
    assert found[0]["knn_top1"] == 12.5
    assert found[1:] == _result(one_rank, "evaluate_checkpoints")["figures"][1:]


def test_one_checkpoint_is_too_few(one_rank: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(one_rank, run)
    for directory in sorted((run / "pretrain/checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(directory)
    finished = run_bare("evaluate_checkpoints", "--run-dir", str(run), *FLAGS)
    assert finished.returncode == 2
    assert "checkpoint.keep_every_epochs" in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1


def test_a_real_run_has_a_page(one_rank: Path, evaluated: Path, tmp_path: Path) -> None:
    assert main([str(one_rank), str(evaluated), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    for words in ("Curves", "Hardest classes", "t-SNE", "Nearest neighbours", "one_rank", "recall@8"):
        assert words in page
