"""k-NN on CIFAR-10 by a real encoder equals a brute-force vote in NumPy to the last image; memory stays bounded."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from memory import measure_allocations
from ranks import run_ranks
from torch import Tensor

from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.evaluation.knn import knn_accuracy
from instance_ssl.models.encoder import build_encoder

SHARED = Path(__file__).parents[3] / "shared/data"
NEIGHBOURS, TEMPERATURES = (10, 20, 100, 200), (0.07, 0.1, 0.2)
BANK, QUERIES = 2000, 250
Data = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    if not (SHARED / "cifar10/test.medxz").exists():
        pytest.skip(f"no CIFAR-10 in {SHARED}")
    out = tmp_path_factory.mktemp("cifar10")
    command = [sys.executable, "unpack_cifar10.py", "cifar10", "cifar10", str(out), "test"]
    subprocess.run(command, cwd=SHARED, check=True, capture_output=True)
    with np.load(out / "cifar10.npz") as file:
        pixels = torch.from_numpy(file["x_test"][: BANK + QUERIES]).permute(0, 3, 1, 2).float() / 128 - 1
        labels = torch.from_numpy(file["y_test"][: BANK + QUERIES].astype(np.int64))
    torch.manual_seed(0)
    encoder = build_encoder(
        backbone="small_cnn", stem="auto", image_size=32, projection="mlp", projection_hidden_dim=None,
        embedding_dim=128,
    ).eval()  # fmt: skip
    with torch.inference_mode():
        features = torch.cat([encoder.features(part) for part in pixels.split(250)]).clone()
    return features[:BANK], labels[:BANK], features[BANK:], labels[BANK:]


def _evaluate(group: Group, data: Data, one_by_one: bool) -> list[dict[tuple[int, float], dict[str, float]]]:
    bank, bank_labels, queries, labels = data
    own = slice(*Partition(BANK, group.size).bounds(group.rank))
    step = 1 if one_by_one else QUERIES
    results = []
    for first in range(0, QUERIES, step):
        start, stop = Partition(step, group.size).bounds(group.rank)
        rows = slice(first + start, first + stop)
        settings = {"neighbours": NEIGHBOURS, "temperatures": TEMPERATURES, "num_classes": 10}
        results.append(knn_accuracy(bank[own], bank_labels[own], queries[rows], labels[rows], group, **settings))
    return results


def _brute_force(data: Data) -> dict[tuple[int, float], np.ndarray]:
    """By setting, whether each query's vote is right."""
    bank, bank_labels, queries, labels = (value.numpy() for value in data)
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    cosines = queries.astype(np.float64) @ bank.astype(np.float64).T
    order = np.argsort(-cosines, axis=1, kind="stable")
    right = {}
    for k in NEIGHBOURS:
        for temperature in TEMPERATURES:
            votes = np.zeros((QUERIES, 10))
            for query in range(QUERIES):
                nearest = order[query, :k]
                np.add.at(votes[query], bank_labels[nearest], np.exp(cosines[query, nearest] / temperature))
            right[k, temperature] = votes.argmax(axis=1) == labels
    return right


def test_every_vote_is_the_brute_force_one(data: Data) -> None:
    expected = _brute_force(data)
    found = run_ranks(_evaluate, 1, data, True)[0]
    for setting, right in expected.items():
        assert [result[setting]["top1"] == 100 for result in found] == right.tolist()


@pytest.mark.parametrize("size", [1, 2])
def test_any_number_of_ranks_has_the_same_figures(data: Data, size: int) -> None:
    expected = {setting: 100 * right.mean() for setting, right in _brute_force(data).items()}
    assert len(set(expected.values())) > 3  # the settings differ
    for (result,) in run_ranks(_evaluate, size, data, False):
        assert {setting: figures["top1"] for setting, figures in result.items()} == pytest.approx(expected, abs=1e-9)


def _peak_bytes(group: Group, rows: int) -> int:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(rows, 32, generator=generator), torch.randn(64, 32, generator=generator)
    labels = torch.zeros(rows, dtype=torch.int64)
    return measure_allocations(
        lambda: knn_accuracy(
            bank, labels, queries, labels[:64], group, neighbours=[200], temperatures=[0.1], num_classes=2,
            chunk_rows=32,
        )
    )[0]  # fmt: skip


def test_memory_grows_by_the_bank_alone() -> None:
    small, large = (run_ranks(_peak_bytes, 1, rows)[0] for rows in (40_000, 160_000))
    bank_bytes_a_row = 4 * 32 + 2 * 8  # the normalised copy; labels, and their gathered copy
    assert large - small <= 1.02 * 120_000 * bank_bytes_a_row
