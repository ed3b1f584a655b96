"""Slurm's variables: who is a task among several, and what it takes from them."""

import os

import pytest

from instance_ssl.errors import UserError
from instance_ssl.run.place import take_place
from instance_ssl.run.slurm import first_host

# The second task on the second of two nodes, of three tasks on the first and two on the second.
TASK = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_PROCID": "4", "SLURM_NODEID": "1", "SLURM_LOCALID": "1", "SLURM_CPUS_PER_TASK": "1",
}  # fmt: skip
TAKEN = {
    "RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
    "MASTER_ADDR": "node007", "MASTER_PORT": str(15000 + (31 * 4711 + 2) % 15000),
}  # fmt: skip
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}


def taken(environment: dict[str, str]) -> dict[str, str]:
    """What `take_place` adds or changes."""
    after = dict(environment)
    take_place(after)
    return {name: value for name, value in after.items() if environment.get(name) != value}


def test_a_task_takes_its_place() -> None:
    assert taken(TASK) == TAKEN


def test_pmi_variables_of_srun_do_not_stand_in_the_way() -> None:
    """Where Slurm's default is `--mpi=pmi2`, srun sets these as well."""
    assert taken(TASK | {"PMI_SIZE": "5", "PMI_RANK": "4"}) == TAKEN


def test_older_names_serve_where_the_new_ones_are_unset() -> None:
    old = TASK | {"SLURM_NTASKS": "5", "SLURM_TASKS_PER_NODE": "3,2"}
    del old["SLURM_STEP_NUM_TASKS"], old["SLURM_STEP_TASKS_PER_NODE"]
    assert taken(old) == TAKEN


def test_what_the_user_sets_stays() -> None:
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "3"}
    after = taken(TASK | own | {"SLURM_STEP_NODELIST": "(null)"})
    assert after == {name: value for name, value in TAKEN.items() if name not in own}


@pytest.mark.parametrize(
    ("tasks", "node", "place", "local_size"),
    [("2(x3)", "2", ("5", "1", "6"), "2"), ("1(x2),3,1", "2", ("4", "2", "6"), "3"), ("4", "0", ("3", "3", "4"), "4")],
)
def test_the_tasks_of_this_node_are_counted(
    tasks: str, node: str, place: tuple[str, str, str], local_size: str
) -> None:
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    own = dict(zip(names, place, strict=True))
    after = taken(TASK | own | {"SLURM_NODEID": node, "SLURM_STEP_TASKS_PER_NODE": tasks})
    assert after["LOCAL_WORLD_SIZE"] == local_size


def test_steps_and_jobs_meet_at_ports_of_their_own() -> None:
    ports = [
        taken(TASK | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        for job in range(4711, 4721)
        for step in range(3)
    ]
    assert len(set(ports)) == 30
    assert all(15000 <= int(port) < 30000 for port in ports)


@pytest.mark.parametrize(
    ("further", "local_rank"),
    [
        ({"CUDA_VISIBLE_DEVICES": "1", "SLURM_GPUS_ON_NODE": "2"}, "0"),  # --gpus-per-task=1
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"}, "1"),  # all tasks see all
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "1"}, "1"),  # one for both: refused once torch has counted
        ({"CUDA_VISIBLE_DEVICES": ""}, "1"),
    ],
)
def test_a_task_that_sees_its_own_gpu_alone_takes_the_first(further: dict[str, str], local_rank: str) -> None:
    assert (TASK | further | taken(TASK | further))["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize(
    ("further", "usable", "threads"),
    [
        ({"SLURM_CPUS_PER_TASK": "6"}, 8, "6"),
        ({"SLURM_CPUS_PER_TASK": "6"}, 4, "4"),  # bound to less
        ({"SLURM_CPUS_ON_NODE": "24"}, 64, "12"),  # two tasks here
        ({"SLURM_CPUS_ON_NODE": "24"}, 1, "1"),
        ({}, 7, "3"),
    ],
)
def test_a_task_computes_with_its_share_of_the_cpus(
    monkeypatch: pytest.MonkeyPatch, further: dict[str, str], usable: int, threads: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)))
    environment = {name: value for name, value in TASK.items() if name != "SLURM_CPUS_PER_TASK"} | further
    assert taken(environment)["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    "environment",
    [
        JOB,  # the shell of salloc
        JOB | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"},  # as a step
        JOB | {"SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"},  # in a batch script
        JOB | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1 in a larger allocation
        TASK | {"SLURM_PTY_PORT": "4711"},  # srun --pty bash
    ],
)
def test_a_process_that_a_person_started_is_alone(environment: dict[str, str]) -> None:
    assert taken(environment) == {}


UNSET = [
    "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", "SLURM_JOB_ID",
]  # fmt: skip


@pytest.mark.parametrize("name", UNSET)
def test_a_variable_that_is_unset_is_named(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name.replace('STEP_TASKS', '(STEP_)?TASKS')} is unset"):
        take_place({key: value for key, value in TASK.items() if key != name})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"SLURM_PROCID": "5"}, "contradict each other: task 5 of 5"),
        ({"SLURM_LOCALID": "2"}, "contradict each other: task 4 of 5, 2 on node 1, with 3,2 tasks"),
        ({"SLURM_NODEID": "2"}, "contradict each other"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,3"}, "contradict each other"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3;2"}, "^SLURM_STEP_TASKS_PER_NODE is '3;2'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "0,5"}, "^SLURM_STEP_TASKS_PER_NODE is '0,5'"),
        ({"SLURM_LOCALID": "-1"}, "^SLURM_LOCALID is '-1'"),
        ({"SLURM_PROCID": "one"}, "^SLURM_PROCID is 'one'"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "^SLURM_STEP_NUM_TASKS is 'many'"),
        ({"SLURM_JOB_ID": "9" * 5000}, "^SLURM_JOB_ID is '9"),
        ({"SLURM_STEP_NODELIST": "(null)"}, r"^SLURM_STEP_NODELIST is '\(null\)'.*set MASTER_ADDR"),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "^task 0 runs on node 1 of the step.*set MASTER_ADDR"),
        ({"MASTER_PORT": "99999"}, "^MASTER_PORT is '99999'"),
    ],
)
def test_variables_that_cannot_be_right_are_refused(changes: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        take_place(TASK | changes)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[003-006,010],gpu7", "node003"),
        ("gpu7,node[003-006]", "gpu7"),
        ("node[9-11]", "node9"),
        ("node[010]", "node010"),
        ("node[4,2]", "node4"),
        ("rack[1-2]node[01-04]-ib.cluster", "rack1node01-ib.cluster"),
        ("a[1-2]b[3,5],c", "a1b3"),
        ("10-0-0-1,10-0-0-2", "10-0-0-1"),
        ("[001-004]", "001"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    "nodes",
    [
        "", ",", "a,", ",a", "node[1-", "node[]", "node[1-2", "node1-2]", "node[[1-2]]", "node[a-c]", "bgp[000x133]",
        "node[1..3]", "node 1", "a;reboot", "(null)", "node[1-2]\n", "a" * 4000 + "[",
    ],
)  # fmt: skip
def test_a_list_of_another_form_is_refused(nodes: str) -> None:
    with pytest.raises(UserError, match="cannot be expanded: set MASTER_ADDR"):
        first_host(nodes)
