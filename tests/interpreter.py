"""Runs functions in a process whose Triton kernels are interpreted on the CPU."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch


@contextmanager
def interpreting_process() -> Iterator[ProcessPoolExecutor]:
    """A pool of one process with the interpreter on; functions submitted to it must be picklable.

    The switch is read when triton is first imported, and left on it would make every test take the kernels for
    available: hence a process of its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(_prepare).result()
    with pool:
        yield pool


def _prepare() -> None:
    """Makes the interpreter treat bfloat16 as a GPU does, and lets it loop.

    As of Triton 3.9 it truncates where the hardware rounds to nearest even, and its products take the bit patterns of
    bfloat16 operands for integers. Triton 3.6 takes no tensor as a loop's bound with NumPy ≥ 2.4.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    patch_tensor = interpreter._patch_lang_tensor

    def convert_float(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(values, order="C").view(np.float32)).bfloat16()
            return rounded.view(torch.uint16).numpy()
        return convert(values, source, target, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *args)

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = convert_float, create_dot
