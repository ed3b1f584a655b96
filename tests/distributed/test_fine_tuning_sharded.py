"""Fine-tuning on several ranks makes the steps of one process that sees the whole batch; it resumes bit for bit."""

import copy
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.evaluation import fine_tuning
from instance_ssl.evaluation.epoch_log import DivergedError, LabelledBatches, Progress
from instance_ssl.evaluation.fine_tuning import TrainingOptions, fine_tune

CLASSES, WIDTH, BATCH, IMAGES, TESTED = 6, 8, 16, 2 * 16 + 1, 23
STEPS_PER_EPOCH, STEPS = 3, 31
OPTIONS = TrainingOptions(
    steps=STEPS, backbone_learning_rate=0.1, classifier_learning_rate=1.0, nesterov=True, weight_decay=1e-3
)


def _images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return torch.eye(CLASSES, WIDTH)[labels] + 0.4 * torch.randn(count, WIDTH, generator=generator), labels


def _backbone(*, batch_norm: bool) -> nn.Sequential:
    torch.manual_seed(1)
    norm = [nn.BatchNorm1d(WIDTH)] if batch_norm else []
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *norm, nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def _order(epoch: int) -> Tensor:
    return torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch))


def _fine_tune(
    group: Group,
    options: TrainingOptions,
    *,
    batch_norm: bool = False,
    stop_after: int | None = None,
    state: dict[str, Any] | None = None,
) -> tuple[dict[str, float], dict[str, Any], list[dict[str, Any]]]:
    (train, labels), (test, test_labels) = _images(IMAGES, 0), _images(TESTED, 1)
    backbone = _backbone(batch_norm=batch_norm)
    states: list[dict[str, Any]] = []

    def train_parts(epoch: int) -> list[list[tuple[Tensor, Tensor]]]:
        steps = min(STEPS_PER_EPOCH, options.steps - epoch * STEPS_PER_EPOCH)
        batches = list(_order(epoch).split(BATCH))[:steps]
        own = [batch[slice(*Partition(len(batch), group.size).bounds(group.rank))] for batch in batches]
        return [[(train[piece], piece) for piece in ids.split(5) if len(piece) > batch_norm] for ids in own]

    def test_batches() -> list[tuple[Tensor, Tensor]]:
        ids = torch.arange(*Partition(TESTED, group.size).bounds(group.rank))
        return [(test[part], part) for part in ids.split(7)]

    def on_epoch(progress: Progress) -> None:
        states.append(copy.deepcopy(progress.state()))

    figures = fine_tune(
        backbone,
        LabelledBatches(train_parts, test_batches, labels, test_labels, CLASSES, STEPS_PER_EPOCH),
        group,
        options,
        feature_dim=WIDTH,
        seed=0,
        state=state,
        on_epoch=on_epoch,
    )
    return figures, states[-1]["network"] if states else {}, states


def _reference() -> tuple[dict[str, Tensor], Tensor]:
    """The same training, written out in one process: weights, and logits of the test images."""
    (train, labels), (test, _) = _images(IMAGES, 0), _images(TESTED, 1)
    network = nn.Sequential(_backbone(batch_norm=False), nn.Linear(WIDTH, CLASSES))
    with torch.no_grad():
        network[1].weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(0))
        network[1].bias.zero_()
    groups = [
        {"params": network[0].parameters(), "lr": OPTIONS.backbone_learning_rate},
        {"params": network[1].parameters(), "lr": OPTIONS.classifier_learning_rate},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        ids = _order(step // STEPS_PER_EPOCH).split(BATCH)[step % STEPS_PER_EPOCH]
        optimizer.zero_grad()
        cross_entropy(network(train[ids]), labels[ids]).backward()
        optimizer.step()
        schedule.step()
    names = {"0.": "backbone.", "1.": "classifier."}
    return {names[k[:2]] + k[2:]: v for k, v in network.state_dict().items()}, network(test).detach()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_weights_are_those_of_one_process_that_sees_the_whole_batch(size: int) -> None:
    """The last batch of an epoch is one image: that of one rank alone."""
    weights, logits = _reference()
    test_labels = _images(TESTED, 1)[1]
    right = logits.argmax(dim=1) == test_labels
    per_class = [right[test_labels == c].double().mean().item() for c in test_labels.unique()]
    for figures, state, _ in run_ranks(_fine_tune, size, OPTIONS):
        torch.testing.assert_close(state, weights, rtol=1e-5, atol=1e-6)
        assert figures["test_images"] == TESTED
        assert figures["epochs"] == 11
        assert figures["top1"] == pytest.approx(100 * right.double().mean().item())
        assert figures["mean_per_class"] == pytest.approx(100 * sum(per_class) / len(per_class))
        assert 30 < figures["top1"] <= figures["top5"]


def _with_and_without_a_break(group: Group) -> tuple[Any, Any, list[Tensor]]:
    unbroken = _fine_tune(group, OPTIONS, batch_norm=True)
    resumed = _fine_tune(group, OPTIONS, batch_norm=True, state=unbroken[2][0])
    statistics = unbroken[1]["backbone.1.running_mean"]
    return unbroken[:2], resumed[:2], [group.all_gather_rows(statistics[None])]


@pytest.mark.parametrize("size", [1, 2])
def test_a_resumed_training_ends_bit_for_bit_and_ranks_end_alike(size: int) -> None:
    for unbroken, resumed, (statistics,) in run_ranks(_with_and_without_a_break, size):
        assert resumed[0] == unbroken[0]
        torch.testing.assert_close(resumed[1], unbroken[1], rtol=0, atol=0)
        assert torch.equal(statistics[0], statistics[-1])
        assert statistics[0].abs().max() > 0


def _diverge(group: Group) -> str:
    try:
        _fine_tune(group, TrainingOptions(steps=6, backbone_learning_rate=1e30, classifier_learning_rate=1e30))
    except DivergedError as error:
        return str(error)
    return "no error"


def test_divergence_is_one_line_on_all_ranks() -> None:
    assert all("lower its learning rates" in message for message in run_ranks(_diverge, 2))


def averaged(group: Group) -> Tensor:
    norm = nn.BatchNorm1d(2)
    assert norm.running_mean is not None
    norm.running_mean.fill_(float(group.rank))
    fine_tuning._average_statistics(norm, group)  # type: ignore[arg-type]
    return norm.running_mean


def test_statistics_are_averaged_over_the_ranks() -> None:
    assert all(torch.equal(mean, torch.full((2,), 0.5)) for mean in run_ranks(averaged, 2))
