"""`plan.py` and `benchmarks/paper_memory.py`: the paper's setting, and mistakes in one line."""

import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from processes import ROOT, main_of, run_bare

import paper_memory
from instance_ssl.run.console import exit_code_of

PAPER = ["--config", str(ROOT / "runners/configs/pipeline_imagenet_resnet50.yaml")]
FOLDER = str(ROOT / "runners/configs/pipeline_folder.yaml")
PAPER += ["--deepspeed_config", str(ROOT / "ds_configs/v100_fp16.json"), "--world-size", "64"]


def cells_of(output: str) -> dict[str, list[str]]:
    """A printed table's rows by their first cell."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    return {name: others for name, *others in rows}


def test_the_papers_setting_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_of("plan")([*PAPER, "--num-instances", "1281167"]) == 0
    cells = cells_of(capsys.readouterr().out)
    # 28 M float32 gradients in a ring of 64, and 24.3 GFLOP a view (NVIDIA's ResNet-50 and the head).
    assert cells["encoder: all_reduce, MB sent"] == ["220.24", "220.24"]
    assert float(cells["encoder: TFLOP"][0]) == pytest.approx(128 * 24.3e9 / 1e12, rel=0.01)
    assert float(cells["most classes in 32 GiB"][0].split()[0]) > 300


@pytest.mark.full
def test_table_1_and_figure_3_are_printed_and_drawn(tmp_path: Path) -> None:
    finished = run_bare("benchmarks/paper_memory", "--output", str(tmp_path / "plan"))
    assert finished.returncode == 0, finished.stderr
    cells = cells_of(finished.stdout)
    # The paper says neither what its GB are nor its encoder's precision: this is a check of the size, not the digits.
    assert float(cells["ImageNet-21K, 14.20 M"][2]) == pytest.approx(21.51, rel=0.15)
    assert float(cells["most classes in 32 GiB"][2].split()[0]) == pytest.approx(30, rel=0.15)
    with Image.open(tmp_path / "plan/figure3.png") as picture:
        assert picture.width > 1000


def test_what_is_auto_is_chosen_as_on_gpus_of_this_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """The micro-batch is the largest that fits: all of a rank's part, or the next divisor."""
    words = ["--config", FOLDER, "--world-size", "3", "--num-instances", "500", "--set", "data.image_size=16"]
    words += ["model.backbone=small_cnn"]
    assert main_of("plan")(words) == 0
    roomy = capsys.readouterr().out
    assert "auto: optimization.global_batch_size = 96 (" in roomy
    assert "auto: train_micro_batch_size_per_gpu = 32 (of 32 images a rank" in roomy
    assert float(cells_of(roomy)["peak"][0]) > 8
    assert main_of("plan")([*words[:6], "--gpu-memory-gib", str(8 / 1024), *words[6:]]) == 0
    tight = capsys.readouterr().out
    assert "auto: train_micro_batch_size_per_gpu = 32" not in tight
    assert float(cells_of(tight)["peak"][0]) <= 8


def test_images_of_the_demo_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_of("plan")(["--world-size", "2"]) == 0
    output = capsys.readouterr().out
    assert "1,437 images" in output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (PAPER, "--num-instances"),
        (["--world-size", "0"], "--world-size 0"),
        (["--world-size", "3"], "optimization.global_batch_size"),
        (["--world-size", "2", "--gpu-memory-gib", "-1"], "--gpu-memory-gib"),
        (["--world-size", "2", "--num-instances", "100"], "exceeds the 100 images"),
        (["--world-size", "2", "--set", "model.width=3"], "model.width"),
        (
            ["--config", FOLDER, "--world-size", "2", "--num-instances", "500"],
            "data.image_size is auto, and no image is opened here",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_of("plan")(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert len(printed.err.strip().splitlines()) == 1
    assert expected in printed.err


def test_a_setting_that_is_not_the_papers_is_drawn_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--config", str(ROOT / "runners/configs/pipeline_digits.yaml")]
    files += ["--deepspeed_config", str(ROOT / "ds_configs/cpu_float32.json")]
    words = [*files, "--world-size", "2", "--output", str(tmp_path / "plan")]
    monkeypatch.setattr(sys, "argv", ["paper_memory.py", *words])
    assert exit_code_of(lambda: paper_memory._run(paper_memory._arguments())) == 0
    assert "not the paper's setting" in capsys.readouterr().out
    assert (tmp_path / "plan/figure3.png").stat().st_size > 0
