"""A user's mistake is one line on stderr, exit code 2, and leaves nothing behind."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from injection import environment as ordering
from PIL import Image
from processes import FAULTY_RUNNERS, ROOT, run_bare, run_forked, run_launched, run_python

CPU = json.loads((ROOT / "ds_configs/cpu_float32.json").read_text())

# Name → (arguments, what the line must say). {d} is a directory with the files that `mistakes` makes.
MISTAKES = {
    "unknown YAML key": (["--config", "{d}/typo.yaml"], "classifier.temperatur"),
    "unknown JSON key": (["--deepspeed_config", "{d}/unknown.json"], "zero_optimisation"),
    "owned JSON key": (["--deepspeed_config", "{d}/owned.json"], "train_batch_size"),
    "micro-batch": (["--deepspeed_config", "{d}/micro.json"], "the nearest is 144"),
    "too many hard classes": (["--set", "classifier.num_hard_classes=1437"], "classifier.num_hard_classes 1437"),
    "temperature": (["--set", "classifier.temperature=0.02"], "classifier.temperature"),
    "unknown --set path": (["--set", "optimization.epoch=3"], "optimization.epoch"),
    "missing directory": (["--set", "data.kind=folder", "data.root={d}/absent"], "absent"),
    "no directory": (["--set", "data.kind=folder"], "data.root"),
    "empty folder": (["--set", "data.kind=folder", "data.root={d}/empty"], "empty"),
    "unreadable image": (["--set", "data.kind=folder", "data.root={d}/broken"], "broken.jpg"),
    "batch larger than the data": (
        ["--set", "data.limit_train=100"],
        "global_batch_size 128 exceeds the 100 images",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[subprocess.CompletedProcess[str], Path]]:
    directory = tmp_path_factory.mktemp("mistakes")
    (directory / "typo.yaml").write_text("classifier: {temperatur: 0.1}")
    (directory / "unknown.json").write_text(json.dumps({**CPU, "zero_optimisation": {}}))
    (directory / "owned.json").write_text(json.dumps({**CPU, "train_batch_size": 128}))
    (directory / "micro.json").write_text(json.dumps({**CPU, "train_micro_batch_size_per_gpu": 48}))
    (directory / "empty").mkdir()
    for name in ("broken", "few"):
        (directory / name).mkdir()
        Image.new("RGB", (8, 8)).save(directory / name / "fine.png")
    (directory / "broken/broken.jpg").write_bytes(b"not an image")

    def run(item: tuple[int, tuple[list[str], str]]) -> tuple[subprocess.CompletedProcess[str], Path]:
        number, (arguments, _) = item
        run_directory = directory / f"run_{number}"
        filled = [argument.format(d=directory) for argument in arguments]
        return run_bare("initialize_classifier", "--run-dir", str(run_directory), *filled), run_directory

    return dict(zip(MISTAKES, map(run, enumerate(MISTAKES.values())), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    name: str, results: dict[str, tuple[subprocess.CompletedProcess[str], Path]]
) -> None:
    finished, run_directory = results[name]
    assert finished.returncode == 2, finished.stderr
    lines = finished.stderr.strip().splitlines()
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("error: ")
    assert MISTAKES[name][1] in lines[0]
    assert not run_directory.exists()


def test_python_itself_ends_the_same_way(tmp_path: Path) -> None:
    arguments, expected = MISTAKES["temperature"]
    finished = run_python("initialize_classifier", "--run-dir", str(tmp_path / "run"), *arguments)
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("run", [run_forked, pytest.param(run_launched, marks=pytest.mark.full)])
def test_two_ranks_say_it_once(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the rank that says it starts up last, and the launcher ends all at the first exit that it sees."""
    arguments = ["--run-dir", str(tmp_path / "run"), "--set", "optimization.epochs=many"]
    if run is run_launched:
        record = tmp_path / "fault.txt"
        for name, value in ordering("start:0:*:sleep=5", record).items():
            monkeypatch.setenv(name, value)
        finished = run_launched("pretrain", 2, *arguments, runners=FAULTY_RUNNERS)
        assert record.exists()
    else:
        finished = run("pretrain", 2, *arguments)
    assert finished.returncode == 2
    assert finished.stderr.count("error: ") == 1
    assert "optimization.epochs" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_pipeline_on_unlabelled_images_says_so_before_it_starts(tmp_path: Path) -> None:
    arguments = ["--run-dir", str(tmp_path / "run"), "--set", "data.kind=folder", f"data.root={tmp_path}"]
    finished = run_bare("pipeline", *arguments)
    assert finished.returncode == 2
    assert "no labels" in finished.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("evaluation.knn.neighbours=[2000]", "evaluation.knn.neighbours asks for 2000"),
        ("data.limit_test=361", "data.limit_test"),
        (
            "evaluation.data.kind=tree evaluation.data.root=/absent",
            "evaluation.data: data.root /absent is not a folder",
        ),
    ],
)
def test_a_mistake_in_the_evaluation_shows_before_the_training(tmp_path: Path, override: str, expected: str) -> None:
    finished = run_bare("pipeline", "--run-dir", str(tmp_path / "run"), "--set", *override.split())
    assert finished.returncode == 2
    assert expected in finished.stderr
    assert not (tmp_path / "run").exists()


def test_a_stage_out_of_order_says_what_to_run(tmp_path: Path) -> None:
    finished = run_bare("pretrain", "--run-dir", str(tmp_path / "run"))
    assert finished.returncode == 2
    assert "runners/initialize_classifier.py" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_an_evaluation_before_its_training_says_so_before_images_are_opened(tmp_path: Path) -> None:
    arguments = ["--run-dir", str(tmp_path / "run"), "--set", "data.kind=tree", "data.root=/absent"]
    finished = run_bare("evaluate_knn", *arguments)
    assert finished.returncode == 2
    assert f"error: {tmp_path}/run has no" in finished.stderr
    assert "or give the right --run-dir" in finished.stderr
    assert not (tmp_path / "run").exists()


def test_a_set_too_small_runs_with_the_settings_that_the_message_names(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(CPU))
    base = ["--set", "data.limit_train=5", "optimization.epochs=1", "optimization.warmup_epochs=0"]
    base += ["--stages", "initialize_classifier", "pretrain", "--run-dir", str(tmp_path / "run")]
    finished = run_forked("pipeline", 2, *base, "--deepspeed_config", str(tmp_path / "ds.json"))
    assert finished.returncode == 2, finished.stderr
    fits = re.search(r'--set ((?:\S+=\d+ )+)and ("train_micro_batch_size_per_gpu": \d+) in a copy', finished.stderr)
    assert fits is not None, finished.stderr
    (tmp_path / "copy.json").write_text(json.dumps({**CPU, **json.loads(f"{{{fits[2]}}}")}))
    changes = ["--deepspeed_config", str(tmp_path / "copy.json"), "--set", *fits[1].split()]
    finished = run_forked("pipeline", 2, *base, *changes)
    assert finished.returncode == 0, finished.stderr


def test_an_image_that_breaks_in_mid_run_is_named_by_the_rank_that_met_it(tmp_path: Path) -> None:
    """A truncated file has a good header; only decoding it shows. The other rank leaves without a traceback."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(8):
        Image.effect_noise((64, 64), 90).convert("RGB").save(images / f"{number}.jpg")
    whole = (images / "7.jpg").read_bytes()
    (images / "7.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 2}))
    finished = run_forked(
        "initialize_classifier", 2, "--run-dir", str(tmp_path / "run"), "--deepspeed_config", str(tmp_path / "ds.json"),
        "--set", "data.kind=folder", f"data.root={images}", "optimization.global_batch_size=4",
        "classifier.num_hard_classes=3",
    )  # fmt: skip
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.count("error: ") == 1
    assert "7.jpg" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_LOCALID is unset in a task of Slurm's"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is unset"),
    ],
)
def test_ranks_that_nobody_told_their_place_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    finished = run_bare("pretrain", "--run-dir", str(tmp_path / "run"))
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.strip().splitlines()
    assert line.startswith(f"error: {expected}")
    assert not (tmp_path / "run").exists()
