"""The classifier's layouts on two ranks: copies of W, bfloat16 rows, sampled classes; and its benchmark."""

import csv
import json
from pathlib import Path

import pytest
from processes import run_bare, run_forked

SHORT = ["optimization.epochs=3", "optimization.warmup_epochs=1"]
STAGES = ("initialize_classifier", "pretrain")


@pytest.mark.full
def test_sampled_classes_over_copies_of_w(tmp_path: Path) -> None:
    settings = {
        "train_micro_batch_size_per_gpu": 64,
        "activation_checkpointing": {},
        "instance_classifier": {
            "block_mib": 0.5,
            "group_size": 1,
            "row_dtype": "bfloat16",
            "momentum_dtype": "bfloat16",
            "matmul_dtype": "auto",
            "kernels": "torch",
        },
    }
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    arguments = ["--deepspeed_config", str(tmp_path / "ds.json"), "--run-dir", str(tmp_path / "run"), "--set", *SHORT]
    arguments += ["classifier.sampling=recent", "classifier.num_sampled_classes=512"]
    arguments += ["classifier.smoothing_factor=0", "classifier.num_hard_classes=0"]
    for stage in STAGES:
        finished = run_forked(stage, 2, *arguments)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    logged = [json.loads(line) for line in (tmp_path / "run/pretrain/metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["train/loss"] < logged[0]["train/loss"]
    assert logged[-1]["train/log_z"] < 6.24 + 6.7  # at most log 512 + 1/τ: the softmax is over 512 classes


def test_sampling_with_smoothing_is_refused(tmp_path: Path) -> None:
    finished = run_bare("pretrain", "--run-dir", str(tmp_path / "run"), "--set", "classifier.sampling=random")
    assert finished.returncode == 2
    assert "set classifier.smoothing_factor to 0" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_triton_without_a_gpu_is_refused(tmp_path: Path) -> None:
    settings = {"train_micro_batch_size_per_gpu": 64, "instance_classifier": {"kernels": "triton"}}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    arguments = ["--deepspeed_config", str(tmp_path / "ds.json"), "--run-dir", str(tmp_path / "run")]
    finished = run_bare("initialize_classifier", *arguments)
    assert finished.returncode == 2
    assert finished.stderr.strip().splitlines()[-1].startswith("error: instance_classifier.kernels triton needs")


@pytest.mark.full
def test_the_benchmark_times_every_layout(tmp_path: Path) -> None:
    arguments = ["--num-classes", "1501", "3002", "--batch", "32", "--repeats", "2", "--output", str(tmp_path)]
    variants = ["replicated-dense", "sharded-dense", "replicated-streamed", "streamed", "streamed-auto"]
    finished = run_forked("benchmarks/classifier", 2, *arguments, "--variants", *variants)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    with (tmp_path / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == variants * 2
    sent = {row["variant"]: int(row["sent_bytes"]) for row in rows[5:]}
    # Two ranks: a ring all-reduce of the whole gradient against a few bytes a row.
    assert sent["replicated-dense"] >= 3002 * 128 * 4
    assert sent["streamed"] < sent["replicated-dense"] / 50
    assert (tmp_path / "steps.png").stat().st_size > 10_000


@pytest.mark.full
def test_the_benchmark_s_other_questions(tmp_path: Path) -> None:
    """Weak scaling and the largest N: on 2 ranks, for which the groups of fewer ranks must not wait for the others."""
    common = ["--variants", "streamed", "--batch", "32", "--num-hard-classes", "10", "--output", str(tmp_path)]
    arguments = [*common, "--num-classes", "3001", "--repeats", "2", "--weak-scaling"]
    finished = run_forked("benchmarks/classifier", 2, *arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    with (tmp_path / "steps.csv").open() as file:
        assert [(row["T"], row["N"]) for row in csv.DictReader(file)] == [("1", "3001"), ("2", "6002")]
    finished = run_forked("benchmarks/classifier", 2, *common, "--memory-budget-gib", "0.3")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    with (tmp_path / "steps.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["peak_MiB"]) <= 0.3 * 1024 < float(row["peak_at_1.05N_MiB"])
