"""Images that cannot be read: another of the batch stands for them, under its own id; batches keep their length."""

import numpy as np
import pytest
import torch
from PIL import Image

from instance_ssl.data.augmentations import centre_view, simclr_view
from instance_ssl.data.image_sources import ArrayImages
from instance_ssl.data.loaders import image_loader, view_loader
from instance_ssl.data.sampler import GlobalBatchSampler
from instance_ssl.data.views import ViewBatch, ViewDataset
from instance_ssl.errors import RankError

N, SIZE, MICRO_BATCH = 24, 8, 3


class SomeBroken(ArrayImages):
    """Images of which some cannot be read."""

    broken: frozenset[int] = frozenset()

    def load(self, index: int) -> Image.Image:
        if index in self.broken:
            raise RankError(f"cannot decode {index}.jpg: cut short; repair or replace the file")
        return super().load(index)


def source(*broken: int) -> SomeBroken:
    pixels = np.random.RandomState(0).randint(0, 256, (N, SIZE, SIZE, 3), np.uint8)
    images = SomeBroken(pixels, [f"{i}.jpg" for i in range(N)], None, None)
    images.broken = frozenset(broken)
    return images


def sampler_of(epoch: int = 0, rank: int = 0, world_size: int = 1) -> GlobalBatchSampler:
    sampler = GlobalBatchSampler(N, 6, MICRO_BATCH, rank, world_size, seed=1)
    sampler.epoch = epoch
    return sampler


def batches(sampler: GlobalBatchSampler, *broken: int, num_workers: int = 0) -> list[ViewBatch]:
    dataset = ViewDataset(source(*broken), simclr_view(SIZE), num_views=2, seed=sampler.seed)
    return list(view_loader(dataset, sampler, num_workers, skip_broken=True))


def test_the_next_readable_image_of_the_micro_batch_stands_in() -> None:
    whole = batches(sampler_of())
    first, second, third = (batch.ids.tolist() for batch in whole[:3])
    cut = batches(sampler_of(), first[0], second[1], second[2], third[2])
    assert cut[0].ids.tolist() == [first[1], first[1], first[2]]
    assert cut[1].ids.tolist() == [second[0]] * 3  # counted round
    assert cut[2].ids.tolist() == [third[0], third[1], third[0]]
    assert [list(batch.unreadable or {}) for batch in cut[:4]] == [[first[0]], [second[1], second[2]], [third[2]], []]
    assert "cut short" in (cut[0].unreadable or {})[first[0]]
    views = {index: view for batch in whole for index, view in zip(batch.ids.tolist(), batch.views, strict=True)}
    for batch in cut:
        assert all(torch.equal(view, views[index]) for view, index in zip(batch.views, batch.ids.tolist(), strict=True))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_processes_replace_the_same_images(num_workers: int) -> None:
    ids = [int(batch.ids[0]) for batch in batches(sampler_of())[:4]]
    for before, now in zip(
        batches(sampler_of(), *ids), batches(sampler_of(), *ids, num_workers=num_workers), strict=True
    ):
        assert torch.equal(before.ids, now.ids)
        assert torch.equal(before.views, now.views)
        assert before.unreadable == now.unreadable


def test_a_micro_batch_without_a_readable_image_is_an_error_that_names_one() -> None:
    ids = batches(sampler_of())[1].ids.tolist()
    with pytest.raises(
        RankError, match=rf"none of the 3 images of a micro-batch can be read: cannot decode {ids[0]}\.jpg: cut short"
    ):
        batches(sampler_of(), *ids)


def test_without_the_policy_the_first_is_an_error() -> None:
    dataset = ViewDataset(source(5), simclr_view(SIZE), num_views=2, seed=1)
    with pytest.raises(RankError, match=r"5\.jpg: cut short"):
        list(view_loader(dataset, sampler_of(), 0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_deterministic_pass_goes_without_them(num_workers: int) -> None:
    met: dict[int, str] = {}
    loader = image_loader(source(1, 2, 3, 7), centre_view(SIZE), [[0, 1, 4], [2, 3], [5, 6]], num_workers,
                          on_unreadable=met.update)  # fmt: skip
    found = [(images, ids.tolist()) for images, ids in loader]
    assert [ids for _, ids in found] == [[0, 4], [], [5, 6]]
    assert [len(images) for images, _ in found] == [2, 0, 2]
    assert sorted(met) == [1, 2, 3]
