"""Colours in the workers or on the device: one training; and the benchmark of the loaders runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run_bare

SHORT = ["optimization.epochs=2", "optimization.warmup_epochs=1", "data.limit_train=128", "augmentation.view=simclr"]


def losses(run: Path) -> list[float]:
    lines = (run / "pretrain/metrics.jsonl").read_text().splitlines()
    return [figures["train/loss"] for figures in map(json.loads, lines) if "train/loss" in figures]


def test_who_changes_the_colours_does_not_change_the_training(tmp_path: Path) -> None:
    first = run_bare("initialize_classifier", "--run-dir", str(tmp_path / "cpu"), "--set", *SHORT)
    assert first.returncode == 0, first.stdout + first.stderr
    shutil.copytree(tmp_path / "cpu", tmp_path / "device")
    for name in ("cpu", "device"):
        arguments = ["--run-dir", str(tmp_path / name), "--set", *SHORT, f"data.augment_on={name}"]
        finished = run_bare("pretrain", *arguments)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(losses(tmp_path / "cpu")) >= 2
    assert losses(tmp_path / "device") == losses(tmp_path / "cpu")


def test_the_device_is_not_asked_for_a_view_that_it_does_not_know(tmp_path: Path) -> None:
    finished = run_bare("initialize_classifier", "--run-dir", str(tmp_path), "--set", "data.augment_on=device")
    assert finished.returncode == 2
    assert (
        finished.stderr.strip()
        .splitlines()[-1]
        .endswith("data.augment_on device does not know augmentation.view digit: set it to cpu")
    )


@pytest.mark.full
def test_the_benchmark_times_every_loader(tmp_path: Path) -> None:
    folder = tmp_path / "images/nested"
    folder.mkdir(parents=True)
    for number in range(6):
        noise = np.random.RandomState(number).randint(0, 256, (60, 90, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.jpg")
    arguments = ["--images", str(tmp_path / "images"), "--image-size", "40", "--batch", "4", "--limit", "5"]
    finished = run_bare("benchmarks/data", *arguments, "--workers", "1", "--repeats", "2", "--output", str(tmp_path))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    loaders, decoders = json.loads((tmp_path / "data.json").read_text())["tables"]
    formats = ("folder", "tar, the same files", "packed, short side 256")
    ours = [f"{name}: augment_on {where}" for name in formats for where in ("cpu", "device")]
    assert [row["loader"] for row in loaders][-6:] == ours
    assert all(row["images/s"] > 0 for row in loaders)
    assert len(decoders) == 3
    assert (tmp_path / "data.md").read_text().count("| folder: augment_on") == 2
