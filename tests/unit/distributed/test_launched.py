"""How many threads a rank computes with, under each launcher."""

import os
import subprocess
import sys

import pytest

from instance_ssl.distributed import launched

# What a launcher does: it sets variables in its own environment, which the ranks inherit.
LAUNCHER = """
import os, subprocess, sys
os.environ.update(OMP_NUM_THREADS="1", LOCAL_WORLD_SIZE="2", {name}="x")
rank = "import os; os.sched_getaffinity = lambda _: range(12); "
rank += "from instance_ssl.distributed import launched; print(launched.num_threads())"
subprocess.run([sys.executable, "-c", rank], check=True)
"""


def threads_under(name: str, *flags: str, **variables: str) -> str:
    """Of one of two ranks on 12 cores whose launcher sets OMP_NUM_THREADS=1."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | variables
    command = [sys.executable, "-c", LAUNCHER.format(name=name), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", ["TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"])
def test_a_default_of_the_launcher_leaves_no_core_idle(name: str) -> None:
    assert threads_under(name) == "6"


def test_a_choice_of_the_user_stays() -> None:
    assert threads_under("TORCHELASTIC_RUN_ID", OMP_NUM_THREADS="1") == "None"
    assert threads_under("ACCELERATE_MIXED_PRECISION", "--num_cpu_threads_per_process", "1") == "None"
    assert threads_under("ACCELERATE_MIXED_PRECISION", "--num-cpu-threads-per-process=1") == "None"
    assert threads_under("SOMETHING_ELSE") == "None"


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 12),
        ({"LOCAL_SIZE": "4"}, 3),  # deepspeed
        ({"LOCAL_WORLD_SIZE": "5"}, 2),
        ({"LOCAL_WORLD_SIZE": "24"}, 1),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "4", "TORCHELASTIC_RUN_ID": "x"}, None),
    ],
)
def test_ranks_share_the_cores_that_they_may_run_on(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], threads: int | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for name in ("OMP_NUM_THREADS", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched.num_threads() == threads


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_PROCID": "3"}, True),
        ({"OMPI_COMM_WORLD_RANK": "3", "SLURM_PROCID": "0"}, True),  # mpirun reaches nodes by srun
        ({"SLURM_PROCID": "1"}, False),  # torchrun in a task a node
        ({}, False),
    ],
)
def test_a_task_is_numbered_by_slurm_or_mpi(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: bool
) -> None:
    for name, value in ({"RANK": "3", "WORLD_SIZE": "4"} | variables).items():
        monkeypatch.setenv(name, value)
    assert launched.is_task() == expected


@pytest.mark.parametrize(("is_kept", "expected"), [("True", 2), ("False", 0)])
def test_starts_are_told_apart_where_their_store_is_the_same(
    monkeypatch: pytest.MonkeyPatch, is_kept: str, expected: int
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", is_kept)
    assert launched.attempt() == expected
