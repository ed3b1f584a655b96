"""What a process is told of its place among the ranks: by a launcher, by Open MPI, or not at all."""

import os

import pytest

from instance_ssl.errors import UserError
from instance_ssl.run.place import take_place

PLACE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
MPI = {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "3", "LOCAL_SIZE": "4"}
MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in MPI.items()}
TORCHRUN = PLACE | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_WORLD_SIZE": "2"}
TASK = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        PLACE,
        PLACE | TASK,  # torchrun in a task of Slurm's
        PLACE | MPI,
        TORCHRUN | {"GROUP_WORLD_SIZE": "1"},
        TORCHRUN | {"TORCHELASTIC_MAX_RESTARTS": "0"},
        TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"MASTER_ADDR": "node0"},  # left over in a shell
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "1"},
        {"ACCELERATE_MIXED_PRECISION": "no"},
        PLACE | {"ACCELERATE_MIXED_PRECISION": "no"},
    ],
)
def test_a_process_that_is_alone_or_knows_its_place_keeps_it(environment: dict[str, str]) -> None:
    before = dict(environment)
    take_place(environment)
    assert environment == before


def test_a_process_of_open_mpi_takes_its_place() -> None:
    environment = dict(MPI)
    take_place(environment)
    taken = {name: value for name, value in environment.items() if name not in MPI}
    threads = max(1, min(len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // 4))
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    assert taken == place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": str(threads)}


def test_accelerate_may_start_open_mpi() -> None:
    environment = MPI | {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "node7", "MASTER_PORT": "4711"}
    take_place(environment)
    assert environment["RANK"] == "3"


def test_what_the_user_exports_to_open_mpi_stays() -> None:
    own = {"MASTER_ADDR": "node7", "MASTER_PORT": "4711", "OMP_NUM_THREADS": "3"}
    environment = MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"} | own
    take_place(environment)
    assert {name: environment[name] for name in own} == own
    assert environment["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"},
            "^OMPI_COMM_WORLD_LOCAL_RANK and OMPI_COMM_WORLD_",
        ),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun -x MASTER_ADDR="),
        (MPI | {"OMPI_COMM_WORLD_RANK": "4"}, "^RANK 4 of WORLD_SIZE 4"),
        (MPI | {"MASTER_PORT": "0"}, "^MASTER_PORT is '0'"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "add --multi_gpu"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "^4 MPI processes"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "^2 MPI processes"),
        ({name: value for name, value in PLACE.items() if name != "MASTER_PORT"}, "^MASTER_PORT is unset"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, "^MASTER_PORT is unset"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "^MASTER_ADDR and MASTER_PORT are unset"),
        ({name: value for name, value in PLACE.items() if name != "RANK"}, "^RANK is unset"),
        ({name: value for name, value in PLACE.items() if name != "WORLD_SIZE"}, "^WORLD_SIZE is unset"),
        (TORCHRUN, "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all nodes"),
        (PLACE | {"RANK": "2"}, "^RANK 2 of WORLD_SIZE 2"),
        (PLACE | {"RANK": "-1"}, "^RANK is '-1'"),
        (PLACE | {"RANK": ""}, "^RANK is unset"),
        (PLACE | {"WORLD_SIZE": "two"}, "^WORLD_SIZE is 'two'"),
        (PLACE | {"MASTER_PORT": "99999"}, "^MASTER_PORT is '99999'"),
        (PLACE | {"LOCAL_RANK": "x"}, "^LOCAL_RANK is 'x'"),
    ],
)
def test_a_process_that_would_take_itself_for_the_only_one_is_refused(
    environment: dict[str, str], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        take_place(environment)
