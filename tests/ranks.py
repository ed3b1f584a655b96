"""Runs a function on several gloo ranks: they meet in a file, and all pass or fail together."""

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fork_server import context

from instance_ssl.distributed import comm


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout_seconds: float = 120) -> list[Any]:
    """Calls `function(group, *args)` on ranks 0 … size - 1 and returns what each returned, in order of rank.

    `function` is a module-level function; arguments and results are anything `torch.save` takes.
    """
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(target=_one_rank, args=(function, directory, rank, size, args)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_seconds)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        failures = [path.read_text() for path in sorted(Path(directory).glob("failure_*"))]
        assert not failures, "\n".join(failures)
        assert not hung, f"ranks {hung} did not finish in {timeout_seconds} s"
        assert all(process.exitcode == 0 for process in processes), [p.exitcode for p in processes]
        return [torch.load(Path(directory) / f"result_{rank}", weights_only=False) for rank in range(size)]


def _one_rank(function: Callable[..., Any], directory: str, rank: int, size: int, args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.set_num_threads(1)
    try:
        group = comm.initialize_from_file(str(Path(directory) / "rendezvous"), rank, size)
        torch.save(function(group, *args), Path(directory) / f"result_{rank}")
        group.barrier()
        comm.finalize()
    except BaseException:
        (Path(directory) / f"failure_{rank}").write_text(f"rank {rank} of {size}:\n{traceback.format_exc()}")
        raise
