"""Semi-supervised evaluation and fine-tuning on the digits: on two ranks, skipped when done, resumed, refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from processes import run_bare, run_forked

SHORT = {
    "evaluation.sources": "[pixels,random]",
    "evaluation.semi_supervised.fractions": "[0.05,0.1]",
    "evaluation.semi_supervised.epochs": "2",
    "evaluation.semi_supervised.global_batch_size": "32",
    "evaluation.fine_tune.random_learning_rates": "[0.1,1e30]",
    "evaluation.fine_tune.weight_decays": "[1e-3]",
    "evaluation.fine_tune.random_steps": "12",
    "data.limit_train": "401",
}


def arguments(run: Path, **changes: str) -> list[str]:
    settings = {**SHORT, **{key.replace("__", "."): value for key, value in changes.items()}}
    return ["--run-dir", str(run), "--set", *(f"{key}={value}" for key, value in settings.items())]


def result(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "result.json").read_text())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("few_labels") / "run"
    finished = run_forked("evaluate_semi_supervised", 2, *arguments(run))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return run


def test_two_ranks_say_how_they_got_their_figures(two_ranks: Path) -> None:
    record = result(two_ranks, "evaluate_semi_supervised")
    assert record["world_size"] == 2
    assert list(record["figures"]) == ["random"]  # pixels have no network
    assert (record["evaluated_on"]["kind"], record["evaluated_on"]["num_classes"]) == ("digits", 10)
    few, more = record["figures"]["random"]["fractions"]
    assert (few["train_images"], more["train_images"]) == (20, 40)
    for row, steps in ((few, 2), (more, 4)):
        assert row["test_images"] == 360
        assert 0 < row["top1"] < row["top5"] <= 100
        assert row["recipe"]["steps"] == steps
        assert row["recipe"]["milestones"] == [1, 2]
        names = (two_ranks / row["labels"]).read_text().splitlines()
        assert len(names) == row["train_images"]
    metrics = (two_ranks / "evaluate_semi_supervised/metrics.jsonl").read_text()
    assert "semi_supervised/random_0.1_top1" in metrics
    assert list((two_ranks / "evaluate_semi_supervised/tensorboard").glob("events*"))


def test_a_drawn_list_given_back_is_the_same_training_and_only_what_is_new_is_done(
    two_ranks: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_ranks, run)
    drawn = run / "evaluate_semi_supervised/labels_0.1.txt"
    changes = {
        "evaluation__semi_supervised__fractions": "[0.1,0.2]",
        "evaluation__semi_supervised__list_files": f"[{drawn},{tmp_path / 'own.txt'}]",
    }
    (tmp_path / "own.txt").write_text("\n".join(drawn.read_text().splitlines()[:12]))
    finished = run_bare("evaluate_semi_supervised", *arguments(run, **changes))
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("done before") == 1
    assert "semi-supervised (random): 2 trainings, 6 steps in all" in finished.stdout
    same, other = result(run, "evaluate_semi_supervised")["figures"]["random"]["fractions"]
    before = result(two_ranks, "evaluate_semi_supervised")["figures"]["random"]["fractions"][1]
    assert (same["top1"], same["labels"]) == (before["top1"], str(drawn))
    assert other["train_images"] == 12


def test_the_grid_is_compared_on_held_out_images_and_its_best_point_retrained(tmp_path: Path) -> None:
    finished = run_bare("evaluate_fine_tune", *arguments(tmp_path / "run"))
    assert finished.returncode == 0, finished.stderr
    assert "fine-tuning (random): 3 trainings, 36 steps in all" in finished.stdout
    figures = result(tmp_path / "run", "evaluate_fine_tune")["figures"]["random"]
    good, diverged = figures["grid"]
    assert good["held_out_top1"] > 0
    assert (diverged["learning_rate"], diverged["held_out_top1"]) == (1e30, None)
    assert (figures["held_out_images"], figures["train_images"], figures["test_images"]) == (40, 401, 360)
    chosen = figures["recipe"]
    assert (chosen["classifier_learning_rate"], chosen["weight_decay"]) == (0.1, pytest.approx(0.01))
    assert (chosen["nesterov"], chosen["batch_norm_rule"], chosen["steps"]) == (True, True, 12)
    again = run_bare("evaluate_fine_tune", *arguments(tmp_path / "run", evaluation__fine_tune__metric="mean_per_class"))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 3
    assert result(tmp_path / "run", "evaluate_fine_tune")["figures"]["random"]["metric"] == "mean_per_class"


@pytest.mark.parametrize(
    ("runner", "changes", "expected"),
    [
        (
            "evaluate_semi_supervised",
            {"evaluation__semi_supervised__list_files": "[{d}/absent.txt,{d}/absent.txt]"},
            "names 1 of 1 images that are not among the 401 training images, the first 'n01440764_10026.JPEG'",
        ),
        ("evaluate_fine_tune", {"evaluation__sources": "[pixels]"}, "evaluation.sources names pixels alone"),
        (
            "evaluate_fine_tune",
            {"evaluation__fine_tune__random_learning_rates": "[1e30,1e31]"},
            "diverged at every point of the grid",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, runner: str, changes: dict[str, str], expected: str) -> None:
    (tmp_path / "absent.txt").write_text("n01440764_10026.JPEG\n")
    filled = {key: value.format(d=tmp_path) for key, value in changes.items()}
    finished = run_bare(runner, *arguments(tmp_path / "run", **filled))
    assert finished.returncode == 2, finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1
    assert expected in finished.stderr
