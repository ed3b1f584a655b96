"""Evaluations where one image more or less, one rank's part or one divisor decides."""

import math
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.evaluation import fine_tuning, linear
from instance_ssl.evaluation.epoch_log import LabelledBatches
from instance_ssl.evaluation.fine_tuning import TrainingOptions
from instance_ssl.evaluation.knn import ShardedBank, knn_accuracy
from instance_ssl.evaluation.similarity import instance_similarities


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    yield comm.initialize_from_file(str(tmp_path_factory.mktemp("rendezvous") / "file"), 0, 1)
    comm.finalize()


def probe(group: Group, features: Tensor, labels: Tensor, penalties: list[float]) -> dict[str, float]:
    classes = int(labels.max()) + 1
    return linear.probe_cached_features(
        features, labels, features, labels, group, num_classes=classes, l2_penalties=penalties, seed=0
    )


def test_the_probe_takes_the_stronger_of_equal_penalties(group: Group) -> None:
    labels = torch.arange(40) % 2
    assert probe(group, 10.0 * labels[:, None] - 5, labels, [1e-4, 1e-2, 1e-3])["l2_penalty"] == 1e-2


def test_the_last_fit_of_the_probe_is_to_all_images_the_held_out_ones_too(group: Group) -> None:
    assert probe(group, torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), [1e-3])["top1"] == 100


def test_features_are_standardised_by_the_deviation_of_the_images_there_are(group: Group) -> None:
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = linear._moments(features, 5, group)
    torch.testing.assert_close(mean, features.mean(dim=0))
    torch.testing.assert_close(std, features.std(dim=0, correction=0))


def test_the_objective_s_value_is_that_of_its_gradient(group: Group) -> None:
    """A line search that is lied to takes more evaluations: from the minimum's own start it takes one."""
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    labels = (features[:, 0] > 0).long()
    rows = linear._Rows(features, labels, torch.zeros(3), torch.ones(3))
    seen: list[None] = []
    start = torch.zeros(2, 4, dtype=torch.float64)
    linear._fit(start, rows, 10.0, group, 200, lambda: seen.append(None))
    assert len(seen) <= 12


def test_all_images_can_be_the_neighbours(group: Group) -> None:
    """Two equal ones: with both the votes tie, which goes to class 0; the first alone is of class 1."""
    bank, query = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    arguments = (bank, torch.tensor([1, 0]), query, torch.tensor([0]), group)
    figures = knn_accuracy(*arguments, neighbours=[1, 2], temperatures=[0.1], num_classes=2)
    assert figures[1, 0.1]["top1"] == 0
    assert figures[2, 0.1]["top1"] == 100


def test_features_of_any_length_have_neighbours_and_those_that_are_not_finite_are_nobody_s(group: Group) -> None:
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    scores, ids = ShardedBank(features, group).search(features, 5)
    scales = torch.tensor([2.0**100, 2.0**-100, 1.0, 2.0**-60])[torch.arange(40) % 4][:, None]
    long_scores, long_ids = ShardedBank(features * scales, group).search(features * scales, 5)
    assert torch.equal(scores, long_scores)
    assert torch.equal(ids, long_ids)
    features[7], features[20, 3] = torch.nan, torch.inf
    _, ids = ShardedBank(features, group, block_rows=9).search(features[:7], 38)
    assert not torch.isin(ids, torch.tensor([7, 20])).any()
    views = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(1))
    plain = instance_similarities(views, views[:, 0], group)
    assert instance_similarities(views * 2.0**-100, views[:, 0] * 2.0**100, group) == pytest.approx(plain)


class Fixed(nn.Module):
    """Logits that are given instead of images."""

    def forward(self, images: Tensor) -> Tensor:
        return images


def test_accuracy_is_of_the_best_five_and_of_the_classes_that_are_tested(group: Group) -> None:
    logits = torch.arange(7.0).flip(0).repeat(4, 1)  # class 0 is the best, class 6 the last
    labels = torch.tensor([0, 4, 5, 0])
    batches = [(logits[:3], torch.arange(3)), (logits[3:], torch.tensor([3]))]
    network: fine_tuning._Network = Fixed()  # type: ignore[assignment]
    figures = fine_tuning._accuracy(network, batches, labels, 7, group, nullcontext)
    assert figures["top1"] == 50
    assert figures["top5"] == 75
    assert figures["mean_per_class"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("steps_per_epoch", [1, 50])
def test_running_statistics_keep_what_simclr_s_rule_says(group: Group, steps_per_epoch: int) -> None:
    """0.9 of what they were, however short the epoch; 0.8 for 50 steps would be 1 - 10/50."""
    backbone, images, labels = nn.BatchNorm1d(3), torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
    options = TrainingOptions(1, 0.0, 0.0, batch_norm_rule=True)
    batch = (images, torch.arange(4))
    data = LabelledBatches(lambda epoch: [[batch]], lambda: [batch], labels, labels, 2, steps_per_epoch)
    fine_tuning.fine_tune(backbone, data, group, options, feature_dim=3, seed=0)
    assert backbone.running_mean is not None
    kept = max(1 - 10 / steps_per_epoch, 0.9)
    torch.testing.assert_close(backbone.running_mean, torch.full((3,), 1 - kept))
    assert math.isclose(kept, 0.9)
