"""Parts of the softmax one by one, where a whole step would hide a mistake."""

from typing import Any

import pytest
import torch
from torch import Tensor

from instance_ssl.classifier import torch_passes
from instance_ssl.classifier.reference import dense_hard_classes, dense_labels
from instance_ssl.classifier.sampling import RowClock
from instance_ssl.classifier.softmax import (
    RowUpdate,
    SmoothedLabels,
    SoftmaxOptions,
    directions,
    inverse_norms,
    normalise_rows,
    own_labels,
)

OPTIONS = SoftmaxOptions(0.15, "mixture", torch.float32, block_bytes=1)  # one class a block


def as_dense(labels: SmoothedLabels, shape: tuple[int, int]) -> Tensor:
    dense = torch.zeros(shape, dtype=torch.float64)
    dense[labels.rows, labels.classes] = labels.values
    return dense


def test_labels_share_what_is_left_of_the_hardest_and_are_one_hot_without_any() -> None:
    labels_B = torch.tensor([2, 0, 3])
    hard_BK = torch.tensor([[0, 1, 4], [4, -1, 1], [-1, -1, -1]])
    labels = own_labels(labels_B, hard_BK, 0.2, 0, 5, torch.float64)
    y_BN = as_dense(labels, (3, 5))
    torch.testing.assert_close(y_BN, dense_labels(labels_B, hard_BK, 0.2, 5))
    torch.testing.assert_close(y_BN.sum(dim=1), torch.ones(3, dtype=torch.float64))
    assert y_BN[2, 3] == 1


def test_micro_batches_joined_are_the_labels_of_one_batch() -> None:
    labels_B, hard_BK = torch.tensor([2, 0, 3, 0, 4]), torch.tensor([[0, 1], [4, 1], [0, 2], [3, 2], [1, 0]])
    parts = []
    for rows in (slice(0, 2), slice(2, 5)):
        part = own_labels(labels_B[rows], hard_BK[rows], 0.2, 0, 5, torch.float64)
        # Any number that tells an entry from the others may stand for its exp(s).
        parts.append(SmoothedLabels(part.rows, part.classes, part.values, 10.0 * part.rows + part.classes + rows.start))
    joined = SmoothedLabels.concatenate(parts, [2, 3])
    torch.testing.assert_close(as_dense(joined, (5, 5)), dense_labels(labels_B, hard_BK, 0.2, 5))
    assert (joined.classes.diff() >= 0).all()
    assert joined.exp is not None
    first = torch.where(joined.rows < 2, 0, 2)
    torch.testing.assert_close(joined.exp, 10.0 * (joined.rows - first) + joined.classes + first)


def test_the_gradient_is_the_mean_over_the_rows_it_is_told() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(7, 4, generator=generator), torch.randn(3, 4, generator=generator)
    unit_x, labels = normalise_rows(x)[0], own_labels(torch.tensor([1, 5, 2]), None, 0.0, 0, 7, torch.float32)
    sums = torch_passes.softmax_sums(unit_x, weight, labels, OPTIONS)
    gradients = []
    for total_rows in (None, 3, 6):
        buffer, arguments = torch.zeros_like(weight), (labels, weight.clone())
        update = RowUpdate(0.0, 0.0, 0.0)
        torch_passes.update_rows(unit_x, sums.z_B, sums.y_B, *arguments, buffer, OPTIONS, update, total_rows=total_rows)
        gradients.append(buffer)
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], 2 * gradients[2])


def test_the_best_class_is_the_lowest_of_equals() -> None:
    weight = torch.tensor([[0.0, 0.0], [-1.0, 0.1], [-1.0, 0.1], [-1.0, 1.0]])
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.1]])
    unit_x, _ = normalise_rows(x)
    best, classes = torch_passes.best_classes(unit_x, weight, OPTIONS)
    assert classes.tolist() == [0, 1]
    torch.testing.assert_close(best, torch.tensor([0.0, 1.0]))


def test_rows_that_are_settled_late_are_rounded_stochastically() -> None:
    """The map's whole change is a third of half a bfloat16 unit: rounding to nearest would lose it every time."""
    exact = 1 + 2**-7 / 6  # bfloat16 has 1 and 1 + 2^-7
    settled = []
    for seed in range(2):
        weight = torch.ones(2000, 8, dtype=torch.bfloat16)
        momentum = torch.full_like(weight, -(exact - 1), dtype=torch.float32)
        clock = RowClock(weight, momentum)
        clock.advance(torch.empty(0, dtype=torch.int64), RowUpdate(learning_rate=1.0, momentum=1.0, weight_decay=0.0))
        clock.settle(None, seed)
        settled.append(weight.float())
    assert set(settled[0].unique().tolist()) == {1.0, 1 + 2.0**-7}
    assert settled[0].mean().item() == pytest.approx(exact, abs=5 * 2**-8 / 16_000**0.5)
    assert not torch.equal(settled[0], settled[1])


LONG_AND_SHORT = (2.0**100, 2.0**125, 1.0)


def test_norms_do_not_overflow_and_ordinary_rows_keep_their_bits() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(9, 16, generator=generator)
    plain = rows * torch.linalg.vector_norm(rows, dim=1, keepdim=True).reciprocal()
    long = rows * torch.tensor(LONG_AND_SHORT)[torch.arange(9) % 3][:, None]
    long[1] = torch.finfo(torch.float32).max  # its norm is no float32 number
    unit, inverse = normalise_rows(long)
    assert torch.equal(unit[2::3], plain[2::3])
    assert torch.equal(directions(long)[2::3], plain[2::3])
    truth = long.double() / torch.linalg.vector_norm(long.double(), dim=1, keepdim=True)
    torch.testing.assert_close(unit.double(), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(directions(long).double(), truth, rtol=3e-7, atol=0)
    assert torch.equal(inverse_norms(long, out=torch.empty(9, 1)), inverse)
    short = torch.cat([rows * 2.0**-100, torch.zeros(1, 16)])
    assert torch.equal(directions(short)[:-1], plain)
    assert not directions(short)[-1].any()
    assert not normalise_rows(short)[0].any()  # a gradient divided by such a norm would leave float32


def losses_and_gradients(weight: Tensor, x: Tensor) -> list[Tensor]:
    unit_x, _ = normalise_rows(x)
    labels = own_labels(torch.arange(len(x)), dense_hard_classes(weight, 2)[: len(x)], 0.2, 0, len(weight), x.dtype)
    sums = torch_passes.softmax_sums(unit_x, weight, labels, SoftmaxOptions(0.15, "mixture", x.dtype, 2**12))
    buffer = torch.zeros_like(weight)
    arguments: tuple[Any, ...] = (labels, weight.clone(), buffer, OPTIONS, RowUpdate(0.0, 0.0, 0.0))
    torch_passes.update_rows(unit_x, sums.z_B, sums.y_B, *arguments)
    return [sums.z_B, sums.y_B, sums.dense_BD, sums.sparse_BD, buffer]


def test_long_rows_of_w_count_in_the_softmax_like_any_other() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(12, 8, generator=generator), torch.randn(4, 8, generator=generator)
    scales = torch.ones(12, 1)
    scales[::3] = 2.0**100
    *sums, gradient = losses_and_gradients(weight, x)
    *long_sums, long_gradient = losses_and_gradients(weight * scales, x * 2.0**100)
    for ours, theirs in zip(long_sums, sums, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    is_long = scales[:, 0] > 1
    torch.testing.assert_close(long_gradient[~is_long], gradient[~is_long], rtol=1e-4, atol=1e-5)
    assert long_gradient[is_long].abs().max() < 1e-29  # as it is divided by the norm
