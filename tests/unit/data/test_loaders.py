"""What a rank sees depends on (seed, epoch, image, view) alone, and errors cross process borders unharmed."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from instance_ssl.data.augmentations import centre_view, simclr_view
from instance_ssl.data.datasets import open_source
from instance_ssl.data.image_sources import ArrayImages, ImageSource
from instance_ssl.data.loaders import PartLoader, image_loader, view_loader
from instance_ssl.data.sampler import GlobalBatchSampler, Key, Shards, epoch_order
from instance_ssl.data.views import ViewBatch, ViewDataset, sample_seed
from instance_ssl.errors import LoaderFault, RankError, UserError

SIZE = 8


def images(count: int) -> ArrayImages:
    pixels = np.random.RandomState(0).randint(0, 256, (count, SIZE, SIZE, 3), np.uint8)
    return ArrayImages(pixels, [str(i) for i in range(count)], None, None)


def views_of(sampler: GlobalBatchSampler, num_workers: int = 0, num_images: int = 21) -> list[ViewBatch]:
    dataset = ViewDataset(images(num_images), simclr_view(SIZE), num_views=2, seed=sampler.seed)
    return list(view_loader(dataset, sampler, num_workers))


def finished(dataset: ViewDataset, key: Key) -> torch.Tensor:
    return dataset.collate([dataset[key]]).views[0]


def by_id(batches: list[ViewBatch]) -> dict[int, torch.Tensor]:
    return {index: view for batch in batches for view, index in zip(batch.views, batch.ids.tolist(), strict=True)}


def settings_of_a_worker(image: Image.Image) -> torch.Tensor:
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    return torch.tensor([torch.get_num_threads(), ignored, os.getpid()], dtype=torch.float64).view(3, 1, 1)


class BrokenSource(ArrayImages):
    def load(self, index: int) -> Image.Image:
        if index == 3:
            raise RankError("cannot decode three.jpg: cut short; repair or replace the file")
        return super().load(index)


class FaultySource(ArrayImages):
    def load(self, index: int) -> Image.Image:
        raise ZeroDivisionError("a mistake in the program")


def broken(kind: type[ArrayImages]) -> ImageSource:
    return kind(images(8).columns["pixels"], [str(i) for i in range(8)], None, None)


def test_epoch_order_is_a_permutation_from_seed_and_epoch() -> None:
    orders = [tuple(epoch_order(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    torch.manual_seed(99)
    assert tuple(epoch_order(50, 0, 0).tolist()) == orders[0]


def shards_of(sizes: list[int], buffer: int) -> Shards:
    return Shards(torch.tensor([0, *sizes[:-1]]).cumsum(0), buffer)


@pytest.mark.parametrize("buffer", [1, 7, 64, 10_000])
def test_an_epoch_by_shards_takes_every_image_once(buffer: int) -> None:
    sizes = [40, 1, 25, 60, 33, 41]
    shards = shards_of(sizes, buffer)
    orders = [epoch_order(200, seed, epoch, shards).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert all(sorted(order) == list(range(200)) for order in orders)
    assert epoch_order(200, 0, 1, shards).tolist() == orders[1]


def test_shards_are_visited_one_after_another_in_an_order_of_the_epoch_s_own() -> None:
    shards = shards_of([50] * 8, 1)
    visits = [epoch_order(400, 0, epoch, shards).view(8, 50) // 50 for epoch in range(4)]
    assert all((visit == visit[:, :1]).all() for visit in visits)
    assert len({tuple(visit[:, 0].tolist()) for visit in visits}) == 4


def test_a_buffer_mixes_its_shards_well_and_reaches_no_further() -> None:
    size, buffer = 100, 1000
    order = epoch_order(20_000, 0, 0, shards_of([size] * 200, buffer))
    for window in order.split(buffer):
        assert len(torch.unique(window // size)) == buffer // size
    place = torch.argsort(order).view(200, size)
    # Two images of a shard stand a third of the buffer apart on average, as for a permutation of it.
    apart = (place[:, :-1] - place[:, 1:]).abs().double()
    assert apart.max() < buffer
    assert abs(apart.mean() / (buffer / 3) - 1) < 0.05
    # A batch of a tenth of the buffer has images of most of its shards.
    batches = (order // size).view(-1, buffer // 10)
    assert torch.tensor([len(torch.unique(batch)) for batch in batches]).double().mean() > 9.5


def test_global_batches_by_shards_are_the_same_by_any_number_of_ranks() -> None:
    shards = shards_of([17, 30, 3, 50], 20)
    order = epoch_order(100, 4, 2, shards)
    for world_size in (1, 3):
        samplers = [GlobalBatchSampler(100, 12, 4, rank, world_size, 4, shards) for rank in range(world_size)]
        for sampler in samplers:
            sampler.epoch, sampler.start_step = 2, 3
        united = [index for keys in zip(*samplers, strict=True) for part in keys for _, index in part]
        assert united == order[36:96].tolist()


def test_sample_seeds_are_distinct_63_bit_numbers() -> None:
    keys = [(s, e, i, v) for s in range(3) for e in range(3) for i in range(40) for v in range(2)]
    seeds = np.array([sample_seed(*key) for key in keys], dtype=np.uint64)
    assert len(set(seeds.tolist())) == len(keys)
    assert seeds.max() < 2**63
    # torch's generator uses the lower 32 bits, so those must be distinct and mixed as well.
    low = seeds & np.uint64(2**32 - 1)
    assert len(set(low.tolist())) == len(keys)
    set_bits = [float(((seeds >> np.uint64(bit)) & np.uint64(1)).mean()) for bit in range(63)]
    assert 0.4 < min(set_bits) <= max(set_bits) < 0.6


def test_a_view_depends_on_nothing_but_its_key() -> None:
    dataset = ViewDataset(images(4), simclr_view(SIZE), num_views=3, seed=5)
    torch.manual_seed(1)
    views = finished(dataset, (2, 3))
    torch.manual_seed(2)
    again = dataset.collate([dataset[(0, 0)], dataset[(2, 3)]])
    assert (views.shape, views.dtype, again.ids.tolist()) == ((3, 3, SIZE, SIZE), torch.float32, [0, 3])
    assert torch.equal(views, again.views[1])
    of_another_seed = ViewDataset(images(4), simclr_view(SIZE), 1, seed=6)
    others = [*views, finished(dataset, (1, 3))[0], finished(of_another_seed, (2, 3))[0]]
    assert len(torch.unique(torch.stack(others).flatten(1), dim=0)) == 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterating_leaves_the_global_generator_alone(num_workers: int) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    views_of(GlobalBatchSampler(21, 4, 4, 0, 1, seed=0), num_workers)
    list(image_loader(images(5), simclr_view(SIZE), [[0, 1], [2, 3, 4]], num_workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    sampler = GlobalBatchSampler(21, 6, 3, 0, 1, seed=3)
    for batch, loaded in zip(views_of(sampler), views_of(sampler, 2), strict=True):
        assert torch.equal(batch.ids, loaded.ids)
        assert torch.equal(batch.views, loaded.views)
        assert (batch.views.shape, batch.ids.dtype) == ((3, 2, 3, SIZE, SIZE), torch.int64)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(2, 2), (2, 4), (4, 1)])
def test_global_batches_do_not_depend_on_the_world_size(world_size: int, micro_batch_size: int) -> None:
    def run(world_size: int, micro_batch_size: int) -> list[dict[int, torch.Tensor]]:
        samplers = [GlobalBatchSampler(21, 8, micro_batch_size, rank, world_size, seed=3) for rank in range(world_size)]
        steps: list[dict[int, torch.Tensor]] = [{} for _ in range(samplers[0].steps_per_epoch)]
        for sampler in samplers:
            batches = views_of(sampler)
            for step in range(sampler.steps_per_epoch):
                count = sampler.accumulation_steps
                steps[step] |= by_id(batches[step * count : (step + 1) * count])
        return steps

    for dense, sharded in zip(run(1, 8), run(world_size, micro_batch_size), strict=True):
        assert sorted(dense) == sorted(sharded)
        assert len(dense) == 8
        assert all(torch.equal(dense[index], sharded[index]) for index in dense)


@pytest.mark.parametrize("start_step", [0, 1])
def test_batches_are_the_same_to_the_bit_by_any_ranks_and_workers(start_step: int) -> None:
    """With accumulation, and from the middle of an epoch on."""

    def micro_batches(rank: int, world_size: int, size: int, num_workers: int) -> list[ViewBatch]:
        sampler = GlobalBatchSampler(40, 12, size, rank, world_size, seed=3)
        sampler.epoch, sampler.start_step = 2, start_step
        return views_of(sampler, num_workers, num_images=40)

    expected = micro_batches(0, 1, 12, 0)
    assert len(expected) == 3 - start_step
    for world_size, size, num_workers in ((1, 12, 1), (1, 6, 4), (3, 4, 0), (3, 2, 1), (3, 2, 4)):
        ranks = [micro_batches(rank, world_size, size, num_workers) for rank in range(world_size)]
        in_order = [batch for batches in zip(*ranks, strict=True) for batch in batches]
        for name in ("views", "ids"):
            united = torch.cat([getattr(batch, name) for batch in in_order])
            assert torch.equal(united, torch.cat([getattr(batch, name) for batch in expected]))


def test_sampler_lays_a_global_batch_out_by_accumulation_then_rank() -> None:
    order = epoch_order(50, 9, 4).tolist()
    sampler = GlobalBatchSampler(50, 12, 2, 1, 3, seed=9)
    sampler.epoch = 4
    assert (sampler.steps_per_epoch, sampler.accumulation_steps, sampler.num_dropped) == (4, 2, 2)
    starts = [12 * step + 6 * micro + 2 for step in range(4) for micro in range(2)]
    assert list(sampler) == [[(4, order[start]), (4, order[start + 1])] for start in starts]


def test_an_epoch_takes_each_image_at_most_once_and_epochs_differ() -> None:
    samplers = [GlobalBatchSampler(50, 12, 2, rank, 3, seed=0) for rank in range(3)]
    epochs = []
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.epoch = epoch
        epochs.append([index for sampler in samplers for keys in sampler for _, index in keys])
        assert len(epochs[-1]) == len(set(epochs[-1])) == 48
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])


@pytest.mark.parametrize("start_step", [0, 1, 3, 4])
def test_start_step_continues_where_the_epoch_stopped(start_step: int) -> None:
    sampler = GlobalBatchSampler(50, 12, 2, 1, 3, seed=0)
    whole = list(sampler)
    sampler.start_step = start_step
    assert list(sampler) == whole[start_step * 2 :]
    assert len(sampler) == len(whole) - start_step * 2


@pytest.mark.parametrize("arguments", [(50, 12, 5, 0, 2), (10, 12, 2, 0, 3), (50, 12, 2, 3, 3)])
def test_sampler_refuses_impossible_batches(arguments: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"divide|not possible|does not exist"):
        GlobalBatchSampler(*arguments, seed=0)


def test_workers_serve_one_epoch_after_another() -> None:
    sampler = GlobalBatchSampler(21, 4, 4, 0, 1, seed=0)
    loader = view_loader(ViewDataset(images(21), simclr_view(SIZE), 1, seed=0), sampler, num_workers=2)
    assert len(loader) == 5
    for epoch in (0, 1):
        sampler.epoch = epoch
        if epoch == 1:
            next(iter(loader))  # an epoch left half-way must not leak into the next
            sampler.start_step = 2
        ids = torch.cat([batch.ids for batch in loader])
        assert ids.tolist() == epoch_order(21, 0, epoch)[8 * epoch : 20].tolist()


def test_image_loader_yields_the_given_batches_in_order() -> None:
    source, batches = images(9), [[7, 1], [2, 8, 0], [1]]
    for num_workers in (0, 1):
        loaded = list(image_loader(source, centre_view(SIZE), batches, num_workers))
        assert [ids.tolist() for _, ids in loaded] == batches
        for pixels, ids in loaded:
            assert torch.equal(pixels, torch.stack([centre_view(SIZE)(source.load(index)) for index in ids.tolist()]))
    assert list(image_loader(source, centre_view(SIZE), [], 1)) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_part_loader_draws_views_of_its_epoch_in_pieces(num_workers: int) -> None:
    source, parts = images(9), [[7, 1, 4], [], [2, 8, 0, 5], [3]]
    loader = PartLoader(source, simclr_view(SIZE), num_workers, seed=6, max_batch_size=2)
    dataset = ViewDataset(source, simclr_view(SIZE), 1, seed=6)
    for epoch in (0, 1):
        loaded = [list(batches) for batches in loader.epoch(epoch, parts)]
        assert [[ids.tolist() for _, ids in part] for part in loaded] == [[[7, 1], [4]], [], [[2, 8], [0, 5]], [[3]]]
        for pixels, ids in (batch for part in loaded for batch in part):
            assert torch.equal(pixels, torch.stack([finished(dataset, (epoch, index))[0] for index in ids.tolist()]))


def test_part_loader_keeps_its_workers() -> None:
    loader = PartLoader(images(4), settings_of_a_worker, 1, seed=0, max_batch_size=2)
    workers = set()
    for epoch in range(3):
        for part in loader.epoch(epoch, [[0, 1, 2], [3]]):
            workers |= {int(pixels[0, 2]) for pixels, _ in part}
    assert len(workers) == 1


def test_workers_fork_whatever_python_prefers() -> None:
    class Local(ArrayImages):
        """Cannot be pickled, as a start method other than fork would have to."""

    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        [(_, ids)] = image_loader(broken(Local), centre_view(SIZE), [[2, 0]], num_workers=1)
    finally:
        multiprocessing.set_start_method(default, force=True)
    assert ids.tolist() == [2, 0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_the_same_one_line_error_from_any_process(num_workers: int) -> None:
    source = broken(BrokenSource)
    sampler = GlobalBatchSampler(8, 4, 4, 0, 1, seed=0)
    for loader in (
        view_loader(ViewDataset(source, centre_view(SIZE), 1, 0), sampler, num_workers),
        image_loader(source, centre_view(SIZE), [[0, 1], [2, 3]], num_workers),
        next(PartLoader(source, centre_view(SIZE), num_workers, seed=0, max_batch_size=2).epoch(0, [[0, 1, 3]])),
    ):
        with pytest.raises(RankError, match=r"^cannot decode three\.jpg: cut short; repair or replace the file$"):
            list(loader)


def test_a_mistake_in_the_program_names_the_image_and_keeps_its_traceback() -> None:
    for num_workers, who in ((0, "the loader"), (1, "loader process 0")):
        with pytest.raises(LoaderFault) as caught:
            list(image_loader(broken(FaultySource), centre_view(SIZE), [[2], [1]], num_workers))
        line = f"{who} failed at 2 (image 2, epoch 0): ZeroDivisionError: a mistake in the program"
        assert str(caught.value) == line
        assert "in load\n" in caught.value.__notes__[0]


def test_a_file_broken_after_opening_reaches_the_caller(tmp_path: Path) -> None:
    images(1).load(0).save(tmp_path / "a.png")
    source = open_source("folder", "train", root=tmp_path, list_file=None, limit=None)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"a\.png"):
        list(image_loader(source, centre_view(SIZE), [[0]], num_workers=1))


def test_workers_use_one_thread_and_end_only_on_word_from_the_main_process() -> None:
    sampler = GlobalBatchSampler(21, 1, 1, 0, 1, seed=0)
    loader = view_loader(ViewDataset(images(21), settings_of_a_worker, 1, 0), sampler, num_workers=1)
    iterator = iter(loader)
    threads, ignored, pid = next(iterator).views.flatten().tolist()
    assert (threads, ignored) == (1, 1)
    [worker] = [child for child in multiprocessing.active_children() if child.pid == pid]
    # Signals from a third process, as a terminal or a launcher would send them.
    for name in ("TERM", "INT"):
        subprocess.run(
            [sys.executable, "-c", f"import os, signal; os.kill({worker.pid}, signal.SIG{name})"], check=True
        )
    assert sum(1 for _ in iterator) == 20
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
