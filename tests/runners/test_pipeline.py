"""The pipeline on the embedded digits: two ranks under the launcher, learning that is real, skipping, exact resume."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processes import ROOT, run_bare, run_forked
from shared_pipeline import EPOCHS, FLAGS, Pipeline


def result(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "result.json").read_text())


def final_state(run: Path) -> dict[str, Any]:
    directory = max((run / "pretrain/checkpoints").glob("step_*"))
    return {path.name: torch.load(path, weights_only=True) for path in sorted(directory.glob("*.pt"))}


def test_two_ranks_run_every_stage(pipeline: Pipeline) -> None:
    run = pipeline.run
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
        assert words in pipeline.output


def test_learning_is_real(pipeline: Pipeline) -> None:
    run = pipeline.run
    accuracy, chance = result(run, "pretrain")["instance_accuracy"], 1 / 1437
    assert accuracy > 50 * chance
    linear = result(run, "evaluate_linear")["figures"]
    assert linear["trained"]["top1"] > linear["random"]["top1"]
    assert linear["trained"]["top1"] > linear["pixels"]["top1"]


def test_results_say_how_they_were_got(pipeline: Pipeline) -> None:
    run = pipeline.run
    knn = result(run, "evaluate_knn")["figures"]["trained"]
    assert knn["layer"] == "backbone output"
    assert {"k", "temperature", "epoch", "top1", "top5", "grid"} <= set(knn)
    assert knn["epoch"] == EPOCHS


def test_the_same_command_again_skips_what_is_complete(pipeline: Pipeline) -> None:
    run = pipeline.run
    before = {path: path.stat().st_mtime_ns for path in run.rglob("result.json")}
    finished = run_bare("pipeline", "--run-dir", str(run), *FLAGS)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("already complete") == 4
    assert {path: path.stat().st_mtime_ns for path in run.rglob("result.json")} == before


def test_another_setting_in_the_same_directory_is_refused(pipeline: Pipeline) -> None:
    run = pipeline.run
    finished = run_bare("pretrain", "--run-dir", str(run), *FLAGS, "classifier.temperature=0.2")
    assert finished.returncode == 2
    assert "classifier.temperature = 0.15, not 0.2" in finished.stderr


def test_a_resumed_run_ends_bit_for_bit_like_the_unbroken_one(pipeline: Pipeline, tmp_path: Path) -> None:
    run = pipeline.run
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    shutil.rmtree(max((broken / "pretrain/checkpoints").glob("step_*")))  # as if stopped one epoch before the end
    (broken / "pretrain/result.json").unlink()
    finished = run_forked("pretrain", 2, "--run-dir", str(broken), *FLAGS)
    assert finished.returncode == 0, finished.stderr
    assert "resuming from" in finished.stdout
    assert f"{EPOCHS - 1} epochs done" in finished.stdout
    again = run_bare("evaluate_knn", "--run-dir", str(broken), *FLAGS)
    assert "already complete" in again.stdout  # it was of the same checkpoint
    unbroken, resumed = final_state(run), final_state(broken)
    assert list(unbroken) == list(resumed)
    torch.testing.assert_close(resumed, unbroken, rtol=0, atol=0)


def test_an_evaluation_of_an_older_checkpoint_is_done_again(pipeline: Pipeline, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pipeline.run, run)
    newest = max((run / "pretrain/checkpoints").glob("step_*"))
    newest.rename(tmp_path / newest.name)
    finished = run_bare("evaluate_knn", "--run-dir", str(run), *FLAGS)
    assert finished.returncode == 0, finished.stderr
    assert result(run, "evaluate_knn")["figures"]["trained"]["epoch"] == EPOCHS - 1


@pytest.mark.parametrize(("images", "least"), [(128, None), pytest.param(1437, 20, marks=pytest.mark.full)])
def test_bare_stages_one_by_one_in_bfloat16(images: int, least: float | None, tmp_path: Path) -> None:
    """A CPU without bfloat16 instructions takes forty times as long as in float32: few images, or minutes."""
    arguments = ["--run-dir", str(tmp_path / "run"), "--deepspeed_config", str(ROOT / "ds_configs/cpu_bf16.json")]
    arguments += ["--set", "optimization.epochs=1", "optimization.warmup_epochs=0", "data.num_workers=1"]
    arguments += [f"data.limit_train={images}", "evaluation.sources=[trained]", "evaluation.linear.protocol=sgd"]
    arguments += ["evaluation.linear.epochs=2", "evaluation.linear.learning_rate=1"]
    for stage in ("initialize_classifier", "pretrain", "evaluate_linear"):
        finished = run_bare(stage, *arguments)
        assert finished.returncode == 0, finished.stderr
    record = result(tmp_path / "run", "evaluate_linear")
    assert record["protocol"] == "sgd"
    logged = (tmp_path / "run/pretrain/metrics.jsonl").read_text().splitlines()
    losses = [line["train/loss"] for line in map(json.loads, logged) if "train/loss" in line]
    assert losses
    assert all(map(math.isfinite, losses))
    if least is not None:
        assert record["figures"]["trained"]["top1"] > least
