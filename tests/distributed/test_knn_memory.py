"""What k-NN takes beside its bank does not grow with the bank."""

import torch
from memory import measure_allocations
from ranks import run_ranks

from instance_ssl.distributed.comm import Group
from instance_ssl.evaluation.knn import knn_accuracy


def peak_bytes(group: Group, rows: int) -> int:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(rows, 32, generator=generator), torch.randn(64, 32, generator=generator)
    labels = torch.zeros(rows, dtype=torch.int64)
    settings = {"neighbours": [200], "temperatures": [0.1], "num_classes": 2, "chunk_rows": 32}
    return measure_allocations(lambda: knn_accuracy(bank, labels, queries, labels[:64], group, **settings))[0]


def test_memory_grows_by_the_bank_alone() -> None:
    small, large = (run_ranks(peak_bytes, 1, rows)[0] for rows in (40_000, 160_000))
    bank_bytes_a_row = 4 * 32 + 2 * 8  # the normalised copy; labels, and their gathered copy
    assert large - small <= 1.02 * 120_000 * bank_bytes_a_row
