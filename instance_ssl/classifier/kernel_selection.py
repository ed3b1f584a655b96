"""Which implementation of the two passes a device runs, and in how much memory."""

from typing import Literal

import torch

from instance_ssl.classifier import triton_passes
from instance_ssl.config.choices import Kernels
from instance_ssl.errors import UserError


def choose_kernels(
    wanted: Literal["auto", "torch", "triton"],
    device: torch.device,
    embedding_dim: int = 128,
    matmul_dtype: torch.dtype = torch.bfloat16,
) -> Kernels:
    """The implementation of the two passes on this device: Triton on CUDA, PyTorch elsewhere.

    Raises:
        UserError: when Triton is asked for where it cannot run.
    """
    runs_triton = wanted != "torch" and triton_passes.available(device, embedding_dim, matmul_dtype)
    if wanted == "triton" and not runs_triton:
        raise UserError(
            "instance_classifier.kernels triton needs an NVIDIA GPU of compute capability 8.0 or higher, the triton "
            "package, a C compiler with Python's headers, and no wider embeddings than it has kernels for "
            f"(here {embedding_dim}): use auto or torch"
        )
    return "triton" if runs_triton else "torch"


def choose_block_bytes(wanted: int | None, device: torch.device) -> int | None:
    """Memory of a block of classes; where it is left open, a CPU's cache decides (None) and a GPU gets 256 MiB."""
    return wanted if wanted is not None or device.type == "cpu" else 256 * 2**20
