"""What the launcher told this process about its place among the ranks; readable before torch is imported."""

import os

import psutil


def rank() -> int:
    """Returns this process's rank in the world; 0 when it runs bare."""
    return int(os.environ.get("RANK") or 0)


def world_size() -> int:
    """Returns the number of ranks; 1 when this process runs bare."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_rank() -> int:
    """Returns this process's place among the ranks of its machine, which is its GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def local_size() -> int:
    """Returns the number of ranks on this machine, which deepspeed and torchrun set; 1 where it is unset."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def attempt() -> int:
    """Returns how often torchrun has restarted the ranks, where it keeps the store in which they meet; 0 elsewhere.

    That store outlives the ranks and still holds the addresses of dead ones. Only on one machine do all ranks count
    alike: `run.place` refuses restarts on several with a store that is kept.
    """
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) if is_kept else 0


def is_task() -> bool:
    """Whether this rank is a task of Slurm's or a process of Open MPI's; not if a launcher there started it."""
    number = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("SLURM_PROCID")
    return world_size() > 1 and number == os.environ.get("RANK")


def usable_cores() -> int:
    """Returns the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_rank() -> int:
    """Returns this rank's even share of the cores that the ranks of a machine may run on; at least 1."""
    return max(1, usable_cores() // local_size())


def num_threads() -> int | None:
    """Returns how many threads this rank should compute with on a CPU; None where OMP_NUM_THREADS says it.

    The ranks of a machine share its cores evenly. torchrun and accelerate set OMP_NUM_THREADS=1 by default, which
    leaves cores idle: that is nobody's choice.
    """
    if "OMP_NUM_THREADS" in os.environ and not _launcher_chose_one_thread():
        return None
    return cores_of_rank()


def _launcher_chose_one_thread() -> bool:
    """Whether OMP_NUM_THREADS is the launcher's default: it started without the variable and the flag."""
    by_launcher = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if os.environ["OMP_NUM_THREADS"] != "1" or not by_launcher:
        return False
    try:
        launcher = psutil.Process(os.getppid())
        flags = " ".join(launcher.cmdline()).replace("-", "_")
        return "OMP_NUM_THREADS" not in launcher.environ() and "num_cpu_threads_per_process" not in flags
    except psutil.Error:
        return False
