"""The comparison of both passes at the start of a process: it passes kernels that are right, and no others."""

from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from instance_ssl.classifier import kernel_selection, triton_passes
from instance_ssl.classifier.softmax import SmoothedLabels, SoftmaxOptions, SoftmaxSums
from instance_ssl.errors import UserError
from instance_ssl.run import build
from instance_ssl.run.stage import Stage

pytest.importorskip("triton", reason="triton is not installed")

CPU = torch.device("cpu")
RIGHT_SUMS, RIGHT_UPDATE = triton_passes.softmax_sums, triton_passes.update_rows
SINGLE = (torch.float32, torch.float32, torch.float32)
HALF = (torch.bfloat16, torch.bfloat16, torch.bfloat16)
MIXED = (torch.bfloat16, torch.float32, torch.bfloat16)


def verdict(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], form: Any = "mixture") -> str | None:
    matmul_dtype, *formats = dtypes
    return kernel_selection.disagreement(CPU, 64, SoftmaxOptions(0.15, form, matmul_dtype), *formats)


def first_640(labels: SmoothedLabels) -> SmoothedLabels:
    inside = labels.classes < 640
    return SmoothedLabels(labels.rows[inside], labels.classes[inside], labels.values[inside])


def lossy_sums(x_BD: Tensor, w_nD: Tensor, labels: SmoothedLabels, options: SoftmaxOptions) -> SoftmaxSums:
    return RIGHT_SUMS(x_BD, w_nD[:640], first_640(labels), options)


def lossy_update(
    x_BD: Tensor, z_B: Tensor, y_B: Tensor, labels: SmoothedLabels, w_nD: Tensor, m_nD: Tensor, *more: Any
) -> None:
    RIGHT_UPDATE(x_BD, z_B, y_B, first_640(labels), w_nD[:640], m_nD[:640], *more)


def verdict_of_lossy(name: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> str | None:
    """With one pass that has lost its last, partial tile of classes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_passes, name, lossy_sums if name == "softmax_sums" else lossy_update)
        return verdict(dtypes)


# The interpreter takes five seconds for each.
@pytest.mark.parametrize(
    ("dtypes", "form"),
    [
        (SINGLE, "mixture"),
        pytest.param(HALF, "mixture", marks=pytest.mark.full),
        pytest.param(MIXED, "cross_entropy", marks=pytest.mark.full),
    ],
)
def test_right_kernels_pass(interpreter: ProcessPoolExecutor, dtypes: Any, form: str) -> None:
    assert interpreter.submit(verdict, dtypes, form).result() is None


@pytest.mark.parametrize("dtypes", [pytest.param(SINGLE, marks=pytest.mark.full), HALF])
@pytest.mark.parametrize(("name", "figure"), [("softmax_sums", "Z"), ("update_rows", "momentum")])
def test_a_lost_tile_is_found(interpreter: ProcessPoolExecutor, name: str, figure: str, dtypes: Any) -> None:
    said = interpreter.submit(verdict_of_lossy, name, dtypes).result()
    assert said is not None
    assert said.startswith(f"{figure} differs")


def fail(*_: Any) -> None:
    raise RuntimeError("no\nsuch instruction")


def test_what_the_compiler_says_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_passes, "softmax_sums", fail)
    assert verdict(SINGLE) == "RuntimeError: no such instruction"


def test_a_device_that_is_broken_by_it_ends_the_run_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_passes, "softmax_sums", fail)
    monkeypatch.setattr(kernel_selection, "_works", lambda _: False)
    with pytest.raises(UserError, match=r"no such instruction.*instance_classifier\.kernels torch"):
        verdict(SINGLE)


def tried(monkeypatch: pytest.MonkeyPatch, wanted: str, others: str | None) -> tuple[str, list[str]]:
    """What is used, and said, on a rank whose own GPU is fine, beside one that says this."""
    lines: list[str] = []
    monkeypatch.setattr(kernel_selection, "disagreement", lambda *_: None)
    stage = SimpleNamespace(
        ds=SimpleNamespace(classifier=SimpleNamespace(kernels=wanted), row_dtype=None, momentum_dtype=None),
        world=SimpleNamespace(device=CPU, all_gather_objects=lambda own: [own, others]),
        config=SimpleNamespace(model=SimpleNamespace(embedding_dim=128)),
        log=SimpleNamespace(say=lines.append),
    )
    options = SoftmaxOptions(0.15, "mixture", torch.bfloat16, kernels="triton")
    return build._with_tried_kernels(cast(Stage, stage), options).kernels, lines


def test_all_ranks_do_as_the_one_whose_kernels_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(monkeypatch, "auto", None) == ("triton", [])
    kernels, lines = tried(monkeypatch, "auto", "Z differs")
    assert kernels == "torch"
    assert "rank 1: Z differs" in lines[0]
    with pytest.raises(UserError, match="rank 1: Z differs"):
        tried(monkeypatch, "triton", "Z differs")
