"""The benchmark of peers on a few digits: ours and another, measured alike."""

import json
from pathlib import Path

import pytest
from processes import run_bare

FEW = ["--set", "data.limit_train=64", "data.limit_test=40", "optimization.global_batch_size=64"]
FEW += [
    "optimization.epochs=2",
    "optimization.warmup_epochs=0",
    "checkpoint.every_epochs=1",
    "checkpoint.keep_every_epochs=1",
]
KEYS = {"knn_top1", "linear_top1", "training_seconds", "training_images_per_second", "training_peak_mib", "curve"}


def test_our_curve_has_every_kept_checkpoint_and_the_seconds_it_took(tmp_path: Path) -> None:
    finished = run_bare("benchmarks/peers", "--run-dir", str(tmp_path), *FEW)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "own/result.json").read_text())
    assert set(result) >= KEYS
    assert [point["epoch"] for point in result["curve"]] == [1, 2]
    seconds = [point["seconds"] for point in result["curve"]]
    taken = [
        json.loads((tmp_path / s / "result.json").read_text())["seconds"] for s in ("initialize_classifier", "pretrain")
    ]
    assert taken[0] < seconds[0] < seconds[1] <= sum(taken) + 0.01


def test_a_peer_is_trained_and_measured(tmp_path: Path) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed (the benchmark extra)")
    words = ["--run-dir", str(tmp_path), "--stages", "instdisc", "moco_v2", *FEW, "classifier.num_sampled_classes=32"]
    finished = run_bare("benchmarks/peers", *words)
    assert finished.returncode == 0, finished.stderr
    for name in ("instdisc", "moco_v2"):
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert set(result) >= KEYS
        assert [point["epoch"] for point in result["curve"]] == [1, 2]
        assert result["knn_top1"] == result["curve"][-1]["knn_top1"]
