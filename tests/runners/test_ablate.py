"""The runner of ablations on a few digits: rows over seeds, a failure in between, and going on."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import ROOT, run_bare

pytestmark = pytest.mark.full
STAGES = ["initialize_classifier", "pretrain", "evaluate_knn"]
ABLATION: dict[str, Any] = {
    "title": "A few digits",
    "config": str(ROOT / "runners/configs/pipeline_digits.yaml"),
    "deepspeed_config": str(ROOT / "ds_configs/cpu_float32.json"),
    "stages": STAGES,
    "jobs": 2,
    "epochs": [1],
    "set": {
        "data.limit_train": 64,
        "data.limit_test": 40,
        "optimization.global_batch_size": 64,
        "optimization.warmup_epochs": 0,
        "evaluation.sources": ["trained"],
    },
    "figures": {"k-NN": "evaluate_knn:figures.*.top1", "loss": "pretrain:loss"},
    "drawn": ["k-NN"],
    "reference": "usual",
    "variants": [
        {"name": "usual"},
        {"name": "too many neighbours", "set": {"evaluation.knn.neighbours": [65]}},
        {"name": "rate", "set": {"classifier.learning_rate_multiplier": 0.5}},
    ],
}


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, str]:
    directory = tmp_path_factory.mktemp("ablation")
    (directory / "ablation.yaml").write_text(yaml.safe_dump(ABLATION))
    words = ["--config", str(directory / "ablation.yaml"), "--output", str(directory / "output")]
    finished = run_bare("ablation/ablate", *words)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    return words, directory / "output", finished.stdout


def test_a_failed_variant_does_not_hold_the_others_up(ablation: tuple[list[str], Path, str]) -> None:
    _, output, said = ablation
    assert said.count("done: ") == 2
    [failure] = [line for line in said.splitlines() if line.startswith("failed: ")]
    assert "too many neighbours" in failure
    assert "evaluation.knn.neighbours asks for 65 of 64 training images" in failure
    table = (output / "table.md").read_text()
    assert "| too many neighbours | 1 | 0 | – | – |" in table
    rows = {row["variant"]: row for row in json.loads((output / "table.json").read_text())["rows"]}
    assert rows["usual"]["figures"]["k-NN"]["n"] == 1
    assert rows["rate"]["less_reference"]["k-NN"]["n"] == 1
    run = output / "runs" / rows["usual"]["runs"]["0"]
    assert {path.parent.name for path in run.glob("*/result.json")} == set(STAGES)
    assert (output / "table.png").exists()


@pytest.mark.full
def test_going_on_does_only_what_is_not_done(ablation: tuple[list[str], Path, str]) -> None:
    words, output, _ = ablation
    before = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/*/result.json")}
    assert len(before) == 2 * len(STAGES)
    finished = run_bare("ablation/ablate", *words)
    assert "3 runs, 2 of them done" in finished.stdout
    assert {path: path.stat().st_mtime_ns for path in output.glob("runs/*/*/result.json")} == before


def test_mistakes_end_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump({**ABLATION, "variants": [{"name": "usual", "set": {"classifier.temperature": 0}}]}))
    finished = run_bare("ablation/ablate", "--config", str(path), "--output", str(tmp_path / "output"))
    assert finished.returncode == 2
    assert len(finished.stderr.strip().splitlines()) == 1
    assert "variant 'usual'" in finished.stderr
    assert "classifier.temperature" in finished.stderr
    assert not (tmp_path / "output").exists()
