"""The schedules of fine-tuning, and which parameters decay."""

import pytest
import torch
from torch import nn

from instance_ssl.evaluation import fine_tuning
from instance_ssl.evaluation.fine_tuning import TrainingOptions

RATES = {"backbone_learning_rate": 0.1, "classifier_learning_rate": 1.0}


def test_milestones_are_epochs_and_the_cosine_is_in_steps() -> None:
    options = TrainingOptions(steps=20, schedule="milestones", milestones=(2, 3), decay_factor=0.2, **RATES)
    factors = [options.rate_factor(step, 5) for step in (0, 9, 10, 14, 15, 19)]
    assert factors == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])
    options = TrainingOptions(steps=20, **RATES)
    assert [options.rate_factor(step, 5) for step in (0, 10)] == pytest.approx([1, 0.5])


def test_batch_norm_is_spared_the_weight_decay_and_rates_differ() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network = fine_tuning._Network(backbone, 4, 2, seed=0)
    optimizer = fine_tuning._optimizer(network, TrainingOptions(steps=1, weight_decay=0.5, **RATES))
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    expected = {"backbone.0": (0.1, 0.5), "backbone.1": (0.1, 0.0), "classifier": (1.0, 0.5)}
    assert len(found) == len(list(network.parameters()))
    for name, parameter in network.named_parameters():
        assert found[id(parameter)] == expected[name.rpartition(".")[0]]


def test_the_classifier_starts_small_and_without_bias() -> None:
    network = fine_tuning._Network(nn.Flatten(), 4, 2, seed=0)
    assert torch.equal(network.classifier.bias, torch.zeros(2))
    assert 0.005 < network.classifier.weight.std().item() < 0.02
