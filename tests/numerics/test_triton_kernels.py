"""The Triton kernels against the blocked PyTorch path, float64 and the dense twin, in Triton's interpreter.

`PYTHONPATH=.:tests python tests/numerics/test_triton_kernels.py` runs the same checks compiled, on a GPU.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from instance_ssl.classifier import softmax, torch_passes, triton_passes
from instance_ssl.classifier.reference import dense_labels, dense_loss
from instance_ssl.classifier.softmax import (
    RowUpdate,
    SmoothedLabels,
    SoftmaxOptions,
    SoftmaxSums,
    normalise_rows,
    own_labels,
    project_gradient,
    unit_feature_gradient,
)
from instance_ssl.classifier.triton_passes import Tile
from instance_ssl.config.choices import LossForm

pytest.importorskip("triton", reason="triton is not installed")

UPDATE = RowUpdate(learning_rate=0.3, momentum=0.9, weight_decay=1e-2, seed=7)
FORMS: tuple[LossForm, ...] = ("mixture", "cross_entropy")
SUMS = ("z_B", "y_B", "dense_BD", "sparse_BD")


SMALL_TILE = Tile(32, 32, 4, 1)


@dataclass(frozen=True)
class Case:
    """One problem; the default tile leaves partial tiles and several splits and chunks."""

    rows: int
    classes: int
    dim: int
    hard: int
    form: LossForm = "mixture"
    matmul: torch.dtype = torch.float32
    temperature: float = 0.15
    tile: Tile | None = SMALL_TILE
    weight: torch.dtype = torch.float32
    momentum: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        formats = "-".join(str(t).removeprefix("torch.") for t in (self.matmul, self.weight, self.momentum))
        return f"{self.rows}x{self.classes}x{self.dim}-K{self.hard}-{self.form}-{self.temperature}-{formats}"

    @property
    def options(self) -> SoftmaxOptions:
        return SoftmaxOptions(self.temperature, self.form, self.matmul, 128 * max(16, self.dim) * self.matmul.itemsize)

    def problem(self) -> tuple[Tensor, Tensor, SmoothedLabels, Tensor]:
        """Unit x (B, D), w (n, D) in the rows' format, entries and dense y (B, n); rows near their class."""
        generator = torch.Generator().manual_seed(self.rows + self.classes)
        weight_nD = torch.randn(self.classes, self.dim, generator=generator).to(self.weight)
        labels_B = torch.randint(0, self.classes, (self.rows,), generator=generator)
        noise_BD = torch.randn(self.rows, self.dim, generator=generator)
        unit_x_BD, _ = normalise_rows(weight_nD.float()[labels_B] + noise_BD)
        hard_BK = None
        if self.hard:
            others = torch.rand(self.rows, self.classes, generator=generator).scatter_(1, labels_B[:, None], -1)
            hard_BK = others.topk(self.hard, dim=1).indices
        labels = own_labels(labels_B, hard_BK, 0.2, 0, self.classes, torch.float32)
        y_Bn = dense_labels(labels_B, hard_BK, 0.2, self.classes)
        labels = SmoothedLabels(*(t.to(self.device) for t in (labels.rows, labels.classes, labels.values)))
        return unit_x_BD.to(self.device), weight_nD.to(self.device), labels, y_Bn


CASES = [
    Case(1, 1, 8, 0),
    Case(1, 61, 16, 5, matmul=torch.bfloat16),
    Case(37, 507, 16, 20),
    Case(37, 507, 16, 20, matmul=torch.bfloat16),
    Case(37, 507, 8, 5, "cross_entropy"),
    Case(130, 61, 128, 5, "cross_entropy", torch.bfloat16),
    Case(130, 507, 20, 0, matmul=torch.bfloat16),
    Case(130, 507, 128, 20, tile=None),
    Case(130, 507, 128, 20, matmul=torch.bfloat16, tile=None),
    Case(37, 61, 8, 20, temperature=0.03, tile=Tile(64, 16, 4, 1)),
]


def blocked_update(
    case: Case, x: Tensor, z: Tensor, y: Tensor, labels: SmoothedLabels, w: Tensor, m: Tensor, update: RowUpdate
) -> None:
    """The blocked PyTorch path's second pass."""
    torch_passes.update_rows(x, z, y, labels, w, m, case.options, update)


def in_float64(case: Case, labels: SmoothedLabels) -> tuple[Case, SmoothedLabels]:
    return replace(case, matmul=torch.float64), replace(labels, values=labels.values.double())


def assert_no_worse(name: str, ours: Tensor, theirs: Tensor, truth: Tensor, tolerance: float) -> None:
    """Our error is at most 1.5 times the blocked path's, or a small fraction of the truth's size."""
    ours_error, their_error = (torch.linalg.vector_norm(t.double() - truth).item() for t in (ours, theirs))
    allowed = 1.5 * their_error + tolerance * torch.linalg.vector_norm(truth).item()
    assert ours_error <= allowed, f"{name}: {ours_error:.3g} > {allowed:.3g}, blocked {their_error:.3g}"


def check_sums(case: Case) -> None:
    unit_x_BD, weight_nD, labels, y_Bn = case.problem()
    ours = triton_passes.softmax_sums(unit_x_BD, weight_nD, labels, case.options, tile=case.tile)
    theirs = torch_passes.softmax_sums(unit_x_BD, weight_nD.float(), labels, case.options)
    exact, exact_labels = in_float64(case, labels)
    truth = torch_passes.softmax_sums(unit_x_BD.double(), weight_nD.double(), exact_labels, exact.options)
    # The blocked path takes the terms of y's entries in float32, the kernels those of bfloat16 embeddings, in Z and Y
    # alike: each sum then carries the embeddings' rounding, 2^-8, times 1/τ; what they give together does not.
    tolerance = 1e-6 if case.matmul == torch.float32 else 2**-8 / case.temperature
    for name in SUMS:
        assert_no_worse(name, getattr(ours, name), getattr(theirs, name), getattr(truth, name), tolerance)

    def gradient(sums: SoftmaxSums) -> Tensor:
        return unit_feature_gradient(sums, sums.z_B, sums.y_B, case.options, case.rows)

    tolerance = 1 if case.classes == 1 else 2e-6 if case.matmul == torch.float32 else 2**-8
    assert_no_worse("dx", gradient(ours), gradient(theirs), gradient(truth), tolerance)
    again = triton_passes.softmax_sums(unit_x_BD, weight_nD, labels, case.options, tile=case.tile)
    assert all(torch.equal(getattr(ours, name), getattr(again, name)) for name in SUMS), "not deterministic"
    twin_x_BD = unit_x_BD.double().cpu().requires_grad_()
    loss = dense_loss(twin_x_BD, weight_nD.double().cpu(), y_Bn, case.temperature, case.form)
    our_loss = softmax.row_losses(ours.z_B, ours.y_B, case.form).mean().item()
    assert abs(our_loss - loss.item()) <= (1e-2 if case.matmul == torch.bfloat16 else 2e-6 * abs(loss.item()) + 1e-5)


def check_update(case: Case) -> None:
    """One step of rows and momentum; the change of the rows is judged, not the rows."""
    unit_x_BD, weight_nD, labels, y_Bn = case.problem()
    momentum_nD = (1e-2 * torch.randn(weight_nD.shape, generator=torch.Generator().manual_seed(0))).to(case.momentum)
    exact, exact_labels = in_float64(case, labels)
    sums = torch_passes.softmax_sums(unit_x_BD.double(), weight_nD.double(), exact_labels, exact.options)
    exact_rows, exact_momentum = weight_nD.double(), momentum_nD.double().to(case.device)
    twin_nD = weight_nD.double().cpu().requires_grad_()
    dense_loss(unit_x_BD.double().cpu(), twin_nD, y_Bn, case.temperature, case.form).backward()
    assert twin_nD.grad is not None
    change_nD = 0.9 * exact_momentum + (twin_nD.grad + 1e-2 * twin_nD.detach()).to(case.device)
    exact_momentum, exact_rows = change_nD, exact_rows - 0.3 * change_nD

    z_B, y_B = sums.z_B.float(), sums.y_B.float()
    rows, buffer = weight_nD.clone(), momentum_nD.to(case.device)
    triton_passes.update_rows(unit_x_BD, z_B, y_B, labels, rows, buffer, case.options, UPDATE, tile=case.tile)
    their_rows, their_buffer = weight_nD.float(), momentum_nD.to(case.device).float()
    blocked_update(case, unit_x_BD, z_B, y_B, labels, their_rows, their_buffer, UPDATE)
    assert_no_worse("momentum", buffer, their_buffer, exact_momentum, 1e-6 if buffer.dtype == torch.float32 else 2**-8)
    start = weight_nD.double()
    tolerance = 1e-5 if rows.dtype == torch.float32 else 0.25  # bfloat16: the step is a few units in the last place
    assert_no_worse("rows", rows.double() - start, their_rows.double() - start, exact_rows - start, tolerance)


def check_confident_rows(device: str) -> None:
    """bfloat16 products leave a gradient that is 1 % of its two parts good to a few per cent of itself."""
    case = Case(37, 61, 64, 0, matmul=torch.bfloat16, temperature=0.07, device=device)
    _, weight_nD, labels, _ = case.problem()
    noise_nD = 0.3 * torch.randn(weight_nD.shape, generator=torch.Generator().manual_seed(1)).to(device)
    unit_x_BD = torch.empty(case.rows, case.dim, device=device)
    unit_x_BD[labels.rows] = normalise_rows((weight_nD + noise_nD)[labels.classes])[0]
    exact, exact_labels = in_float64(case, labels)
    truth = torch_passes.softmax_sums(unit_x_BD.double(), weight_nD.double(), exact_labels, exact.options)
    assert (truth.y_B / truth.z_B).mean() > 0.98
    ours = triton_passes.softmax_sums(unit_x_BD, weight_nD, labels, case.options, tile=case.tile)

    def gradient(sums: SoftmaxSums) -> Tensor:
        gradient_BD = unit_feature_gradient(sums, sums.z_B, sums.y_B, case.options, case.rows).double()
        return project_gradient(
            gradient_BD, unit_x_BD.double(), torch.ones_like(sums.z_B, dtype=torch.float64)[:, None]
        )

    def error(value: Tensor, true: Tensor) -> float:
        return (torch.linalg.vector_norm(value - true) / torch.linalg.vector_norm(true)).item()

    assert error(gradient(ours), gradient(truth)) < 0.03
    buffer, true_buffer = torch.zeros_like(weight_nD), torch.zeros_like(weight_nD, dtype=torch.float64)
    still = RowUpdate(0.0, 0.0, 0.0, 1)
    triton_passes.update_rows(
        unit_x_BD,
        truth.z_B.float(),
        truth.y_B.float(),
        labels,
        weight_nD.clone(),
        buffer,
        case.options,
        still,
        tile=case.tile,
    )
    blocked_update(
        exact, unit_x_BD.double(), truth.z_B, truth.y_B, exact_labels, weight_nD.double(), true_buffer, still
    )
    assert error(buffer, true_buffer) < 0.03


def weight_gradient(
    passes: ModuleType, x: Tensor, sums: SoftmaxSums, labels: SmoothedLabels, w: Tensor, options: SoftmaxOptions
) -> Tensor:
    """∂J/∂w after these sums of the first pass."""
    buffer, labels = torch.zeros_like(w), replace(labels, exp=sums.entry_exp_P)
    passes.update_rows(x, sums.z_B, sums.y_B, labels, w.clone(), buffer, options, RowUpdate(0.0, 0.0, 0.0, 1))
    return buffer


SATURATED: list[tuple[LossForm, float]] = [
    ("mixture", 0.07),
    ("mixture", 0.15),
    ("mixture", 0.03),
    ("cross_entropy", 0.03),
]


def check_saturated_rows(device: str, settings: Sequence[tuple[LossForm, float]] = SATURATED) -> None:
    """Rows that know their class: |truth - ours| ≤ 2 |truth - PyTorch's| + tiny for ∂W, the small difference p - q.

    On the kernels' own sums, and on the true ones, which lack the exp(s) of the entries.
    """
    generator = torch.Generator().manual_seed(0)
    weight_nD = torch.randn(31, 16, generator=generator)
    labels_B = torch.randint(0, 31, (16,), generator=generator)
    hard_BK = (labels_B[:, None] + torch.arange(1, 4)) % 31
    noise_BD = torch.randn(16, 16, generator=generator)
    tight_BD = [normalise_rows(weight_nD[labels_B] + scale * noise_BD)[0].to(device) for scale in (0.1, 0.03)]
    weight_nD = weight_nD.to(device)
    for (form, tau), matmul in itertools.product(settings, (torch.float32, torch.bfloat16)):
        options = SoftmaxOptions(tau, form, matmul)
        exact = replace(options, matmul_dtype=torch.float64)
        for unit_x_BD, hard, alpha in zip(tight_BD, (None, hard_BK), (0.0, 0.2), strict=True):
            labels = own_labels(labels_B, hard, alpha, 0, 31, torch.float32)
            labels = SmoothedLabels(*(t.to(device) for t in (labels.rows, labels.classes, labels.values)))
            exact_labels = replace(labels, values=labels.values.double())
            x, w = unit_x_BD.double(), weight_nD.double()
            sums = torch_passes.softmax_sums(x, w, exact_labels, exact)
            truth = weight_gradient(torch_passes, x, sums, exact_labels, w, exact)
            true_sums = replace(sums, z_B=sums.z_B.float(), y_B=sums.y_B.float(), entry_exp_P=None)
            for given in (None, true_sums):
                ours, theirs = (
                    weight_gradient(passes, unit_x_BD, given or own, labels, weight_nD, options)
                    for passes in (triton_passes, torch_passes)
                    for own in [passes.softmax_sums(unit_x_BD, weight_nD, labels, options)]
                )
                our_error, their_error = (torch.linalg.vector_norm(t.double() - truth) for t in (ours, theirs))
                name = f"{form}, {matmul}, τ {tau}, α {alpha}, {'own' if given is None else 'true'} sums"
                # The kernels' exp(s) of entries are those of embeddings in bfloat16, which 1/τ magnifies.
                share = 2e-7 if matmul == torch.float32 else 2**-9 / tau
                allowed = 2 * their_error + share * torch.linalg.vector_norm(truth)
                assert our_error <= allowed, f"{name}: {our_error:.3g} > {allowed:.3g}"


def check_stochastic_rounding(device: str) -> None:
    """Rows land on the two bfloat16 neighbours of the float32 result, on average on the result itself."""
    case = Case(4, 61, 16, 0, weight=torch.bfloat16, tile=Tile(16, 64, 4, 1), device=device)
    unit_x_BD, weight_nD, labels, _ = case.problem()
    sums = triton_passes.softmax_sums(unit_x_BD, weight_nD, labels, case.options, tile=case.tile)

    def step(rows: Tensor, seed: int, learning_rate: float) -> Tensor:
        buffer = torch.full_like(rows, 0.01, dtype=torch.float32)
        update = RowUpdate(learning_rate, 0.9, 0.0, seed)
        args = (unit_x_BD, sums.z_B, sums.y_B, labels, rows, buffer, case.options, update)
        triton_passes.update_rows(*args, tile=case.tile)
        return rows.float()

    assert torch.equal(step(weight_nD.clone(), 1, 0.0), weight_nD.float()), "a bfloat16 number must stay itself"
    exact = step(weight_nD.float(), 1, 0.1)
    draws = torch.stack([step(weight_nD.clone(), seed, 0.1) for seed in range(1, 129)])
    assert torch.equal(draws[0], step(weight_nD.clone(), 1, 0.1)), "the same seed must round alike"
    unit = torch.exp2(exact.abs().log2().floor() - 7)
    errors = (draws - exact) / unit
    assert (errors.abs() < 1).all(), "not a neighbour"
    assert errors.mean().abs() < 0.01, errors.mean()  # standard error below 0.5/√(128 · 976) = 0.0014
    assert errors.mean(dim=0).abs().max() < 5 * 0.5 / 128**0.5
    assert (errors.std(dim=0) > 0).float().mean() > 0.95, "seeds must differ"


def check_zero_rows(device: str) -> None:
    """Zero features and zero rows: everything finite, a zero row's sums those of cosine 0, and it stays 0."""
    case = Case(5, 37, 16, 5, device=device)
    unit_x_BD, weight_nD, labels, _ = case.problem()
    unit_x_BD[2], weight_nD[3] = 0, 0
    weight_nD[labels.classes[0]] = 0
    ours = triton_passes.softmax_sums(unit_x_BD, weight_nD, labels, case.options, tile=case.tile)
    exact, exact_labels = in_float64(case, labels)
    truth = torch_passes.softmax_sums(unit_x_BD.double(), weight_nD.double(), exact_labels, exact.options)
    for name in SUMS:
        torch.testing.assert_close(getattr(ours, name).double(), getattr(truth, name), rtol=1e-5, atol=1e-5)
    rows, buffer = weight_nD.clone(), torch.zeros_like(weight_nD)
    triton_passes.update_rows(unit_x_BD, ours.z_B, ours.y_B, labels, rows, buffer, case.options, UPDATE, tile=case.tile)
    assert rows.isfinite().all()
    assert buffer.isfinite().all()
    assert not rows[[3, int(labels.classes[0])]].any()
    assert not buffer[[3, int(labels.classes[0])]].any()


def check_long_rows(device: str) -> None:
    """Rows whose squares overflow have the sums of any other, and gradients divided by their norms."""
    case = Case(5, 37, 16, 5, device=device)
    unit_x_BD, weight_nD, labels, _ = case.problem()
    is_long_n = torch.arange(37, device=device) % 3 == 0
    long_nD = torch.where(is_long_n[:, None], weight_nD * 2.0**100, weight_nD)
    ours, usual = (
        triton_passes.softmax_sums(unit_x_BD, w, labels, case.options, tile=case.tile) for w in (long_nD, weight_nD)
    )
    for name in SUMS:
        torch.testing.assert_close(getattr(ours, name), getattr(usual, name), rtol=1e-5, atol=1e-5)
    gradient = weight_gradient(triton_passes, unit_x_BD, ours, labels, long_nD, case.options)
    expected = weight_gradient(triton_passes, unit_x_BD, usual, labels, weight_nD, case.options)
    expected[is_long_n] *= 2.0**-100
    torch.testing.assert_close(gradient * 2.0**60, expected * 2.0**60, rtol=1e-4, atol=1e-9)


def check_shard_without_labels(device: str) -> None:
    """A shard may own no class of any label: its Y and C are zero, its rows still move away."""
    case = Case(37, 61, 16, 0, device=device)
    unit_x_BD, weight_nD, labels, _ = case.problem()
    none = SmoothedLabels(labels.rows[:0], labels.classes[:0], labels.values[:0])
    ours = triton_passes.softmax_sums(unit_x_BD, weight_nD, none, case.options, tile=case.tile)
    exact, no_labels = in_float64(case, none)
    truth = torch_passes.softmax_sums(unit_x_BD.double(), weight_nD.double(), no_labels, exact.options)
    for name in SUMS:
        torch.testing.assert_close(getattr(ours, name).double(), getattr(truth, name), rtol=1e-5, atol=1e-5)
    y_B = torch.ones_like(ours.y_B)
    rows, buffer, their_rows, their_buffer = (torch.clone(weight_nD) for _ in range(4))
    triton_passes.update_rows(unit_x_BD, ours.z_B, y_B, none, rows, buffer, case.options, UPDATE, tile=case.tile)
    blocked_update(case, unit_x_BD, ours.z_B, y_B, none, their_rows, their_buffer, UPDATE)
    torch.testing.assert_close((rows, buffer), (their_rows, their_buffer), rtol=1e-5, atol=1e-5)


def check_saturated_rows_at_one_temperature(device: str) -> None:
    check_saturated_rows(device, SATURATED[:1])


def check_available(device: str) -> None:
    assert triton_passes.available(torch.device(device), 128, torch.bfloat16)
    assert not triton_passes.available(torch.device(device), 128, torch.float64)
    assert not triton_passes.available(torch.device(device), 4096, torch.bfloat16)


CHECKS: list[tuple[Callable[..., None], Any]] = [
    *((check_sums, case) for case in CASES),
    *((check_update, case) for case in CASES),
    (check_update, Case(37, 61, 16, 5, weight=torch.bfloat16, momentum=torch.bfloat16, matmul=torch.bfloat16)),
    (check_update, Case(37, 61, 16, 5, weight=torch.bfloat16)),
    (check_sums, Case(37, 61, 16, 5, weight=torch.bfloat16, matmul=torch.bfloat16)),
    (check_confident_rows, "cpu"),
    (check_saturated_rows, "cpu"),
    (check_saturated_rows_at_one_temperature, "cpu"),
    (check_stochastic_rounding, "cpu"),
    (check_zero_rows, "cpu"),
    (check_long_rows, "cpu"),
    (check_shard_without_labels, "cpu"),
    (check_available, "cpu"),
]


def is_slow(check: Callable[..., None], case: Any) -> bool:
    """Whether the interpreter takes so long for a check that only `-m full` runs it."""
    return check is check_saturated_rows or (isinstance(case, Case) and case.rows * case.classes > 50_000)


@pytest.mark.parametrize(
    ("check", "case"),
    [pytest.param(*each, marks=pytest.mark.full if is_slow(*each) else ()) for each in CHECKS],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_interpreted(interpreter: ProcessPoolExecutor, check: Callable[..., None], case: Any) -> None:
    interpreter.submit(check, case).result()


# Too long for the interpreter.
GPU_CASES = [
    Case(1000, 20_003, 128, 100, form, matmul, tile=None)
    for form in FORMS
    for matmul in (torch.float32, torch.bfloat16)
]

if __name__ == "__main__":
    for check, case in [*CHECKS, *((check, case) for case in GPU_CASES for check in (check_sums, check_update))]:
        case = replace(case, device="cuda") if isinstance(case, Case) else "cuda"
        try:
            check(case)
            print("passed", check.__name__, case)
        except Exception as error:  # all of them are worth seeing
            print("FAILED", check.__name__, case, repr(error))
