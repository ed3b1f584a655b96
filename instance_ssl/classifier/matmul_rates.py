"""CPU matmul backend, rates of float32 and bfloat16 products, and L2 size."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from instance_ssl.distributed.comm import Group

Float32Precision = Literal["highest", "medium"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_DEFAULT_CACHE_BYTES = 2**20


@functools.cache
def cache_bytes() -> int:
    """L2 cache of one core as the kernel reports it; 1 MiB if it does not. L3 is shared with other processes."""
    size = _DEFAULT_CACHE_BYTES
    for index in _CACHES.glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            if (index / "level").read_text().strip() == "2":
                size = int((index / "size").read_text().strip().removesuffix("K")) * 1024
    return size


def onednn_multiplies_bfloat16() -> bool:
    """Whether torch hands bfloat16 products on this CPU to oneDNN, which needs AVX-512 (x86) or bfloat16 (Arm).

    Elsewhere torch multiplies without a workspace, at a fraction of its float32 rate.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextlib.contextmanager
def fast_float32_products(matmul_dtype: torch.dtype) -> Iterator[None]:
    """Runs float32 products inside in oneDNN where it computes them with float32's error, otherwise in MKL.

    `torch.set_float32_matmul_precision("medium")` hands them to oneDNN. Without bfloat16 matrix units oneDNN computes
    in float32, on some processors at 2.5 times MKL's rate; with such units (AMX) it rounds the factors to bfloat16. A
    self-test tells the two apart. Other dtypes and devices are not affected.
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
    """Self-test, once a process: `medium` if its error is at most twice that of `highest`.

    Their speed is not compared: noise would decide close cases, and runs would not repeat to the bit. oneDNN in float32
    was at least as fast as MKL wherever it was measured.
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


@contextlib.contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Runs the block without its caller's autocast, and sums bfloat16 products in float32.

    The search for hard classes relies on the second (`hard_class_screening.py`).
    """
    products = torch.backends.cuda.matmul
    before = products.allow_bf16_reduced_precision_reduction
    products.allow_bf16_reduced_precision_reduction = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        products.allow_bf16_reduced_precision_reduction = before


@dataclass(frozen=True)
class Rates:
    """GFLOP/s of the same product in two precisions, on the slowest rank."""

    float32: float
    bfloat16: float

    @property
    def faster(self) -> torch.dtype:
        """float32 if it is faster by more than a quarter, else bfloat16: noise must not decide near a tie."""
        return torch.float32 if self.float32 > 1.25 * self.bfloat16 else torch.bfloat16

    def __str__(self) -> str:
        return f"{self.float32:,.3g} GFLOP/s in float32, {self.bfloat16:,.3g} in bfloat16 on the slowest rank"


def agreed_rates(measure: Callable[[torch.dtype, torch.device], float], group: Group) -> Rates:
    """Measures both precisions on every rank at once and returns the lowest rates to all. Collective."""
    own = [measure(dtype, group.device) for dtype in (torch.float32, torch.bfloat16)]
    slowest = -group.all_reduce_max_(-torch.tensor(own, dtype=torch.float64, device=group.device))
    return Rates(*slowest.tolist())


def auto_matmul_dtype(group: Group) -> tuple[torch.dtype, Rates | None]:
    """Resolves `matmul_dtype: auto` under bfloat16 autocast: on CPUs the faster dtype, and the rates. Collective."""
    if group.device.type != "cpu":
        return torch.bfloat16, None
    rates = agreed_rates(quick_matmul_rate, group)
    return rates.faster, rates


@functools.cache
def quick_matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of matrix products, measured in some 20 ms once a process."""
    return matmul_rate(dtype, device, seconds=1e-3, repeats=3)


@functools.cache
def quick_convolution_rate(dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of a 3x3 convolution's forward pass, measured in up to 0.2 s once a process."""
    images, kernel = (_gaussian(shape, dtype, device) for shape in ((4, 32, 16, 16), (32, 32, 3, 3)))
    seconds = min(_seconds(lambda: F.conv2d(images, kernel, padding=1), device) for _ in range(4))
    return 2 * 4 * 16 * 16 * kernel.numel() / seconds / 1e9


def matmul_rate(dtype: torch.dtype, device: torch.device, *, seconds: float = 0.02, repeats: int = 10) -> float:
    """GFLOP/s of a square product on this device with these threads, the best of `repeats`.

    The product grows until one takes `seconds`: without bfloat16 instructions a CPU can be 40 times slower than in
    float32, and a large fixed size would take minutes.
    """
    largest, size = (8192 if device.type == "cuda" else 2048), 64
    with fast_float32_products(dtype):
        while True:
            a, b = (_gaussian((size, size), dtype, device) for _ in range(2))
            multiply = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
            best = min(_seconds(multiply, device) for _ in range(2))
            if best > seconds or size == largest:
                return 2 * size**3 / min(best, *(_seconds(multiply, device) for _ in range(repeats - 2))) / 1e9
            size *= 2


def _gaussian(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draws from a generator of its own: training depends on the state of the global one."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
