"""The place of a task that `srun` started, read from Slurm's variables (srun(1), "OUTPUT ENVIRONMENT VARIABLES")."""

import re
from collections.abc import Mapping

from instance_ssl.distributed.launched import usable_cores
from instance_ssl.errors import UserError, shorten

# From this number on, steps are Slurm's own: the batch script, and the shell of `salloc`.
_OWN_STEPS = 2**32 - 16
_SIZES = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
# Hosts as Slurm lists them: node[003-006,010],rack[1-2]n[01-04]-ib
_NUMBERS = r"[0-9]+(?:-[0-9]+)?"
_HOST = rf"(?:[A-Za-z0-9_.-]|\[{_NUMBERS}(?:,{_NUMBERS})*\])+"
_HOSTS = re.compile(rf"({_HOST})(?:,{_HOST})*")
_TASKS = re.compile(r"([1-9][0-9]{0,8})(?:\(x([1-9][0-9]{0,8})\))?")  # 4(x2),3: four tasks on two nodes, then three
# Ports that neither a system nor a person is likely to use: below those that Linux gives to outgoing connections.
_FIRST_PORT, _NUM_PORTS = 15000, 15000
_CURE = "start the runner itself with `srun`, one task a GPU, or one task a node and in it `torchrun …`"


def num_tasks(environment: Mapping[str, str]) -> int:
    """Returns how many tasks Slurm started together with this process; 1 for a process on its own.

    SLURM_NTASKS is also set in the shell of `salloc` and in a batch script, where a person starts one process. Slurm
    numbers tasks alone, and a batch script as its only one.
    """
    if "SLURM_PROCID" not in environment or "SLURM_PTY_PORT" in environment:  # `srun --pty`: a shell
        return 1
    is_step = any(name in environment for name in ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS"))
    is_batch = not is_step and environment.get("ENVIRONMENT") == "BATCH"
    if is_batch or ("SLURM_STEP_ID" in environment and _number(environment, "SLURM_STEP_ID") >= _OWN_STEPS):
        return 1
    name = next((name for name in _SIZES if name in environment), None)
    return 1 if name is None else _number(environment, name, 1)


def place_of_task(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns what a launcher would have set for this task, one of several.

    MASTER_ADDR is the first host of the step, which runs task 0, and MASTER_PORT follows from the numbers of the job
    and the step, so that all tasks agree; where they are set, they stay. LOCAL_RANK is 0 where Slurm shows each task
    only a GPU of its own (`--gpus-per-task=1`). OMP_NUM_THREADS is the task's share of the job's CPUs on this node.

    Raises:
        UserError: a variable is unset, malformed or contradicts another.
    """
    size, rank = num_tasks(environment), _number(environment, "SLURM_PROCID")
    local_rank, node = _number(environment, "SLURM_LOCALID"), _number(environment, "SLURM_NODEID")
    by_node = _tasks_by_node(environment)
    local_size = by_node[node] if node < len(by_node) else 0
    if sum(by_node) != size or rank >= size or local_rank >= local_size:
        raise UserError(
            f"Slurm's variables contradict each other: task {rank} of {size}, {local_rank} on node {node}, with "
            f"{shorten(','.join(map(str, by_node)))} tasks on the nodes; {_CURE}"
        )
    if not environment.get("MASTER_ADDR") and rank == 0 and node != 0:
        raise UserError(
            f"task 0 runs on node {node} of the step, not on its first: set MASTER_ADDR to its host for all tasks, or "
            "omit --distribution"
        )
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": "0" if _has_own_gpu(environment, local_size) else str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(_required(environment, "SLURM_STEP_NODELIST")),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_port(environment)),
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS") or str(_num_threads(environment, local_size)),
    }


def first_host(nodes: str) -> str:
    """Returns the first host of Slurm's list of nodes: of `node[003-006,010],gpu7` it is node003.

    Raises:
        UserError: the list has another form.
    """
    if (match := _HOSTS.fullmatch(nodes)) is None:
        raise UserError(
            f"SLURM_STEP_NODELIST is {shorten(nodes)!r}, which cannot be expanded: set MASTER_ADDR to the host of task "
            "0 for all tasks"
        )
    return re.sub(r"\[([0-9]+)[^]]*\]", r"\1", match[1])


def _tasks_by_node(environment: Mapping[str, str]) -> list[int]:
    name = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_TASKS_PER_NODE" in environment else "SLURM_TASKS_PER_NODE"
    counts: list[int] = []
    for part in (text := _required(environment, name)).split(","):
        if (match := _TASKS.fullmatch(part)) is None:
            raise UserError(f"{name} is {shorten(text)!r}, not of the form 4(x2),3: {_CURE}")
        counts += [int(match[1])] * min(int(match[2] or 1), 10**6)
    return counts


def _has_own_gpu(environment: Mapping[str, str], local_size: int) -> bool:
    """Whether each task of this node sees a GPU of its own alone, as against one GPU that all of them share."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    on_node = _number(environment, "SLURM_GPUS_ON_NODE") if environment.get("SLURM_GPUS_ON_NODE") else 0
    return visible != "" and "," not in visible and on_node >= local_size


def _num_threads(environment: Mapping[str, str], local_size: int) -> int:
    """Returns `--cpus-per-task`, or an even share of the job's CPUs; no more than this task is bound to."""
    usable = usable_cores()
    if environment.get("SLURM_CPUS_PER_TASK"):
        return min(usable, _number(environment, "SLURM_CPUS_PER_TASK", 1))
    on_node = _number(environment, "SLURM_CPUS_ON_NODE") if environment.get("SLURM_CPUS_ON_NODE") else usable
    return max(1, min(usable, on_node // local_size))


def _port(environment: Mapping[str, str]) -> int:
    step = _number(environment, "SLURM_STEP_ID") if "SLURM_STEP_ID" in environment else 0
    return _FIRST_PORT + (31 * _number(environment, "SLURM_JOB_ID") + step) % _NUM_PORTS


def _required(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise UserError(f"{name} is unset in a task of Slurm's: {_CURE}")
    return environment[name]


def _number(environment: Mapping[str, str], name: str, least: int = 0) -> int:
    text = _required(environment, name)
    if re.fullmatch("[0-9]{1,10}", text) is None or int(text) < least:
        raise UserError(f"{name} is {shorten(text)!r}, not a number from {least} on: {_CURE}")
    return int(text)
