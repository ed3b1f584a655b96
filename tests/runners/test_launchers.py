"""Ranks that accelerate, Slurm or Open MPI start. deepspeed: test_pipeline.py, torchrun: faults/test_torchrun.py."""

import json
import os
from pathlib import Path

import pytest
from processes import free_port, run_accelerated, run_tasks

SMALL = ["--set", "data.limit_train=160", "optimization.global_batch_size=128", "classifier.num_hard_classes=5"]


def environment_of(run: Path) -> dict[str, object]:
    return json.loads((run / "initialize_classifier/environment.json").read_text())


def test_tasks_of_slurm_meet_by_its_variables_alone(tmp_path: Path) -> None:
    """Two nodes, of which the first is this machine and so is, in truth, the other."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost,node[2-3]"}
    step |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    tasks = [step | {"SLURM_PROCID": str(task), "SLURM_NODEID": str(task)} for task in range(2)]
    finished = run_tasks("initialize_classifier", tasks, "--run-dir", str(tmp_path / "run"), *SMALL)
    assert finished.returncode == 0, finished.stderr
    assert environment_of(tmp_path / "run")["world_size"] == 2


@pytest.mark.full
def test_processes_of_open_mpi_meet_by_its_variables(tmp_path: Path) -> None:
    one = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_PORT": free_port()}
    ranks = [one | {f"OMPI_COMM_WORLD_{name}": str(rank) for name in ("RANK", "LOCAL_RANK")} for rank in range(2)]
    finished = run_tasks("initialize_classifier", ranks, "--run-dir", str(tmp_path / "run"), *SMALL)
    assert finished.returncode == 0, finished.stderr
    assert environment_of(tmp_path / "run")["world_size"] == 2


@pytest.mark.full
def test_accelerate_starts_ranks(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed (the test extra has it)")
    finished = run_accelerated("initialize_classifier", 2, "--run-dir", str(tmp_path / "run"), *SMALL)
    assert finished.returncode == 0, finished.stderr
    assert environment_of(tmp_path / "run")["world_size"] == 2
