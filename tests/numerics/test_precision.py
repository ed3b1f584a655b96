"""Errors against float64, judged by those of plain PyTorch in the same precision: low precision owes no more."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from instance_ssl.classifier import torch_passes
from instance_ssl.classifier.matmul_rates import fast_float32_products, float32_precision
from instance_ssl.classifier.softmax import (
    RowUpdate,
    SoftmaxOptions,
    normalise_rows,
    own_labels,
    project_gradient,
    round_stochastically_,
    row_losses,
    unit_feature_gradient,
)

B, D, ALPHA = 64, 32, 0.2


class Results(NamedTuple):
    row_losses: Tensor
    feature_gradient: Tensor
    weight_gradient: Tensor


class Problem(NamedTuple):
    x: Tensor
    weight: Tensor
    labels: Tensor
    hard: Tensor | None


def make_problem(num_classes: int, scale: float) -> Problem:
    """Rows near their class, so that p is neither 0 nor 1, and up to 20 hard classes."""
    generator = torch.Generator().manual_seed(num_classes)
    weight = torch.randn(num_classes, D, generator=generator)
    labels = torch.randint(num_classes, (B,), generator=generator)
    x = weight[labels] + torch.randn(B, D, generator=generator)
    k = min(20, num_classes - 1)
    if k == 0:
        return Problem(x * scale, weight * scale, labels, None)
    others = torch.stack([torch.randperm(min(num_classes - 1, 500), generator=generator)[:k] for _ in range(B)])
    return Problem(x * scale, weight * scale, labels, others + (others >= labels[:, None]).long())


def dense(problem: Problem, tau: float, dtype: torch.dtype) -> Results:
    """Autograd with all logits in memory: in float64 the truth; in bfloat16 the product under autocast."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight = (t.to(wide).requires_grad_() for t in (problem.x, problem.weight))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        cosine = F.linear(F.normalize(x, dim=1), F.normalize(weight, dim=1))
    logits = cosine.to(wide) / tau
    columns = problem.labels[:, None]
    log_y = torch.zeros(B, 1, dtype=wide)
    if problem.hard is not None:
        columns = torch.cat([columns, problem.hard], dim=1)
        log_y = torch.full(columns.shape, math.log(ALPHA / problem.hard.shape[1]), dtype=wide)
        log_y[:, 0] = math.log(1 - ALPHA)
    losses = torch.logsumexp(logits, dim=1) - torch.logsumexp(logits.gather(1, columns) + log_y, dim=1)
    return Results(losses.detach(), *torch.autograd.grad(losses.mean(), [x, weight]))


def streamed(problem: Problem, tau: float, dtype: torch.dtype) -> Results:
    options = SoftmaxOptions(tau, "mixture", dtype, 2**20)
    num_classes = len(problem.weight)
    momentum = torch.zeros_like(problem.weight)
    unit_x, inverse = normalise_rows(problem.x)
    labels = own_labels(problem.labels, problem.hard, ALPHA, 0, num_classes, torch.float32)
    sums = torch_passes.softmax_sums(unit_x, problem.weight, labels, options)
    gradient = unit_feature_gradient(sums, sums.z_B, sums.y_B, options, B)
    update = RowUpdate(learning_rate=0.0, momentum=0.0, weight_decay=0.0)
    torch_passes.update_rows(unit_x, sums.z_B, sums.y_B, labels, problem.weight.clone(), momentum, options, update)
    losses = row_losses(sums.z_B, sums.y_B, "mixture")
    return Results(losses, project_gradient(gradient, unit_x, inverse), momentum)


def errors(truth: Results, found: Results) -> list[float]:
    """Norms of the errors, relative to the truth's."""
    return [((ours - true).norm() / true.norm()).item() for true, ours in zip(truth, found, strict=True)]


CASES = [(n, tau, 1.0) for n in (2, 507, 100_003) for tau in (0.03, 0.07, 0.15, 1.0)]
CASES += [(n, 0.15, scale) for n in (2, 507, 100_003) for scale in (1e-6, 1e6)]


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=["float32", "bfloat16"]
)
def test_errors_are_no_larger_than_plain_pytorch_s(dtype: torch.dtype) -> None:
    """Case by case within twice (one draw of rounding errors against another), and over all cases no larger."""
    resolution = 2e-7  # of float32, below which an error is luck
    own_logs, dense_logs = [], []
    for num_classes, tau, scale in CASES:
        problem = make_problem(num_classes, scale)
        truth = dense(problem, tau, torch.float64)
        own, theirs = errors(truth, streamed(problem, tau, dtype)), errors(truth, dense(problem, tau, dtype))
        for ours, dense_s in zip(own, theirs, strict=True):
            assert ours <= 2 * dense_s + resolution, (num_classes, tau, scale, own, theirs)
        own_logs += [math.log(e + resolution) for e in own]
        dense_logs += [math.log(e + resolution) for e in theirs]
    assert sum(own_logs) <= sum(dense_logs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tau", [0.03, 0.07, 0.15, 1.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_one_class_costs_and_teaches_nothing(dtype: torch.dtype, tau: float, scale: float) -> None:
    losses, feature_gradient, weight_gradient = streamed(make_problem(1, scale), tau, dtype)
    assert losses.abs().max() < 1e-5
    assert feature_gradient.abs().max() < 1e-5 / (scale * tau)
    assert weight_gradient.abs().max() < 1e-5 / (scale * tau)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_without_direction_stay_finite_and_still(dtype: torch.dtype) -> None:
    problem = make_problem(507, 1.0)
    problem.x[3] = 0
    problem.weight[problem.labels[5]] = 0
    losses, feature_gradient, weight_gradient = streamed(problem, 0.15, dtype)
    assert losses.isfinite().all()
    assert feature_gradient.isfinite().all()
    assert weight_gradient.isfinite().all()
    assert (feature_gradient[3] == 0).all()
    assert (weight_gradient[problem.labels[5]] == 0).all()


def test_the_fused_update_is_torch_sgd_in_float32() -> None:
    """Ten steps; torch.optim.SGD is fed the dense gradients of its own weights."""
    problem = make_problem(507, 1.0)
    weight, momentum = problem.weight.clone(), torch.zeros_like(problem.weight)
    twin = problem.weight.clone().requires_grad_()
    optimizer = torch.optim.SGD([twin], lr=0.3, momentum=0.9, weight_decay=1e-2)
    options = SoftmaxOptions(0.15, "mixture", torch.float32, 2**18)
    unit_x, _ = normalise_rows(problem.x)
    labels = own_labels(problem.labels, problem.hard, ALPHA, 0, 507, torch.float32)
    for _ in range(10):
        sums = torch_passes.softmax_sums(unit_x, weight, labels, options)
        torch_passes.update_rows(
            unit_x, sums.z_B, sums.y_B, labels, weight, momentum, options, RowUpdate(0.3, 0.9, 1e-2)
        )
        twin.grad = dense(problem._replace(weight=twin.detach()), 0.15, torch.float32).weight_gradient
        optimizer.step()
    torch.testing.assert_close(weight, twin.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(momentum, optimizer.state[twin]["momentum_buffer"], rtol=2e-5, atol=2e-7)


def low_precision_drift(row_dtype: torch.dtype, momentum_dtype: torch.dtype, steps: int) -> float:
    """Distance from float32 training after some steps, relative to the way that float32 training went."""
    problem = make_problem(507, 1.0)
    options = SoftmaxOptions(0.15, "mixture", torch.float32, 2**18)
    unit_x, _ = normalise_rows(problem.x)
    labels = own_labels(problem.labels, problem.hard, ALPHA, 0, 507, torch.float32)
    ends = []
    for rows, momenta in ((torch.float32, torch.float32), (row_dtype, momentum_dtype)):
        weight = problem.weight.to(rows, copy=True)
        momentum = torch.zeros_like(weight, dtype=momenta)
        for step in range(steps):
            sums = torch_passes.softmax_sums(unit_x, weight, labels, options)
            update = RowUpdate(0.02, 0.9, 1e-4, seed=step)
            torch_passes.update_rows(unit_x, sums.z_B, sums.y_B, labels, weight, momentum, options, update)
        ends.append(weight.float())
    return ((ends[1] - ends[0]).norm() / (ends[0] - problem.weight).norm()).item()


def test_bfloat16_momentum_follows_float32() -> None:
    assert low_precision_drift(torch.float32, torch.bfloat16, steps=60) < 0.02


def test_bfloat16_rows_learn_from_steps_below_their_resolution() -> None:
    """A step of 0.02 x a gradient of 1e-3 is far below 2^-9 of a weight: rounding to nearest would not move at all."""
    problem = make_problem(507, 1.0)
    weight = problem.weight.bfloat16()
    options = SoftmaxOptions(0.15, "mixture", torch.float32, 2**18)
    unit_x, _ = normalise_rows(problem.x)
    labels = own_labels(problem.labels, problem.hard, ALPHA, 0, 507, torch.float32)
    sums = torch_passes.softmax_sums(unit_x, weight, labels, options)
    moved = torch.zeros(507, D)
    momentum = torch.zeros(507, D)
    for seed in range(400):
        one, momentum = weight.clone(), torch.zeros(507, D)
        update = RowUpdate(0.02, 0.0, 0.0, seed)
        torch_passes.update_rows(unit_x, sums.z_B, sums.y_B, labels, one, momentum, options, update)
        moved += one.float() - weight.float()
    wanted = -0.02 * momentum
    assert (weight.float() + wanted).bfloat16().sub(weight).abs().sum() < 0.05 * wanted.abs().sum()
    along = (moved / 400 * wanted).sum() / wanted.square().sum()
    assert along.item() == pytest.approx(1, abs=0.1)


def test_stochastic_rounding_takes_the_two_neighbours_with_the_right_odds() -> None:
    value = 1 + 0.3 * 2**-7  # bfloat16 has 1 and 1 + 2^-7
    values = torch.full((100_000,), value)
    rounded = round_stochastically_(values, torch.empty(100_000, dtype=torch.int32), torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert (rounded > 1).float().mean().item() == pytest.approx(0.3, abs=0.01)
    exact = torch.tensor([0.0, -1.5, 2.0**-100])
    kept = round_stochastically_(exact.clone(), torch.empty(3, dtype=torch.int32), torch.Generator().manual_seed(0))
    assert torch.equal(kept, exact)


def test_float32_products_are_never_less_than_float32() -> None:
    """Whatever the self-test has chosen on this machine, its error is float32's."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(300, 128, generator=generator), torch.randn(128, 500, generator=generator)
    before = torch.get_float32_matmul_precision()
    with fast_float32_products(torch.float32):
        assert torch.get_float32_matmul_precision() == float32_precision()
        error = (a @ b - a.double() @ b.double()).abs().max()
    assert torch.get_float32_matmul_precision() == before
    assert error < 1e-4
