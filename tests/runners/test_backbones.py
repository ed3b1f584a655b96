"""Networks of timm, torchvision and one's own, and given weights, through every stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, run_bare, run_forked

CONFIG = str(ROOT / "runners/configs/pipeline_digits.yaml")
SMALL = [
    "data.image_size=32",
    "data.limit_train=96",
    "data.limit_test=60",
    "optimization.epochs=2",
    "optimization.warmup_epochs=0",
    "optimization.global_batch_size=48",
    "classifier.num_hard_classes=5",
    "evaluation.sources=[random,trained]",
    "evaluation.knn.neighbours=[5]",
    "evaluation.linear.protocol=cached",
    "evaluation.linear.l2_penalties=[0.01]",
]
OWN = "from torch import nn\n\ndef network(width):\n    return nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.GELU())\n"
VIT = ["model.backbone=timm/vit_tiny_patch16_224", "model.backbone_options={depth: 2, embed_dim: 48, num_heads: 3}"]
CONVNEXT = [
    "model.backbone=timm/convnext_atto",
    "model.backbone_options={depths: [1, 1, 1, 1], dims: [8, 16, 24, 32]}",
]
MOBILENET = ["model.backbone=torchvision/mobilenet_v3_small"]
OWN_NETWORK = ["model.backbone=own_networks:network", "model.backbone_options.width=24"]


def result(run: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / stage / "result.json").read_text())
    return found


def flags(run: Path, *settings: str) -> list[str]:
    micro = run.parent / "ds.json"
    json_of = json.loads((ROOT / "ds_configs/cpu_float32.json").read_text())
    micro.write_text(json.dumps({**json_of, "train_micro_batch_size_per_gpu": 24}))
    return ["--config", CONFIG, "--deepspeed_config", str(micro), "--run-dir", str(run), "--set", *SMALL, *settings]


@pytest.mark.parametrize(
    "settings",
    [
        VIT,
        pytest.param(CONVNEXT, marks=pytest.mark.full),
        pytest.param(MOBILENET, marks=pytest.mark.full),
        pytest.param(OWN_NETWORK, marks=pytest.mark.full),
    ],
    ids=lambda settings: settings[0].rpartition("=")[2],
)
def test_any_backbone_goes_through_every_stage(settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "own_networks.py").write_text(OWN)
    run = tmp_path / "run"
    words = flags(run, *settings)
    for runner in ("pipeline", "evaluate_retrieval", "evaluate_similarity", "export"):
        finished = run_bare(runner, *words, cwd=tmp_path)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    planned = run_bare("plan", *words[:4], "--world-size", "2", *words[6:], cwd=tmp_path)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert set(result(run, "evaluate_knn")["figures"]) == {"random", "trained"}
    card = json.loads((run / "export/model_card.json").read_text())
    assert card["architecture"] == settings[0].partition("=")[2]
    state = torch.load(run / "export/backbone.pth", weights_only=True)
    assert state.keys() == {
        name.removeprefix("backbone.network.")
        for name in torch.load(next((run / "pretrain/checkpoints").glob("step_*/encoder.pt")), weights_only=True)[
            "state"
        ]
        if name.startswith("backbone.")
    }
    assert run_bare("report", str(run)).returncode == 0
    again = run_bare("pipeline", *words, cwd=tmp_path)
    assert again.stdout.count("already complete") == 4


@pytest.mark.full
@pytest.mark.parametrize("settings", [VIT, CONVNEXT, MOBILENET], ids=lambda settings: settings[0].rpartition("=")[2])
def test_every_knob_of_the_json_works_with_any_backbone(settings: list[str], tmp_path: Path) -> None:
    """Two ranks, ZeRO 2, bfloat16 autocast, accumulation and recomputation end near plain float32 on one rank."""
    losses = []
    for name, ranks, knobs in (
        ("plain", 1, {"train_micro_batch_size_per_gpu": 48}),
        (
            "all",
            2,
            {
                "train_micro_batch_size_per_gpu": 12,
                "zero_optimization": {"stage": 2},
                "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
                "activation_checkpointing": {},
            },
        ),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(knobs))
        words = ["--config", CONFIG, "--deepspeed_config", str(tmp_path / f"{name}.json")]
        words += ["--run-dir", str(tmp_path / name), "--set", *SMALL, *settings]
        stages = ["--stages", "initialize_classifier", "pretrain"]
        finished = run_forked("pipeline", ranks, *words, *stages)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        losses.append(result(tmp_path / name, "pretrain")["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_given_weights_are_where_the_training_starts(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    settings = [*VIT, "evaluation.sources=[trained]"]
    finished = run_bare("pipeline", *flags(first, *settings))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert run_bare("export", *flags(first, *settings, "export.formats=[pth]")).returncode == 0
    of_file = result(first, "evaluate_knn")["figures"]["trained"]["top1"]
    first_words: list[str] = []
    for number, given in enumerate((first / "export/backbone.pth", first)):
        run = second / str(number)
        run.parent.mkdir(exist_ok=True)
        words = flags(run, *VIT, f"model.initial_weights={given}", "evaluation.sources=[random,trained]", "seed=1")
        first_words = words if number == 0 else first_words
        finished = run_forked("pipeline", 2, *words)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "initial weights" in finished.stdout
        figures = result(run, "evaluate_knn")["figures"]
        assert figures["random"]["top1"] == of_file
        origin = result(run, "initialize_classifier")["initial_weights"]
        assert str(first) in str(origin)
    assert run_bare("export", *first_words, "export.formats=[pth]").returncode == 0
    card = json.loads((second / "0/export/model_card.json").read_text())
    assert len(card["initial_weights"]["sha256"]) == 64
    assert str(first) not in json.dumps(card)
    (first / "export/backbone.pth").unlink()  # what a run was started from is not needed again
    finished = run_forked("pipeline", 2, *first_words)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.backbone=resnet5"], "model.backbone: expected resnet18, resnet34"),
        (["model.backbone=timm/vit_tinny_patch16_224"], "the nearest: vit_tiny_patch16"),
        (["model.backbone=resnet18", "model.backbone_options.width=3"], "model.backbone_options are for networks of"),
        (["model.initial_weights=nowhere.pth"], "model.initial_weights nowhere.pth"),
        (["model.initial_weights=timm"], "model.initial_weights timm needs model.backbone timm/NAME"),
        ([*VIT, "model.initial_weights=small.pth"], "does not fit this encoder"),
        ([*VIT, "model.initial_weights=torchvision"], "needs a network of torchvision"),
    ],
)
def test_a_mistake_is_one_line(settings: list[str], said: str, tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "small.pth")
    finished = run_bare("initialize_classifier", *flags(tmp_path / "run", *settings), cwd=tmp_path)
    assert finished.returncode == 2, finished.stdout + finished.stderr
    assert said in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "run").rglob("checkpoints/step_*"))
