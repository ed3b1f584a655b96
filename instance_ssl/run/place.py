"""This process's place among the ranks: what its launcher told it, or Slurm, or Open MPI.

`deepspeed`, `torchrun` and `accelerate launch` set RANK and WORLD_SIZE, and all that reads them needs nothing else. A
task of `srun` or a process of `mpirun` is numbered in their own variables.
"""

import os
from collections.abc import Mapping, MutableMapping

from instance_ssl.distributed.launched import usable_cores
from instance_ssl.errors import UserError, shorten
from instance_ssl.run import slurm

# What a launcher sets for each rank.
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# The sizes of further MPIs, which say nothing of the machines.
_OTHER_MPI_SIZES = ("PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_DEFAULT_PORT = "29500"
_LAUNCH = "start the ranks with `deepspeed` or `torchrun`, which set these, or one process with none of them"


def take_place(environment: MutableMapping[str, str]) -> None:
    """Sets what a launcher would have set for a task of Slurm's or a process of Open MPI's, and checks it.

    Raises:
        UserError: this process was not told its place among the others, or wrongly: it would run alone, or wait for
            ranks that do not come.
    """
    if not (environment.get("RANK") or environment.get("WORLD_SIZE")):
        if _count(environment, "OMPI_COMM_WORLD_SIZE") > 1:
            environment.update(_place_in_open_mpi(environment))
        elif slurm.num_tasks(environment) > 1:
            environment.update(slurm.place_of_task(environment))
        elif {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= set(environment):
            raise UserError(
                "accelerate started one process, and MASTER_ADDR and MASTER_PORT are set for several: add --multi_gpu, "
                "with which it starts all of --num_processes, on CPUs too; for one process, unset both"
            )
        elif started := next((name for name in _OTHER_MPI_SIZES if _count(environment, name) > 1), None):
            raise UserError(
                f"{environment[started]} MPI processes ({started}), but RANK and WORLD_SIZE are unset: each would "
                "start its own run in the same directory; start one process a node, and in it `torchrun …` "
                "(instance_ssl/run/README.md)"
            )
    _check_restarts(environment)
    _check_place({name: environment[name] for name in _PLACE if environment.get(name)})


def _check_restarts(environment: Mapping[str, str]) -> None:
    """Refuses restarts by torchrun after which ranks would look for each other in the store of the former ones.

    On one machine they tell the starts apart by torchrun's count. Each node has its own.
    """
    is_kept = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_kept and _count(environment, "GROUP_WORLD_SIZE") > 1 and _count(environment, "TORCHELASTIC_MAX_RESTARTS") > 0:
        raise UserError(
            "torchrun cannot restart ranks of several nodes that meet in a store of its own: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all nodes and give --rdzv-backend c10d, or --max-restarts 0"
        )


def _check_place(place: Mapping[str, str]) -> None:
    if not {"RANK", "WORLD_SIZE"} & set(place):
        return
    numbers = {"WORLD_SIZE": (1, 2**31), "RANK": (0, 2**31), "LOCAL_RANK": (0, 2**31), "MASTER_PORT": (1, 2**16)}
    for name, (low, high) in numbers.items():
        if name in place and not (place[name].isdecimal() and low <= int(place[name]) < high):
            raise UserError(f"{name} is {shorten(place[name])!r}, not a number from {low} to {high - 1}: {_LAUNCH}")
    size = int(place.get("WORLD_SIZE", 1))
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in place]
    if size == 1 and place.get("RANK", "0") == "0" and len({"MASTER_ADDR", "MASTER_PORT"} & set(place)) != 1:
        missing = []  # one process meets no others
    if missing:
        known = ", ".join(f"{name}={value}" for name, value in place.items())
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f"{' and '.join(missing)} {verb} unset, with {known}: {_LAUNCH}")
    if int(place.get("RANK", 0)) >= size:
        raise UserError(f"RANK {place['RANK']} of WORLD_SIZE {size}: ranks count from 0 to {size - 1}; {_LAUNCH}")


def _place_in_open_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns what a launcher would have set for a process that `mpirun` started, one of several.

    mpirun binds each process to cores of its own, unless it is told not to.
    """
    of = {"RANK": "RANK", "WORLD_SIZE": "SIZE", "LOCAL_RANK": "LOCAL_RANK", "LOCAL_WORLD_SIZE": "LOCAL_SIZE"}
    place = {name: environment.get(f"OMPI_COMM_WORLD_{theirs}", "") for name, theirs in of.items()}
    if unset := [f"OMPI_COMM_WORLD_{of[name]}" for name, value in place.items() if not value]:
        raise UserError(f"{' and '.join(unset)} unset in a process of mpirun: {_LAUNCH}")
    if place["LOCAL_WORLD_SIZE"] != place["WORLD_SIZE"] and not environment.get("MASTER_ADDR"):
        raise UserError(
            "mpirun does not say where rank 0 runs, and the ranks are on several machines: "
            "mpirun -x MASTER_ADDR=<host of rank 0>"
        )
    threads = min(usable_cores(), (os.cpu_count() or 1) // max(1, _count(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")))
    further = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _DEFAULT_PORT, "OMP_NUM_THREADS": str(max(1, threads))}
    return place | {name: environment.get(name) or value for name, value in further.items()}


def _count(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else 1
