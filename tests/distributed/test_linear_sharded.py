"""Both linear classifiers give the same figures on any number of ranks."""

import functools

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.evaluation.epoch_log import LabelledBatches
from instance_ssl.evaluation.linear import probe_cached_features, train_linear_classifier

CLASSES, IMAGES, BATCH = 6, 59, 16


@functools.cache
def _blobs(noise: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
    return torch.eye(CLASSES, 8)[labels] + noise * torch.randn(IMAGES, 8, generator=generator), labels


def _probe(group: Group, noise: float) -> dict[str, float]:
    (train, labels), (test, test_labels) = _blobs(noise, 0), _blobs(noise, 1)
    own = slice(*Partition(IMAGES, group.size).bounds(group.rank))
    own_test = slice(*Partition(2, group.size).bounds(group.rank)) if noise == 0 else own
    return probe_cached_features(
        train[own],
        labels[own],
        test[own_test],
        test_labels[own_test],
        group,
        num_classes=CLASSES,
        l2_penalties=[1e-4, 1.0, 1e-2],
        held_out_fraction=0.3,
        seed=0,
        max_iterations=40,
    )


def _train(group: Group, images: int) -> dict[str, float]:
    (train, labels), (test, test_labels) = _blobs(0.5, 0), _blobs(0.5, 1)

    def train_parts(epoch: int) -> list[list[tuple[Tensor, Tensor]]]:
        order = torch.randperm(images, generator=torch.Generator().manual_seed(epoch))
        parts = []
        for batch in order.split(BATCH):
            ids = batch[slice(*Partition(len(batch), group.size).bounds(group.rank))]
            parts.append([(train[piece], piece) for piece in ids.split(5) if len(piece)])
        return parts

    def test_batches() -> list[tuple[Tensor, Tensor]]:
        ids = torch.arange(*Partition(IMAGES, group.size).bounds(group.rank))
        return [(test[part], part) for part in ids.split(7)]

    return train_linear_classifier(
        lambda rows: rows,
        LabelledBatches(train_parts, test_batches, labels, test_labels, CLASSES, -(-images // BATCH)),
        group,
        feature_dim=8,
        epochs=4,
        learning_rate=2.0,
        global_batch_size=BATCH,
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_probe_is_perfect_on_separable_blobs(size: int) -> None:
    for result in run_ranks(_probe, size, 0.0):
        assert (result["top1"], result["top5"], result["test_images"]) == (100, 100, 2)


def test_probe_figures_do_not_depend_on_the_ranks() -> None:
    (expected,) = run_ranks(_probe, 1, 0.4)
    assert 20 < expected["top1"] < 100
    assert expected["held_out_top1"] < 100
    for size in (2, 3):
        for result in run_ranks(_probe, size, 0.4):
            assert result == expected


def test_training_does_not_depend_on_the_ranks() -> None:
    images = 2 * BATCH + 1  # the last batch is one rank's alone
    (expected,) = run_ranks(_train, 1, images)
    assert 20 < expected["top1"] < 100
    for size in (2, 3):
        results = run_ranks(_train, size, images)
        assert all(result == results[0] for result in results)
        assert results[0] == pytest.approx(expected, rel=1e-5)
