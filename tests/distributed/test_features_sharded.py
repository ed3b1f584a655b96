"""Features over ranks: each image once, in order, whatever the number of ranks."""

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.evaluation.features import extract_features


def _extract(group: Group, images_NF: Tensor, batch_size: int) -> tuple[Tensor, Tensor, list[int], bool, bool]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout())
    start, stop = Partition(len(images_NF), group.size).bounds(group.rank)
    ids = torch.arange(start, stop).split(batch_size) if stop > start else ()
    sizes: list[int] = []
    features_nF, ids_n = extract_features(
        model, ((images_NF[part], part) for part in ids), 5, group.device, on_batch=sizes.append
    )
    counts = group.row_counts(len(ids_n))
    all_features, all_ids = group.all_gather_rows(features_nF, counts), group.all_gather_rows(ids_n, counts)
    return all_features, all_ids, sizes, features_nF.is_inference(), model.training


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("total", [2, 11])
def test_each_image_is_covered_once(size: int, total: int) -> None:
    images = torch.randn(total, 3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout()).eval()
    expected = model(images).detach()
    results = run_ranks(_extract, size, images, 2)
    for features, ids, _, is_inference, is_training in results:
        assert ids.tolist() == list(range(total))
        torch.testing.assert_close(features, expected)
        assert is_training
        assert not is_inference  # callers may write to the features
    assert [sum(sizes) for _, _, sizes, _, _ in results] == Partition(total, size).counts()
