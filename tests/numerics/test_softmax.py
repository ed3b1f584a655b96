"""The streamed softmax on one rank: gradcheck, closed forms, precision and memory."""

import math
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from instance_ssl.classifier.matmul_rates import float32_precision
from instance_ssl.classifier.reference import dense_hard_classes, dense_labels, dense_loss
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.choices import LossForm
from instance_ssl.distributed.comm import Group


def make_shard(
    group: Group, weight_ND: Tensor, alpha: float = 0.0, form: LossForm = "mixture", **options: Any
) -> ClassifierShard:
    settings = {"temperature": 0.15, "block_bytes": 2**20, "matmul_dtype": weight_ND.dtype, **options}
    shard = ClassifierShard(
        *weight_ND.shape, group, SoftmaxOptions(form=form, **settings), smoothing_factor=alpha, momentum=0.0,
        weight_decay=0.0, row_dtype=weight_ND.dtype, momentum_dtype=weight_ND.dtype,
    )  # fmt: skip
    shard.weight.copy_(weight_ND)
    return shard


class StreamedLoss(torch.autograd.Function):
    """The library's loss as an autograd function, so that gradcheck can differentiate it numerically."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, weight_ND: Tensor, labels_B: Tensor, shard: ClassifierShard) -> Tensor:
        shard.weight.copy_(weight_ND)
        output = shard.forward(x_BD, labels_B, total_rows=len(x_BD))
        shard.step(learning_rate=0.0)  # with μ = λ = η = 0 the momentum buffer is ∂w itself
        ctx.gradients = output.feature_gradient_bD, shard.momentum_buffer.clone()
        return output.loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_gradient, weight_gradient = ctx.gradients
        return scale * x_gradient, scale * weight_gradient, None, None


def gradcheck_streamed(group: Group, form: LossForm, alpha: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_ND = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    shard = make_shard(group, weight_ND.detach(), alpha, form, block_bytes=4 * 3 * 8)
    shard.refresh_hard_classes(2)
    labels_B = torch.tensor([5, 0, 5, 2])
    return torch.autograd.gradcheck(lambda x, w: StreamedLoss.apply(x, w, labels_B, shard), (x_BD, weight_ND))


@pytest.mark.parametrize(("form", "alpha"), [("mixture", 0.0), ("mixture", 0.2), ("cross_entropy", 0.2)])
def test_gradcheck(form: LossForm, alpha: float) -> None:
    assert run_ranks(gradcheck_streamed, 1, form, alpha) == [True]


def loss_of(group: Group, x_BD: Tensor, weight_ND: Tensor, labels_B: Tensor, alpha: float, k: int) -> float:
    shard = make_shard(group, weight_ND, alpha)
    shard.refresh_hard_classes(k)
    return shard.forward(x_BD, labels_B, total_rows=len(x_BD)).loss.item()


def test_equal_weights_cost_log_n() -> None:
    x_BD = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight_ND = torch.ones(101, 8, dtype=torch.float64) * 3
    (loss,) = run_ranks(loss_of, 1, x_BD, weight_ND, torch.arange(6), 0.0, 0)
    assert loss == pytest.approx(math.log(101), rel=1e-12)


def test_orthogonal_classes_have_a_closed_form() -> None:
    """x_i = w_i, all w orthogonal: log(e^{1/τ} + N - 1) - 1/τ."""
    eye = torch.eye(8, dtype=torch.float64)
    (loss,) = run_ranks(loss_of, 1, 5 * eye[:3], 2 * eye, torch.arange(3), 0.0, 0)
    assert loss == pytest.approx(math.log(math.exp(1 / 0.15) + 7) - 1 / 0.15, rel=1e-12)


def test_no_hard_classes_is_equation_1() -> None:
    generator = torch.Generator().manual_seed(1)
    x_BD = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    weight_ND = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    labels_B = torch.arange(6)
    expected = dense_loss(x_BD, weight_ND, dense_labels(labels_B, None, 0.0, 50), 0.15, "mixture").item()
    (k_0,) = run_ranks(loss_of, 1, x_BD, weight_ND, labels_B, 0.2, 0)
    (alpha_0,) = run_ranks(loss_of, 1, x_BD, weight_ND, labels_B, 0.0, 5)
    assert k_0 == pytest.approx(expected, rel=1e-12)
    assert alpha_0 == pytest.approx(expected, rel=1e-12)


def gradients_of(
    group: Group, x_BD: Tensor, weight_ND: Tensor, labels_B: Tensor, k: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    shard = make_shard(group, weight_ND, 0.2 if k else 0.0, **options)
    shard.refresh_hard_classes(k)
    output = shard.forward(x_BD, labels_B, total_rows=len(x_BD))
    shard.step(learning_rate=0.0)
    return output.loss, output.feature_gradient_bD, shard.momentum_buffer


def reference_gradients(x_BD: Tensor, weight_ND: Tensor, labels_B: Tensor, k: int, tau: float) -> list[Tensor]:
    x_BD, weight_ND = x_BD.clone().requires_grad_(), weight_ND.clone().requires_grad_()
    hard_BK = dense_hard_classes(weight_ND.detach().double(), k)[labels_B] if k else None
    y_BN = dense_labels(labels_B, hard_BK, 0.2, len(weight_ND)).to(x_BD.device)
    loss = dense_loss(x_BD, weight_ND, y_BN, tau, "mixture")
    return [loss.detach(), *torch.autograd.grad(loss, [x_BD, weight_ND])]


@pytest.mark.parametrize("tau", [0.03, 0.15])
def test_float32_is_as_exact_as_dense_float32(tau: float) -> None:
    """Down to the smallest τ allowed, though no maximum is subtracted: |truth - ours| ≤ 3 |truth - dense| + tiny."""
    generator = torch.Generator().manual_seed(2)
    weight_ND = torch.randn(3000, 16, generator=generator)
    labels_B = torch.randperm(3000, generator=generator)[:32]
    x_BD = weight_ND[labels_B] + 0.3 * torch.randn(32, 16, generator=generator)
    truth = reference_gradients(x_BD.double(), weight_ND.double(), labels_B, 20, tau)
    dense = reference_gradients(x_BD, weight_ND, labels_B, 20, tau)
    (ours,) = run_ranks(gradients_of, 1, x_BD, weight_ND, labels_B, 20, {"temperature": tau, "block_bytes": 2**16})
    for true, theirs, mine in zip(truth, dense, ours, strict=True):
        scale = true.abs().max()
        assert (true - mine).abs().max() <= 3 * (true - theirs).abs().max() + 1e-6 * scale


def test_bfloat16_products_stay_near_the_truth() -> None:
    """Judged by dense PyTorch whose two inputs are rounded to bfloat16: no more than four times its error."""
    generator = torch.Generator().manual_seed(3)
    weight_ND = torch.randn(3000, 64, generator=generator)
    labels_B = torch.randperm(3000, generator=generator)[:64]
    x_BD = weight_ND[labels_B] + torch.randn(64, 64, generator=generator)
    truth = reference_gradients(x_BD.double(), weight_ND.double(), labels_B, 20, 0.15)
    with torch.autocast("cpu", torch.bfloat16):
        dense = reference_gradients(x_BD, weight_ND, labels_B, 20, 0.15)
    (ours,) = run_ranks(gradients_of, 1, x_BD, weight_ND, labels_B, 20, {"matmul_dtype": torch.bfloat16})
    for true, theirs, mine in zip(truth, dense, ours, strict=True):
        allowed = 4 * torch.linalg.vector_norm(true - theirs) + 1e-3 * torch.linalg.vector_norm(true)
        assert torch.linalg.vector_norm(true - mine) <= allowed


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def largest_tensor(group: Group, num_rows: int, num_classes: int, block_bytes: int) -> int:
    generator = torch.Generator().manual_seed(4)
    shard = make_shard(group, torch.randn(num_classes, 8, generator=generator), 0.2, block_bytes=block_bytes)
    shard.refresh_hard_classes(5)
    x_BD = torch.randn(num_rows, 8, generator=generator)
    float32_precision()  # its self-test, once a process, is no part of a step
    with LargestTensor() as largest:
        shard.forward(x_BD, torch.arange(num_rows), total_rows=num_rows)
        shard.measure(x_BD, torch.arange(num_rows))
        shard.step(0.1)
    return largest.elements


def test_logits_of_the_whole_shard_never_exist() -> None:
    num_rows, num_classes, block_bytes = 256, 20_000, 2**20
    (largest,) = run_ranks(largest_tensor, 1, num_rows, num_classes, block_bytes)
    weights = num_classes * 8
    assert largest <= max(weights, block_bytes // 4)
    assert largest < num_rows * num_classes / 10


def sgd_matches(group: Group) -> bool:
    """Five steps of the fused update against torch.optim.SGD fed with the same gradients."""
    generator = torch.Generator().manual_seed(5)
    weight_ND = torch.randn(101, 8, generator=generator, dtype=torch.float64)
    shard = make_shard(group, weight_ND)
    shard.momentum, shard.weight_decay = 0.9, 1e-2
    twin = weight_ND.clone().requires_grad_()
    optimizer = torch.optim.SGD([twin], lr=0.3, momentum=0.9, weight_decay=1e-2)
    for _ in range(5):
        x_BD = torch.randn(6, 8, generator=generator, dtype=torch.float64)
        labels_B = torch.randint(0, 101, (6,), generator=generator)
        shard.forward(x_BD, labels_B, total_rows=6)
        shard.step(0.3)
        optimizer.zero_grad()
        dense_loss(x_BD, twin, dense_labels(labels_B, None, 0.0, 101), 0.15, "mixture").backward()
        optimizer.step()
    torch.testing.assert_close(shard.weight, twin.detach(), rtol=1e-10, atol=1e-12)
    return True


def test_the_fused_update_is_torch_sgd() -> None:
    assert run_ranks(sgd_matches, 1) == [True]
