"""The sharded search and vote equal dense ones, on any number of ranks."""

import functools
import math

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError
from instance_ssl.evaluation.knn import ShardedBank, knn_accuracy

NEIGHBOURS, TEMPERATURES, CLASSES = (1, 3, 23), (0.01, 0.5), 7
Accuracies = dict[tuple[int, float], dict[str, float]]


@functools.cache
def _data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A bank of 23 with every image of a few held by several ranks, and 25 queries, one of which is a bank image."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(23, 5, generator=generator)
    bank[[4, 9, 15, 22]] = bank[1].clone()
    bank[[3, 16]] = 2 * bank[12]
    bank[7] = 0
    queries = torch.cat([torch.randn(24, 5, generator=generator), bank[1:2]])
    return (
        bank,
        torch.randint(0, CLASSES, (23,), generator=generator),
        queries,
        torch.randint(0, CLASSES, (25,), generator=generator),
    )


def _dense_order(bank: Tensor, queries: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Similarities, float32, falling, and bank ids, equal similarities by id: both (q, N)."""
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (bank.numpy(), queries.numpy())]
    scores = (unit[1].astype(np.float64) @ unit[0].astype(np.float64).T).astype(np.float32)
    ids = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, ids, axis=1), ids


def _dense_accuracy() -> Accuracies:
    bank, bank_labels, queries, labels = _data()
    scores, ids = _dense_order(bank, queries)
    result = {}
    for k in NEIGHBOURS:
        for temperature in TEMPERATURES:
            places = []
            for query, label in enumerate(labels.tolist()):
                votes = np.zeros(CLASSES)
                for score, image in zip(scores[query, :k], ids[query, :k], strict=True):
                    votes[bank_labels[image]] += math.exp((float(score) - 1) / temperature)
                places.append(list(np.argsort(-votes, kind="stable")).index(label))
            accuracy = {f"top{n}": 100 * float(np.mean([place < n for place in places])) for n in (1, 5)}
            result[k, temperature] = accuracy
    return result


def _sharded_accuracy(group: Group) -> Accuracies:
    bank, bank_labels, queries, labels = _data()
    own = slice(*Partition(len(bank), group.size).bounds(group.rank))
    own_queries = slice(*Partition(len(queries), group.size).bounds(group.rank))
    return knn_accuracy(
        bank[own],
        bank_labels[own],
        queries[own_queries],
        labels[own_queries],
        group,
        neighbours=NEIGHBOURS,
        temperatures=TEMPERATURES,
        num_classes=CLASSES,
        chunk_rows=2,
    )


def _sharded_search(group: Group, k: int, rows: int) -> tuple[Tensor, Tensor]:
    bank, _, queries, _ = _data()
    own = bank[slice(*Partition(rows, group.size).bounds(group.rank))]
    return ShardedBank(own, group, block_rows=3).search(queries, k)


def _handmade(group: Group) -> Accuracies:
    """Bank directions 0° (class 1), 60° (class 0) twice and 180° (class 2); one query at 0°, of class 1, on rank 0."""
    bank = torch.tensor([[3.0, 0.0], [0.5, math.sqrt(0.75)], [0.5, math.sqrt(0.75)], [-1.0, 0.0]])
    own = slice(*Partition(4, group.size).bounds(group.rank))
    query = torch.tensor([[10.0, 0.0]])[: 1 if group.rank == 0 else 0]
    labels = torch.tensor([1, 0, 0, 2])[own]
    return knn_accuracy(
        bank[own],
        labels,
        query,
        torch.ones(len(query), dtype=torch.int64),
        group,
        neighbours=[1, 3, 4],
        temperatures=[0.5, 1.0, 0.001],
        num_classes=3,
    )


def _ask_too_many(group: Group) -> str:
    bank = torch.ones(2, 3)
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError) as caught:
        knn_accuracy(bank, labels, bank, labels, group, neighbours=[5], temperatures=[0.1], num_classes=2)
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_accuracy_equals_a_dense_vote(size: int) -> None:
    expected = _dense_accuracy()
    assert len({figures["top1"] for figures in expected.values()}) > 1  # the settings differ
    for result in run_ranks(_sharded_accuracy, size):
        assert result == expected


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("k", "rows"), [(1, 23), (5, 23), (23, 23), (2, 2)])
def test_search_equals_a_dense_sort(size: int, k: int, rows: int) -> None:
    bank, _, queries, _ = _data()
    expected_scores, expected_ids = _dense_order(bank[:rows], queries)
    for scores, ids in run_ranks(_sharded_search, size, k, rows):
        assert ids.tolist() == expected_ids[:, :k].tolist()
        torch.testing.assert_close(scores, torch.from_numpy(expected_scores[:, :k]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_votes_weigh_by_similarity_and_temperature(size: int) -> None:
    # At T = 0.5 two neighbours at 60° have 2 e⁻¹ < 1 of the vote of the one at 0°, at T = 1 they have 2 e^(-1/2) > 1.
    for result in run_ranks(_handmade, size):
        top1 = {setting: figures["top1"] for setting, figures in result.items()}
        assert top1 == {(k, t): 0.0 if t == 1.0 and k > 1 else 100.0 for k in (1, 3, 4) for t in (0.5, 1.0, 0.001)}
        assert all(figures["top5"] == 100 for figures in result.values())


def test_too_many_neighbours_name_the_key() -> None:
    for message in run_ranks(_ask_too_many, 2):
        assert message.startswith("knn.neighbours: 5 of 4 ")
