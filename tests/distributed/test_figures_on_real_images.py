"""The cached probe and k-NN on real images beside scikit-learn and NumPy, on one rank and on two."""

import functools
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.evaluation.knn import knn_accuracy
from instance_ssl.evaluation.linear import probe_cached_features
from instance_ssl.models.backbones import build_backbone

SHARED = Path(__file__).parents[2].parent / "shared/data"
GRID = {"neighbours": (10, 20, 100, 200), "temperatures": (0.07, 0.1, 0.2)}
PENALTIES = (1e-4, 1e-3, 1e-2)
TRAIN = {"digits": 1400, "cifar10": 2000}
KINDS = [
    "digits",
    pytest.param(
        "cifar10",
        marks=[
            pytest.mark.full,
            pytest.mark.skipif(not (SHARED / "cifar10").exists(), reason="no ../shared/data/cifar10"),
        ],
    ),
]


def images_of(kind: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3, S, S) with mean 0 and deviation 1, and their classes."""
    if kind == "digits":
        bunch = load_digits()
        images = torch.from_numpy(bunch.images).float()[:, None].expand(-1, 3, -1, -1)
        labels = torch.from_numpy(bunch.target)
    else:
        with tempfile.TemporaryDirectory() as directory:
            unpack = [sys.executable, str(SHARED / "unpack_cifar10.py"), "cifar10", str(SHARED / "cifar10"), directory]
            subprocess.run([*unpack, "test"], check=True, capture_output=True)
            arrays = np.load(Path(directory) / "cifar10.npz")
            images = torch.from_numpy(arrays["x_test"][:3000]).permute(0, 3, 1, 2).float()
            labels = torch.from_numpy(arrays["y_test"][:3000]).long()
    return (images - images.mean()) / images.std(), labels


@functools.cache
def features_of(kind: str) -> tuple[Tensor, Tensor]:
    """Features (n, F) of a random backbone whose batch norms have seen the images."""
    images, labels = images_of(kind)
    torch.manual_seed(0)
    backbone = build_backbone("small_cnn", "auto", images.shape[-1])
    with torch.no_grad():
        backbone.train()(images[:512])
        return torch.cat([backbone.eval()(batch) for batch in images.split(512)]), labels


def evaluate(group: Group, features: Tensor, labels: Tensor, num_train: int) -> dict[str, Any]:
    parts = []
    for rows, classes in ((features[:num_train], labels[:num_train]), (features[num_train:], labels[num_train:])):
        own = slice(*Partition(len(rows), group.size).bounds(group.rank))
        parts += [rows[own], classes[own]]
    return {
        "probe": probe_cached_features(*parts, group, num_classes=10, l2_penalties=PENALTIES, seed=0),
        "knn": knn_accuracy(*parts, group, num_classes=10, **GRID),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_scikit_learn_s_and_numpy_s_on_any_number_of_ranks(kind: str) -> None:
    features, labels = features_of(kind)
    one, *two = [run_ranks(evaluate, size, features, labels, TRAIN[kind]) for size in (1, 2)]
    assert all(rank["knn"] == one[0]["knn"] for rank in two[0])
    for rank in two[0]:  # sums over ranks round otherwise than sums over images
        assert rank["probe"]["l2_penalty"] == one[0]["probe"]["l2_penalty"]
        assert rank["probe"]["top1"] == pytest.approx(one[0]["probe"]["top1"], abs=0.1)
    assert one[0]["probe"]["top1"] == pytest.approx(scikit_learn(kind, one[0]["probe"]["l2_penalty"]), abs=0.3)
    expected = numpy_votes(kind)
    assert one[0]["knn"].keys() == expected.keys()
    for pair, figures in expected.items():  # to the last image, which is 0.1 at least
        assert one[0]["knn"][pair] == pytest.approx(figures, abs=1e-9), pair


def scikit_learn(kind: str, penalty: float) -> float:
    """Top-1 of its logistic regression on the same features, standardised, at the same penalty."""
    features, labels = features_of(kind)
    num_train = TRAIN[kind]
    rows = features.double().numpy()
    rows = (rows - rows[:num_train].mean(axis=0)) / np.maximum(rows[:num_train].std(axis=0), 1e-12)
    fitted = LogisticRegression(C=1 / (penalty * num_train), max_iter=1000).fit(rows[:num_train], labels[:num_train])
    return 100 * float(fitted.score(rows[num_train:], labels[num_train:]))


def numpy_votes(kind: str) -> dict[tuple[int, float], dict[str, float]]:
    """Every test image's vote, written out."""
    features, labels = features_of(kind)
    num_train, classes = TRAIN[kind], labels.numpy()
    unit = features.numpy().astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    scores = (unit[num_train:] @ unit[:num_train].T).astype(np.float32)
    ids = np.argsort(-scores, axis=1, kind="stable")
    result = {}
    for k in GRID["neighbours"]:
        for temperature in GRID["temperatures"]:
            places = []
            for query, label in enumerate(classes[num_train:]):
                votes = np.zeros(10)
                for image in ids[query, : int(k)]:
                    votes[classes[image]] += math.exp((float(scores[query, image]) - 1) / temperature)
                places.append(int((votes > votes[label]).sum() + (votes[:label] == votes[label]).sum()))
            shares = {f"top{n}": 100 * float(np.mean([place < n for place in places])) for n in (1, 5)}
            result[k, temperature] = shares
    return result
