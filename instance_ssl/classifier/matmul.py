"""What this machine's matrix products are worth: the fastest float32 product on a CPU, and the size of its cache."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

Float32Precision = Literal["highest", "medium"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_DEFAULT_CACHE_BYTES = 2**20


@functools.cache
def cache_bytes() -> int:
    """Second-level cache of one core, as the kernel reports it; 1 MiB where it does not.

    The third level is left out: it is shared with whatever else runs on the machine.
    """
    size = _DEFAULT_CACHE_BYTES
    for index in _CACHES.glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            if (index / "level").read_text().strip() == "2":
                size = int((index / "size").read_text().strip().removesuffix("K")) * 1024
    return size


def onednn_multiplies_bfloat16() -> bool:
    """Whether torch gives bfloat16 products on this CPU to oneDNN, which needs AVX-512 (x86) or bfloat16 (Arm).

    Elsewhere torch multiplies without a workspace, and at a fraction of its float32 rate.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextlib.contextmanager
def fast_float32_products(matmul_dtype: torch.dtype) -> Iterator[None]:
    """Float32 products inside run in whichever of torch's CPU libraries is the fastest *at float32's own error*.

    `torch.set_float32_matmul_precision("medium")` hands them to oneDNN. Without bfloat16 matrix units oneDNN computes
    them in float32, on some processors at 2.5 times MKL's rate; with such units (AMX) it rounds the factors to
    bfloat16, which no one asked for. The self-test tells the two apart. Other dtypes and devices are not affected.
    """
    before = torch.get_float32_matmul_precision()
    if matmul_dtype == torch.float32 and not torch.cuda.is_available():
        torch.set_float32_matmul_precision(float32_precision())
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def float32_precision() -> Float32Precision:
    """Self-test, once a process: `medium` when its error is no more than twice that of `highest`.

    Their speed is not asked for: where they are close, noise would decide, and no run would be like another to the bit.
    oneDNN in float32 has been as fast as MKL or faster wherever it was measured.
    """
    generator = torch.Generator().manual_seed(0)
    rows, classes = torch.randn(256, 128, generator=generator), torch.randn(2048, 128, generator=generator)
    truth = rows.double() @ classes.double().T
    errors = {}
    before = torch.get_float32_matmul_precision()
    candidates: tuple[Float32Precision, Float32Precision] = ("highest", "medium")
    for precision in candidates:
        torch.set_float32_matmul_precision(precision)
        errors[precision] = (rows @ classes.T - truth).abs().max().item()
    torch.set_float32_matmul_precision(before)
    return "medium" if errors["medium"] <= 2 * errors["highest"] else "highest"
