"""The runner, on two ranks, from a file of weights; and mistakes in what is to be evaluated, before any work."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_bare, run_forked

from instance_ssl.models.backbones import build_backbone


def test_two_ranks_export_a_file_and_a_folder(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(7)
    state = build_backbone("small_cnn", "auto", 16).state_dict()
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "weights.pth")
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.effect_noise((20, 20), 60).convert("RGB").save(tmp_path / f"images/{number}.png")
    run = tmp_path / "run"
    finished = run_forked(
        "export", 2, "--run-dir", str(run), "--set", "export.source=weights", "export.formats=[safetensors]",
        f"evaluation.weights={tmp_path}/weights.pth", f"export.images={tmp_path}/images", "data.num_workers=1",
        "optimization.global_batch_size=4097", "classifier.num_hard_classes=5000",  # which an export never uses
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    exported = safetensors.load_file(run / "export/backbone.safetensors")
    assert exported.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(exported[name], value), name
    assert np.load(run / "export/images/features.npy").shape == (3, 128)
    assert not (run / "export/images/embeddings.npy").exists()  # a file has no projection
    result = json.loads((run / "export/result.json").read_text())
    assert result["images"]["num_images"] == 3
    assert json.loads((run / "export/status.json").read_text())["state"] == "complete"


def test_a_forgotten_run_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data: {kind: digits, image_size: 16}\nmodel: {backbone: small_cnn}\n")
    finished = run_bare("export", "--config", str(tmp_path / "mine.yaml"))
    assert finished.returncode == 2, finished.stderr
    assert "--run-dir is not given" in finished.stderr
    assert "runs/mine" in finished.stderr
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("evaluation.weights={d}/absent.pth", "evaluation.weights {d}/absent.pth does not exist"),
        ("evaluation.weights={d}/code.pth", "cannot be loaded: it holds more than tensors"),
    ],
)
def test_a_wrong_weights_file_is_one_line_and_exit_code_2(override: str, expected: str, tmp_path: Path) -> None:
    torch.save({"a": Path("a class that is no tensor")}, tmp_path / "code.pth")
    overrides = [override.format(d=tmp_path), "evaluation.sources=[weights]"]
    finished = run_bare("evaluate_knn", "--run-dir", str(tmp_path / "run"), "--set", *overrides)
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.count("\n") == 1
    assert expected.format(d=tmp_path) in finished.stderr
