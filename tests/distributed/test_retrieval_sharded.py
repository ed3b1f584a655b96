"""Retrieval, similarities and instance accuracy equal loops over all pairs, on any number of ranks."""

import functools
import math

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError
from instance_ssl.evaluation.accuracy_correlation import instance_accuracy
from instance_ssl.evaluation.retrieval import retrieval_recall
from instance_ssl.evaluation.similarity import instance_similarities

N, D, V, RECALL_AT = 29, 6, 3, (1, 2, 5)


@functools.cache
def _images() -> tuple[Tensor, Tensor]:
    """Features with many equal ones (an image's own place among them is not the first), and classes, one of one."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(N, D, generator=generator)
    features[[2, 5, 7, 11, 13, 17, 28]] = features[20].clone()
    features[[8, 9]] = 0
    labels = torch.randint(0, 4, (N,), generator=generator)
    labels[4] = 6
    return features, labels


def _own(group: Group, total: int = N) -> slice:
    return slice(*Partition(total, group.size).bounds(group.rank))


def _recall(group: Group) -> dict[str, float]:
    features, labels = _images()
    own = _own(group)
    return retrieval_recall(features[own], labels[own], group, recall_at=RECALL_AT, chunk_rows=4)


def _recall_by_loop() -> dict[str, float]:
    features, labels = (value.numpy() for value in _images())
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    cosines = (unit.astype(np.float64) @ unit.astype(np.float64).T).astype(np.float32)
    hits: dict[int, list[bool]] = {k: [] for k in RECALL_AT}
    for query in range(N):
        others = sorted((image for image in range(N) if image != query), key=lambda j: (-cosines[query, j], j))
        for k in RECALL_AT:
            hits[k].append(any(labels[image] == labels[query] for image in others[:k]))
    return {f"recall@{k}": 100 * float(np.mean(found)) for k, found in hits.items()}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_recall_equals_a_loop_over_all_pairs(size: int) -> None:
    expected = _recall_by_loop()
    assert 0 < expected["recall@1"] < expected["recall@5"] < 100
    for figures in run_ranks(_recall, size):
        assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-12)
        assert figures["top1"] == figures["recall@1"]
        assert figures["queries"] == N
        labels = _images()[1].tolist()
        same = sum(a == b for i, a in enumerate(labels) for j, b in enumerate(labels) if i != j)
        assert figures["chance_top1"] == pytest.approx(100 * same / (N * (N - 1)))


def _ask_too_many(group: Group) -> str:
    features, labels = _images()
    own = _own(group)
    with pytest.raises(UserError) as caught:
        retrieval_recall(features[own], labels[own], group, recall_at=(1, N))
    return str(caught.value)


def test_too_many_to_recall_name_the_key() -> None:
    for message in run_ranks(_ask_too_many, 2):
        assert message.startswith("evaluation.retrieval.recall_at [1, 29] of 29 images")


def _embeddings() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(N, D, generator=generator) + 1
    return weights[:, None] + 0.5 * torch.randn(N, V, D, generator=generator), weights


def _similarities(group: Group) -> dict[str, float]:
    views, weights = _embeddings()
    return instance_similarities(views[_own(group)], weights[_own(group)], group)


@pytest.mark.parametrize("size", [1, 2])
def test_similarities_are_means_over_all_pairs(size: int) -> None:
    views, weights = (torch.nn.functional.normalize(value.double(), dim=-1) for value in _embeddings())
    to_rows = torch.einsum("ivd,jd->ivj", views, weights)
    to_views = torch.einsum("iud,jvd->iujv", views, views)
    pairs = [(i, j) for i in range(N) for j in range(N)]
    other_views = [(i, u, v) for i in range(N) for u in range(V) for v in range(V) if u != v]
    expected = {
        "intra_class": torch.stack([to_rows[i, :, j].mean() for i, j in pairs if i == j]).mean().item(),
        "inter_class": torch.stack([to_rows[i, :, j].mean() for i, j in pairs if i != j]).mean().item(),
        "intra_view": float(np.mean([to_views[i, u, i, v] for i, u, v in other_views])),
        "inter_view": torch.stack([to_views[i, :, j].mean() for i, j in pairs if i != j]).mean().item(),
    }
    assert expected["intra_view"] > expected["inter_view"] + 0.1
    for figures in run_ranks(_similarities, size):
        for name, value in expected.items():
            assert figures[name] == pytest.approx(value, abs=1e-12)
        assert figures["class_gap"] == pytest.approx(expected["intra_class"] - expected["inter_class"], abs=1e-12)
        assert figures["images"] == N


def _accuracy(group: Group) -> dict[str, float]:
    weights = _embeddings()[1]
    options = SoftmaxOptions(0.15, "mixture", torch.float32)
    shard = ClassifierShard(N, D, group, options)
    shard.weight.copy_(weights[shard.start : shard.stop])
    noisy = _embeddings()[0][:, 0]

    def batches():  # type: ignore[no-untyped-def]
        for ids in torch.arange(N).split(7):
            start, stop = Partition(len(ids), group.size).bounds(group.rank)
            yield noisy[ids[start:stop]], ids[start:stop]

    return instance_accuracy(lambda images: images, shard, batches(), group, embedding_dim=D)


@pytest.mark.parametrize("size", [1, 2])
def test_instance_accuracy_counts_every_image_once(size: int) -> None:
    views, weights = (torch.nn.functional.normalize(value, dim=-1) for value in _embeddings())
    correct = ((views[:, 0] @ weights.T).argmax(dim=1) == torch.arange(N)).sum().item()
    assert 0 < correct < N
    for figures in run_ranks(_accuracy, size):
        assert figures["images"] == N
        assert math.isclose(figures["instance_accuracy"], correct / N, abs_tol=1e-12)
