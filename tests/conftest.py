"""The suite is about CPU ranks: a GPU in the machine must not draw some of the work away. Here are its own fixtures."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TextIO

import pytest
from processes import run_bare
from xdist.scheduler import LoadFileScheduling, Scheduling

os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from shared_pipeline import evaluated, pipeline

__all__ = ["evaluated", "interpreter", "pipeline"]

_MOST_WORKERS = 4
# They read the output of one launched pipeline.
_SHARE_A_PIPELINE = ("tests/runners/test_evaluations.py", "tests/runners/test_pipeline.py")


class _ByFile(LoadFileScheduling):  # type: ignore[misc]
    """A worker runs the tests of a whole file, and of all files that share an expensive fixture."""

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return "pipeline" if scope in _SHARE_A_PIPELINE else scope


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduling:
    """Called by pytest-xdist."""
    return _ByFile(config, log)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: no workers for single files or under a debugger, where their start would take longest."""
    if any(Path(argument.partition("::")[0]).is_file() for argument in config.args):
        config.option.dist = "no"
        return 0
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))


@pytest.fixture
def forked_runners(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of `instance_ssl.api` fork their runners, which then have torch imported."""
    from instance_ssl import api

    def wait(command: Sequence[str], errors: TextIO) -> int:
        place = next(place for place, word in enumerate(command) if word.endswith(".py"))
        finished = run_bare(command[place].removesuffix(".py"), *command[place + 1 :])
        print(finished.stdout, end="")
        errors.write(finished.stderr)
        return finished.returncode

    monkeypatch.setattr(api, "_wait", wait)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process whose Triton kernels are interpreted on the CPU."""
    from interpreter import interpreting_process

    with interpreting_process() as pool:
        yield pool
