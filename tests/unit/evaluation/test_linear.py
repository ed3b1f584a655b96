"""The figures of the linear classifiers, piece by piece."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.evaluation.epoch_log import LabelledBatches, Progress
from instance_ssl.evaluation.features import state_digest
from instance_ssl.evaluation.linear import count_correct, probe_cached_features, train_linear_classifier


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    directory: Path = tmp_path_factory.mktemp("rendezvous")
    yield comm.initialize_from_file(str(directory / "file"), 0, 1)
    comm.finalize()


def test_equal_scores_rank_the_lower_class_first() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert count_correct(scores, torch.tensor([0, 1, 2])).tolist() == [1, 3]


def test_the_sixth_class_is_not_among_five() -> None:
    scores = torch.arange(12.0).view(2, 6)
    assert count_correct(scores, torch.tensor([0, 1])).tolist() == [0, 1]


def test_nan_is_never_correct() -> None:
    scores = torch.tensor([[math.nan, 0.0], [math.nan, math.nan]])
    assert count_correct(scores, torch.tensor([0, 1])).tolist() == [0, 0]


def test_probe_reaches_the_minimum_of_its_objective(group: Group) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 4, generator=generator) * torch.tensor([1.0, 100.0, 0.01, 0.0]) + 5
    labels = torch.randint(0, 3, (60,), generator=generator)
    result = probe_cached_features(rows, labels, rows, labels, group, num_classes=3, l2_penalties=[0.1], seed=0)

    spread = rows.double().std(dim=0, correction=0)
    standardised = (rows.double() - rows.double().mean(dim=0)) / torch.where(spread > 1e-6, spread, 1.0)
    weight = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(3000):
        loss = F.cross_entropy(standardised @ weight.T + bias, labels) + 0.05 * weight.square().sum()
        for parameter, gradient in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
            parameter.data -= 0.5 * gradient
    expected = count_correct((standardised @ weight.T + bias).detach(), labels)[0].item() / 60
    assert result["top1"] == pytest.approx(100 * expected)
    assert result["iterations"] < result["max_iterations"]


def test_probe_refuses_a_single_training_image(group: Group) -> None:
    row, label = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UserError, match="1 training images"):
        probe_cached_features(row, label, row, label, group, num_classes=2, l2_penalties=[1.0], seed=0)


@pytest.mark.parametrize("pieces", [4, 3, 1])
def test_training_loss_follows_plain_torch(group: Group, pieces: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 6, generator=generator)
    labels = torch.randint(0, 3, (10,), generator=generator)
    parts = [torch.tensor([3, 1, 4, 0]), torch.tensor([5, 9, 2, 6]), torch.tensor([8, 7])]
    losses: list[float] = []
    train_linear_classifier(
        lambda batch: 2 * batch,
        LabelledBatches(
            lambda epoch: [[(images[piece], piece) for piece in part.split(pieces)] for part in parts],
            lambda: [(images, torch.arange(10))],
            labels,
            labels,
            num_classes=3,
            steps_per_epoch=3,
        ),
        group,
        feature_dim=6,
        epochs=2,
        learning_rate=0.5,
        seed=7,
        on_epoch=lambda done: losses.append(done.train_loss),
    )

    layer = nn.Linear(6, 3)
    nn.init.normal_(layer.weight, 0, 0.01, generator=torch.Generator().manual_seed(7))
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    expected = []
    for _ in range(2):
        total = 0.0
        for part in parts:
            loss = F.cross_entropy(layer(2 * images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(part)
        expected.append(total / 10)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_training_goes_on_to_the_same_bits(group: Group) -> None:
    images = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    told: list[Progress] = []
    saved: list[dict[str, Any]] = []

    def on_epoch(done: Progress) -> None:
        told.append(done)
        saved.append(copy.deepcopy(done.state()))

    def train(state: dict[str, Any] | None) -> dict[str, float]:
        return train_linear_classifier(
            lambda batch: batch,
            LabelledBatches(
                lambda epoch: [[(images[ids], ids)] for ids in torch.arange(10).roll(epoch).split(4)],
                lambda: [(images, torch.arange(10))],
                torch.arange(10) % 3,
                torch.arange(10) % 3,
                num_classes=3,
                steps_per_epoch=3,
            ),
            group,
            feature_dim=6,
            epochs=4,
            learning_rate=0.5,
            state=state,
            on_epoch=on_epoch,
        )

    whole = train(None)
    assert train(saved[1]) == whole
    assert [done.epochs for done in told] == [1, 2, 3, 4, 3, 4]
    assert torch.equal(saved[3]["theta"], saved[5]["theta"])
    assert not torch.equal(saved[1]["theta"], saved[3]["theta"])


def test_the_encoder_stays_bit_equal(group: Group) -> None:
    encoder = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU())
    encoder[0].eval()
    digest = state_digest(encoder)
    images, labels = torch.randn(8, 4), torch.arange(8) % 2
    ids = torch.arange(8)

    train_linear_classifier(
        encoder,
        LabelledBatches(
            lambda epoch: [[(images, ids)]], lambda: [(images, ids)], labels, labels, num_classes=2, steps_per_epoch=1
        ),
        group,
        feature_dim=5,
        epochs=3,
    )
    assert state_digest(encoder) == digest
    assert [module.training for module in encoder.modules()] == [True, False, True, True]
    encoder(images)
    assert state_digest(encoder) != digest  # the running statistics count


def test_divergence_is_the_users_to_mend(group: Group) -> None:
    images, ids = torch.full((2, 1), math.inf), torch.arange(2)
    data = LabelledBatches(lambda epoch: [[(images, ids)]], lambda: [(images, ids)], ids, ids, 2, steps_per_epoch=1)
    with pytest.raises(UserError, match="lower its learning rate"):
        train_linear_classifier(lambda batch: batch, data, group, feature_dim=1, epochs=1)
