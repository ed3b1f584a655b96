"""The suite is about CPU ranks: a GPU in the machine must not draw some of the work away. Here are its own fixtures."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")

from shared_pipeline import evaluated, pipeline

__all__ = ["evaluated", "interpreter", "pipeline"]


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process whose Triton kernels are interpreted on the CPU."""
    from interpreter import interpreting_process

    with interpreting_process() as pool:
        yield pool
