"""The exact top-K of W Wᵀ by blocks over ranks against a full sort."""

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from instance_ssl.classifier.hard_classes import find_hard_classes
from instance_ssl.classifier.reference import dense_hard_classes
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition


def sharded_table(group: Group, weight_ND: Tensor, k: int, block_bytes: int) -> Tensor:
    partition = Partition(len(weight_ND), group.size)
    start, stop = partition.bounds(group.rank)
    return find_hard_classes(weight_ND[start:stop], k, partition, group, block_bytes=block_bytes)


def tied_weights(num_rows: int) -> Tensor:
    """Rows of ±1: norms and cosines are exact in float32, and most cosines are tied."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 2, (num_rows, 16), generator=generator).float() * 2 - 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("block_bytes", [8 * 13 * 13, 8 << 20])
def test_ties_are_settled_by_the_lower_id(world_size: int, block_bytes: int) -> None:
    weight_ND = tied_weights(131)
    expected = dense_hard_classes(weight_ND, 20)
    table = torch.cat(run_ranks(sharded_table, world_size, weight_ND, 20, block_bytes))
    assert table.dtype == torch.int32
    assert torch.equal(table, expected)


@pytest.mark.parametrize("world_size", [1, 3])
def test_table_equals_brute_force_on_random_rows(world_size: int) -> None:
    weight_ND = torch.randn(507, 16, generator=torch.Generator().manual_seed(2))
    table = torch.cat(run_ranks(sharded_table, world_size, weight_ND, 20, 8 * 64 * 64))
    assert torch.equal(table, dense_hard_classes(weight_ND.double(), 20))


@pytest.mark.parametrize("world_size", [1, 3])
def test_duplicates_are_tied_whatever_the_block_s_shape(world_size: int) -> None:
    """Random rows, each twice: a class's twin comes first, and twins of others by their lower id."""
    rows = torch.randn(61, 128, generator=torch.Generator().manual_seed(3))
    weight_ND = torch.cat([rows, rows])
    table = torch.cat(run_ranks(sharded_table, world_size, weight_ND, 9, 8 * 11 * 11))
    for i, hardest in enumerate(table.tolist()):
        assert hardest[0] == (i + 61) % 122
        assert all(b == a + 61 for a, b in zip(hardest[1::2], hardest[2::2], strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_other_classes_can_be_asked_for(world_size: int) -> None:
    weight_ND = tied_weights(23)
    table = torch.cat(run_ranks(sharded_table, world_size, weight_ND, 22, 8 * 5 * 5))
    assert torch.equal(table, dense_hard_classes(weight_ND, 22))
    assert all(sorted([*row, i]) == list(range(23)) for i, row in enumerate(table.tolist()))
