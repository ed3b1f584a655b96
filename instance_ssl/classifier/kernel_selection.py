"""Chooses the implementation of the two passes and the block budget; self-test of the Triton kernels.

The kernels run with compilers and on GPUs that they have never been tested with. Each process therefore compares them
with the PyTorch passes on a problem of a few tiles before it uses them.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from instance_ssl.classifier import torch_passes, triton_passes
from instance_ssl.classifier.softmax import (
    Passes,
    RowUpdate,
    SmoothedLabels,
    SoftmaxOptions,
    SoftmaxSums,
    normalise_rows,
    own_labels,
    unit_feature_gradient,
)
from instance_ssl.config.choices import Kernels
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError

# Whole tiles and a partial one, of rows and of classes.
_NUM_ROWS, _NUM_CLASSES, _NUM_HARD = 150, 700, 3
_UPDATE = RowUpdate(learning_rate=1.0, momentum=0.9, weight_decay=1e-2, seed=7)
# Relative to the norm. bfloat16's roundings come to less than 1 %, a wrong tile to far more.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


def choose_kernels(
    wanted: Literal["auto", "torch", "triton"],
    device: torch.device,
    embedding_dim: int = 128,
    matmul_dtype: torch.dtype = torch.bfloat16,
) -> Kernels:
    """The implementation of the two passes on this device: Triton on CUDA, PyTorch elsewhere.

    Raises:
        UserError: if `wanted` is `triton` and it cannot run.
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
    """Memory of a block of classes. If `wanted` is None, a CPU's cache decides (None) and a GPU gets 256 MiB."""
    return wanted if wanted is not None or device.type == "cpu" else 256 * 2**20


def disagreement(
    device: torch.device,
    embedding_dim: int,
    options: SoftmaxOptions,
    row_dtype: torch.dtype,
    momentum_dtype: torch.dtype,
) -> str | None:
    """Self-test of the Triton kernels against the PyTorch passes: one line on what is wrong; None: nothing.

    Raises:
        UserError: if the attempt has left the device unusable for this process.
    """
    try:
        errors = _relative_errors(device, embedding_dim, options, row_dtype, momentum_dtype)
    except Exception as error:  # of compiler, driver or device, none of which the PyTorch passes need
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if not _works(device):
            raise UserError(
                f"the Triton kernels have broken {device} for this process ({problem}): set "
                "instance_classifier.kernels torch in the DeepSpeed JSON"
            ) from None
        return problem
    rounded = torch.bfloat16 in (options.matmul_dtype, row_dtype, momentum_dtype)
    allowed = _TOLERANCE[torch.bfloat16 if rounded else torch.float32]
    for name, share in errors.items():
        if not share <= allowed:  # not a number, too
            return f"{name} differs from that of the PyTorch passes by {share:.2g} of its norm"
    return None


def find_obstacle(
    embedding_dim: int, options: SoftmaxOptions, row_dtype: torch.dtype, momentum_dtype: torch.dtype, world: Group
) -> str | None:
    """Why all ranks take the PyTorch passes: the self-test's verdict on the first GPU that fails; None: none does.

    Collective.
    """
    problem: str | None = "they need a GPU from Ampere on, Triton, a C compiler and Python's headers"
    if options.kernels == "triton":
        problem = disagreement(world.device, embedding_dim, options, row_dtype, momentum_dtype)
    problems = enumerate(world.all_gather_objects(problem))
    return next((f"rank {rank}: {problem}" for rank, problem in problems if problem is not None), None)


def _works(device: torch.device) -> bool:
    """False after an illegal memory access, for example, after which a process cannot use the GPU."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _relative_errors(
    device: torch.device,
    embedding_dim: int,
    options: SoftmaxOptions,
    row_dtype: torch.dtype,
    momentum_dtype: torch.dtype,
) -> dict[str, float]:
    """Relative error of the kernels against the PyTorch passes, in each result that a step uses."""
    unit_x_BD, weight_nD, momentum_nD, labels = _problem(device, embedding_dim)
    weight_nD, momentum_nD = weight_nD.to(row_dtype), momentum_nD.to(momentum_dtype)
    # The paper's τ: a small one magnifies bfloat16's roundings, which the two have in different places.
    options = replace(options, temperature=0.15, block_bytes=None)
    theirs = torch_passes.softmax_sums(unit_x_BD, weight_nD, labels, options)

    def figures(passes: Passes, sums: SoftmaxSums) -> dict[str, Tensor]:
        rows_nD, buffer_nD = weight_nD.clone(), momentum_nD.clone()
        passes.update_rows(unit_x_BD, theirs.z_B, theirs.y_B, labels, rows_nD, buffer_nD, options, _UPDATE)
        gradient_BD = unit_feature_gradient(sums, sums.z_B, sums.y_B, options, _NUM_ROWS)
        return {"Z": sums.z_B, "∂x": gradient_BD, "momentum": buffer_nD, "step": rows_nD.float() - weight_nD.float()}

    ours = figures(triton_passes, triton_passes.softmax_sums(unit_x_BD, weight_nD, labels, options))
    wanted = figures(torch_passes, theirs)
    norm = torch.linalg.vector_norm
    return {
        name: (norm(ours[name].float() - value.float()) / norm(value.float())).item() for name, value in wanted.items()
    }


def _problem(device: torch.device, embedding_dim: int) -> tuple[Tensor, Tensor, Tensor, SmoothedLabels]:
    """Unit embeddings near the rows of their classes, rows, momentum, and smoothed labels."""
    generator = torch.Generator().manual_seed(0)
    # Short rows have large gradients, so that a step is more than old momentum.
    weight_nD = 0.01 * torch.randn(_NUM_CLASSES, embedding_dim, generator=generator)
    momentum_nD = 0.003 * torch.randn(_NUM_CLASSES, embedding_dim, generator=generator)
    labels_B = torch.randint(0, _NUM_CLASSES, (_NUM_ROWS,), generator=generator)
    unit_x_BD, _ = normalise_rows(
        weight_nD[labels_B] + 0.01 * torch.randn(_NUM_ROWS, embedding_dim, generator=generator)
    )
    hard_BK = (labels_B[:, None] + torch.arange(1, _NUM_HARD + 1)) % _NUM_CLASSES
    labels = own_labels(labels_B.to(device), hard_BK.to(device), 0.2, 0, _NUM_CLASSES, torch.float32)
    return unit_x_BD.to(device), weight_nD.to(device), momentum_nD.to(device), labels
