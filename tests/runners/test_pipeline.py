"""The pipeline on the embedded digits: two ranks under the launcher, learning that is real, skipping, exact resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processes import ROOT, run_bare, run_launched

SHORT = ["--set", "optimization.epochs=12", "optimization.warmup_epochs=2", "checkpoint.every_epochs=1"]
# Evaluated with 200 labels: with all 1437 a linear classifier on random features leaves next to nothing to learn.
SHORT += ["evaluation.data.limit_train=200"]


def result(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "result.json").read_text())


def final_state(run: Path) -> dict[str, Any]:
    directory = max((run / "pretrain/checkpoints").glob("step_*"))
    return {path.name: torch.load(path, weights_only=True) for path in sorted(directory.glob("*.pt"))}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("pipeline") / "run"
    finished = run_launched("pipeline", 2, "--run-dir", str(run), *SHORT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return run, finished.stdout


def test_two_ranks_run_every_stage(two_ranks: tuple[Path, str]) -> None:
    run, output = two_ranks
    for stage in ("initialize_classifier", "pretrain", "evaluate_knn", "evaluate_linear"):
        record = result(run, stage)
        assert record["world_size"] == 2
        assert record["data"]["num_instances"] == 1437
        assert {"commit", "versions", "seconds", "date"} <= set(record)
        for name in ("config.yaml", "ds_config.json", "environment.json"):
            assert (run / stage / name).exists()
    assert len((run / "instances.txt").read_text().splitlines()) == 1437
    assert list((run / "pretrain/tensorboard").glob("events*"))
    logged = [json.loads(line) for line in (run / "pretrain/metrics.jsonl").read_text().splitlines()]
    expected = {"train/loss", "train/log_z", "train/positive_cosine", "train/instance_accuracy", "train/learning_rate"}
    assert expected | {"speed/images_per_second", "speed/data_wait_share", "memory/peak_gib"} <= set(logged[-1])
    with Image.open(run / "evaluate_knn/neighbours.png") as picture:
        assert picture.width > 500
    for words in ("raw pixels", "random network", "trained", "instance accuracy", str(run)):
        assert words in output


def test_learning_is_real(two_ranks: tuple[Path, str]) -> None:
    run, _ = two_ranks
    accuracy, chance = result(run, "pretrain")["instance_accuracy"], 1 / 1437
    assert accuracy > 50 * chance
    linear = result(run, "evaluate_linear")["figures"]
    assert linear["trained"]["top1"] > linear["random"]["top1"]
    assert linear["trained"]["top1"] > linear["pixels"]["top1"]


def test_results_say_how_they_were_got(two_ranks: tuple[Path, str]) -> None:
    run, _ = two_ranks
    knn = result(run, "evaluate_knn")["figures"]["trained"]
    assert knn["layer"] == "backbone output"
    assert {"k", "temperature", "epoch", "top1", "top5", "grid"} <= set(knn)
    assert knn["epoch"] == 12


def test_the_same_command_again_skips_what_is_complete(two_ranks: tuple[Path, str]) -> None:
    run, _ = two_ranks
    before = {path: path.stat().st_mtime_ns for path in run.rglob("result.json")}
    finished = run_bare("pipeline", "--run-dir", str(run), *SHORT)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("already complete") == 4
    assert {path: path.stat().st_mtime_ns for path in run.rglob("result.json")} == before


def test_another_setting_in_the_same_directory_is_refused(two_ranks: tuple[Path, str]) -> None:
    run, _ = two_ranks
    finished = run_bare("pretrain", "--run-dir", str(run), *SHORT, "classifier.temperature=0.2")
    assert finished.returncode == 2
    assert "classifier.temperature = 0.15, not 0.2" in finished.stderr


def test_a_resumed_run_ends_bit_for_bit_like_the_unbroken_one(two_ranks: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = two_ranks
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    shutil.rmtree(max((broken / "pretrain/checkpoints").glob("step_*")))  # as if stopped one epoch before the end
    (broken / "pretrain/result.json").unlink()
    finished = run_launched("pretrain", 2, "--run-dir", str(broken), *SHORT)
    assert finished.returncode == 0, finished.stderr
    assert "resuming from" in finished.stdout
    assert "11 epochs done" in finished.stdout
    again = run_bare("evaluate_knn", "--run-dir", str(broken), *SHORT)
    assert "already complete" in again.stdout  # it was of the same checkpoint
    unbroken, resumed = final_state(run), final_state(broken)
    assert list(unbroken) == list(resumed)
    torch.testing.assert_close(resumed, unbroken, rtol=0, atol=0)


def test_an_evaluation_of_an_older_checkpoint_is_done_again(two_ranks: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_ranks[0], run)
    newest = max((run / "pretrain/checkpoints").glob("step_*"))
    newest.rename(tmp_path / newest.name)
    finished = run_bare("evaluate_knn", "--run-dir", str(run), *SHORT)
    assert finished.returncode == 0, finished.stderr
    assert result(run, "evaluate_knn")["figures"]["trained"]["epoch"] == 11


def test_bare_stages_one_by_one_in_bfloat16(tmp_path: Path) -> None:
    arguments = ["--run-dir", str(tmp_path / "run"), "--deepspeed_config", str(ROOT / "ds_configs/cpu_bf16.json")]
    arguments += ["--set", "optimization.epochs=1", "optimization.warmup_epochs=0"]
    for stage in ("initialize_classifier", "pretrain", "evaluate_linear"):
        extra = ["evaluation.linear.protocol=sgd", "evaluation.linear.epochs=2", "evaluation.linear.learning_rate=1"]
        finished = run_bare(stage, *arguments, *extra, "data.num_workers=1")
        assert finished.returncode == 0, finished.stderr
    record = result(tmp_path / "run", "evaluate_linear")
    assert record["protocol"] == "sgd"
    assert record["figures"]["trained"]["top1"] > 20
