"""The default block shapes compile for Hopper without a GPU, use its matrix units and fit into its shared memory."""

from typing import Any

import pytest
import torch

from instance_ssl.classifier.triton_passes import forward_tile, update_tile

triton = pytest.importorskip("triton", reason="triton is not installed")

# What a program may use on an H100 or H200, in bytes.
SHARED_MEMORY = 227 * 1024
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def compile_kernel(name: str, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """Compiles a kernel as a launch with aligned pointers would; `types` are those of its pointers."""
    from triton.backends.compiler import GPUTarget

    from instance_ssl.classifier import triton_kernels

    kernel = getattr(triton_kernels, name)
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("Triton's interpreter is on")
    signature = {
        parameter.name: "constexpr" if parameter.name in constants else types.get(parameter.name, parameter.annotation)
        for parameter in kernel.params
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.params) if p.name in types}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    try:
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except (FileNotFoundError, RuntimeError) as error:
        if "ptxas" in str(error) and "Cannot find" in str(error):
            pytest.skip(f"no assembler: {error}")
        raise


@pytest.mark.parametrize(
    ("matmul", "dim", "apart"),
    [
        (torch.bfloat16, 128, False),
        (torch.bfloat16, 128, True),
        (torch.bfloat16, 512, True),
        (torch.float32, 128, True),
    ],
)
def test_forward_compiles(matmul: torch.dtype, dim: int, apart: bool) -> None:
    tile = forward_tile(dim, matmul)
    compiled = compile_kernel(
        "dense_sums_kernel",
        {
            "x_ptr": f"*{NAMES[matmul]}", "unit_ptr": f"*{NAMES[matmul]}", "z_ptr": "*fp32", "dense_ptr": "*fp32",
            "apart_ptr": "*i64",
        },
        {
            "D": dim, "ROWS": tile.rows, "CLASSES": tile.classes, "PRECISION": "tf32x3",
            "APART": apart,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    assert compiled.metadata.shared <= SHARED_MEMORY
    assert ("wgmma" in compiled.asm["ptx"]) == (tile.rows >= 64)


@pytest.mark.parametrize(
    ("matmul", "rows", "momentum", "dim", "apart"),
    [
        (torch.bfloat16, torch.float32, torch.float32, 128, False),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, 128, True),
        (torch.float32, torch.float32, torch.float32, 100, True),
    ],
)
def test_update_compiles(matmul: torch.dtype, rows: torch.dtype, momentum: torch.dtype, dim: int, apart: bool) -> None:
    tile = update_tile(dim, matmul)
    types = {
        "weight_ptr": NAMES[rows], "momentum_ptr": NAMES[momentum], "x_ptr": NAMES[matmul],
        "minus_log2_z_ptr": "fp32", "apart_ptr": "i64", "rows_ptr": "i64", "classes_ptr": "i64",
        "terms_ptr": "fp32", "tile_entries_ptr": "i32",
    }  # fmt: skip
    compiled = compile_kernel(
        "update_kernel",
        {name: f"*{kind}" for name, kind in types.items()},
        {
            "DIM": dim, "PADDED_DIM": 128, "ROWS": tile.rows, "CLASSES": tile.classes, "ENTRIES": 32,
            "PRECISION": "tf32x3", "APART": apart,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    assert compiled.metadata.shared <= SHARED_MEMORY
    assert ("wgmma" in compiled.asm["ptx"]) == (tile.classes >= 64)


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16])
def test_small_kernels_compile(rows: torch.dtype) -> None:
    unit_rows = compile_kernel(
        "unit_rows_kernel",
        {"weight_ptr": f"*{NAMES[rows]}", "unit_ptr": "*bf16"},
        {"DIM": 100, "PADDED_DIM": 128, "CLASSES": 32},
    )
    types = {
        "x_ptr": "bf16", "weight_ptr": NAMES[rows], "row_entries_ptr": "i32", "classes_ptr": "i64",
        "values_ptr": "fp32", "y_ptr": "fp32", "exp_ptr": "fp32", "sparse_ptr": "fp32", "correction_ptr": "fp32",
    }  # fmt: skip
    sparse_sums = compile_kernel(
        "sparse_sums_kernel",
        {name: f"*{kind}" for name, kind in types.items()},
        {"DIM": 100, "PADDED_DIM": 128, "ENTRIES": 32, "MIXTURE": False, "PRECISION": "tf32x3"},
    )
    assert max(unit_rows.metadata.shared, sparse_sums.metadata.shared) <= SHARED_MEMORY
