"""The one command for any folder: pipeline_folder.yaml with nothing but data.root, and few epochs to be quick."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from image_files import encoded
from processes import ROOT, main_of, run_bare, run_forked, run_launched

CONFIG = ["--config", str(ROOT / "runners/configs/pipeline_folder.yaml")]
SHORT = ["optimization.epochs=2", "data.num_workers=0"]


def folder_of(root: Path, names: list[str], side: int = 20) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(number, Path(name).suffix, side))
    return root


def arguments(run: Path, images: Path, *settings: str) -> list[str]:
    return [*CONFIG, "--run-dir", str(run), "--set", f"data.root={images}", *SHORT, *settings]


def recorded(run: Path, stage: str = "pretrain") -> tuple[dict[str, Any], dict[str, Any]]:
    """The stage's configuration and its DeepSpeed JSON."""
    directory = run / stage
    return yaml.safe_load((directory / "config.yaml").read_text()), json.loads(
        (directory / "ds_config.json").read_text()
    )


def chosen_in(output: str) -> dict[str, str]:
    return dict(re.findall(r"^auto: (\S+) = (\S+) \(.+\)$", output, flags=re.MULTILINE))


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, CompletedProcess[str]]:
    """A finished run on 20 images without labels: its directory, the images, and what it printed. Read only."""
    root = tmp_path_factory.mktemp("folder")
    images = folder_of(root / "my images", [f"{number} é\n.png" for number in range(20)])
    finished = run_bare("pipeline", *arguments(root / "my run", images))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return root / "my run", images, finished


def test_twenty_images_are_trained_on_and_evaluations_skipped(
    unlabelled: tuple[Path, Path, CompletedProcess[str]],
) -> None:
    run, _, finished = unlabelled
    for stage in ("evaluate_knn", "evaluate_linear"):
        assert f"{stage}: skipped, for the images have no labels to evaluate with" in finished.stdout
        assert not (run / stage).exists()
    assert json.loads((run / "pretrain/result.json").read_text())["steps"] == 10
    assert (run / "summary.txt").exists()


def test_every_choice_is_printed_and_recorded(unlabelled: tuple[Path, Path, CompletedProcess[str]]) -> None:
    run, _, finished = unlabelled
    config, ds = recorded(run)
    printed = chosen_in(finished.stdout)
    assert printed.pop("train_micro_batch_size_per_gpu") == str(ds["train_micro_batch_size_per_gpu"]) == "4"
    assert "auto" not in {config["data"]["kind"], *config["optimization"].values()}
    assert printed == {
        "data.kind": "folder", "data.image_size": "16", "model.backbone": "small_cnn",
        "augmentation.min_crop_scale": "0.2", "optimization.global_batch_size": "4",
        "optimization.learning_rate": "0.001875", "optimization.warmup_epochs": "0", "classifier.num_hard_classes": "1",
    }  # fmt: skip
    for key, value in printed.items():
        section, name = key.split(".")
        assert str(config[section][name]) == value, key


def test_the_commands_at_the_end_work_as_they_are_printed(
    unlabelled: tuple[Path, Path, CompletedProcess[str]],
) -> None:
    run, images, _ = unlabelled
    lines = (run / "summary.txt").read_text().splitlines()
    export = next(line.partition(": ")[2] for line in lines if line.startswith("the backbone as files: "))
    assert export == f"python runners/export.py --config '{run}/pretrain/config.yaml' --run-dir '{run}'"
    assert f"the page of this run: python runners/report.py '{run}'" in lines
    words = ["--config", str(run / "pretrain/config.yaml"), "--run-dir", str(run), "--set", f"export.images={images}"]
    finished = run_bare("export", *words, "export.formats=[pth]")
    assert finished.returncode == 0, finished.stderr
    assert (run / "export/images/embeddings.npy").exists()
    assert (run / "export/backbone.pth").exists()
    assert main_of("report")([str(run), "--output", str(run.parent / "report.html")]) == 0


def test_the_same_command_on_other_ranks_keeps_the_choices(
    unlabelled: tuple[Path, Path, CompletedProcess[str]],
) -> None:
    """Even where other ones would be made there, and complete stages stay complete."""
    run, images, _ = unlabelled
    before = recorded(run)[0]
    finished = run_forked("pipeline", 2, *arguments(run, images))
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("already complete") == 2
    assert "optimization.global_batch_size = 4" in finished.stdout
    assert chosen_in(finished.stdout) == {"train_micro_batch_size_per_gpu": "2"}
    assert recorded(run)[0] == before
    finished = run_forked("pipeline", 3, *arguments(run, images))
    assert finished.returncode == 2
    assert finished.stderr.count("error: ") == 1
    assert "optimization.global_batch_size 4 cannot be divided over 3 ranks: start 1 or 2 or 4" in finished.stderr


@pytest.mark.parametrize(("count", "ranks", "batch"), [(2, 1, 1), pytest.param(3, 2, 2, marks=pytest.mark.full)])
def test_two_images_are_enough(tmp_path: Path, count: int, ranks: int, batch: int) -> None:
    images = folder_of(tmp_path / "images", [f"{number}.jpg" for number in range(count)])
    finished = run_forked("pipeline", ranks, *arguments(tmp_path / "run", images))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert recorded(tmp_path / "run")[0]["optimization"]["global_batch_size"] == batch


CLASSES = [f"{name}/{number}.png" for name in ("a cat", "dog\n", "emu") for number in range(7)]


def test_labels_in_folders_switch_the_evaluations_on(tmp_path: Path) -> None:
    images, run = folder_of(tmp_path / "images", CLASSES), tmp_path / "images/runs/one"
    for attempt in range(2):  # the second beside the first one's pictures, which are in the folder itself
        finished = run_bare("pipeline", *arguments(run, images))
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert finished.stdout.count("already complete") == 4 * attempt
        assert (
            "evaluation: 3 images, a fifth of each class drawn with seed 0, are held out to test on" in finished.stdout
        )
        assert "pretraining sees all images, without their labels" in finished.stdout
    config = recorded(run)[0]
    assert config["data"]["kind"] == "class_folders"
    assert config["evaluation"]["knn"]["neighbours"] == [5]
    for stage in ("evaluate_knn", "evaluate_linear"):
        result = json.loads((run / stage / "result.json").read_text())
        assert set(result["figures"]) == {"random", "trained"}
        assert result["data"]["num_instances"] == len(CLASSES)
        assert result["data"]["held_out"] == {"compared_with": 18, "tested_on": 3, "seed": 0}
    assert "k-NN top-1" in finished.stdout
    assert main_of("report")([str(run)]) == 0


@pytest.mark.full
def test_imagenets_layout_is_evaluated_on_its_own_test_part(tmp_path: Path) -> None:
    names = [f"{part}/{name}" for part in ("train", "val") for name in CLASSES]
    images, run = folder_of(tmp_path / "images", names), tmp_path / "run"
    finished = run_forked("pipeline", 2, *arguments(run, images))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert recorded(run)[0]["data"]["kind"] == "tree"
    assert json.loads((run / "evaluate_knn/result.json").read_text())["data"]["num_instances"] == len(CLASSES)


@pytest.mark.full
@pytest.mark.parametrize("labelled", [False, True])
def test_the_launcher_runs_it_too(tmp_path: Path, labelled: bool) -> None:
    names = CLASSES if labelled else [f"{number}.png" for number in range(20)]
    images, run = folder_of(tmp_path / "images", names), tmp_path / "run"
    finished = run_launched("pipeline", 2, *arguments(run, images))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (run / "evaluate_knn/result.json").exists() == labelled
    assert finished.stdout.count("auto: data.kind") == 1


def alone(root: Path) -> Path:
    return folder_of(root, ["one.png"])


def empty(root: Path) -> Path:
    root.mkdir()
    (root / "notes\n.txt").write_text("")
    return root


def broken(root: Path) -> Path:
    folder_of(root, [f"{number}.png" for number in range(9)])
    (root / "broken\n.png").write_bytes(b"no image")
    return root


def absent(root: Path) -> Path:
    return root / "absent"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (alone, "1 images cannot be divided over 1 ranks"),
        (empty, "holds no .jpeg, .jpg, .png, .webp file"),
        (broken, "1 of 10"),
        (absent, "is not a folder that can be reached"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    tmp_path: Path, make: Callable[[Path], Path], expected: str
) -> None:
    finished = run_bare("pipeline", *arguments(tmp_path / "run", make(tmp_path / "images")))
    assert finished.returncode == 2, finished.stdout
    (line,) = finished.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_an_evaluation_alone_needs_labels(tmp_path: Path, unlabelled: tuple[Path, Path, CompletedProcess[str]]) -> None:
    run, images, _ = unlabelled
    finished = run_bare("evaluate_knn", *arguments(run, images))
    assert finished.returncode == 2
    (line,) = finished.stderr.strip().splitlines()
    assert "data.kind auto: no labels to evaluate with" in line
    assert not (run / "evaluate_knn").exists()


def test_auto_works_in_any_other_file(tmp_path: Path) -> None:
    """Here the demo's, whose batch alone is left open, with a JSON that gives the micro-batch."""
    (tmp_path / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 16}))
    finished = run_bare(
        "pipeline", "--run-dir", str(tmp_path / "run"), "--deepspeed_config", str(tmp_path / "ds.json"),
        "--stages", "initialize_classifier", "--set", "optimization.global_batch_size=auto", "data.limit_train=500",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert chosen_in(finished.stdout) == {"optimization.global_batch_size": "96"}
    config, ds = recorded(tmp_path / "run", "initialize_classifier")
    assert config["optimization"]["global_batch_size"] == 96
    assert (ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]) == (16, 6)
