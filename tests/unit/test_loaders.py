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
from instance_ssl.data.loaders import PartLoader, image_loader, view_loader
from instance_ssl.data.order import GlobalBatchSampler, epoch_order
from instance_ssl.data.sources import ArrayImages, ImageSource
from instance_ssl.data.views import ViewDataset, sample_seed
from instance_ssl.errors import RankError, UserError

SIZE = 8


def images(count: int) -> ArrayImages:
    pixels = np.random.RandomState(0).randint(0, 256, (count, SIZE, SIZE, 3), np.uint8)
    return ArrayImages(pixels, [str(i) for i in range(count)], None, None)


def views_of(sampler: GlobalBatchSampler, num_workers: int = 0, num_images: int = 21) -> list[tuple[torch.Tensor, ...]]:
    dataset = ViewDataset(images(num_images), simclr_view(SIZE), num_views=2, seed=sampler.seed)
    return list(view_loader(dataset, sampler, num_workers))


def by_id(batches: list[tuple[torch.Tensor, ...]]) -> dict[int, torch.Tensor]:
    return {index: view for views, ids in batches for view, index in zip(views, ids.tolist(), strict=True)}


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
    return kind(images(8).pixels, [str(i) for i in range(8)], None, None)


def test_epoch_order_is_a_permutation_from_seed_and_epoch() -> None:
    orders = [tuple(epoch_order(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    torch.manual_seed(99)
    assert tuple(epoch_order(50, 0, 0).tolist()) == orders[0]


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
    views, index = dataset[(2, 3)]
    torch.manual_seed(2)
    dataset[(0, 0)]
    again, _ = dataset[(2, 3)]
    assert (views.shape, views.dtype, index) == ((3, 3, SIZE, SIZE), torch.float32, 3)
    assert torch.equal(views, again)
    others = [*views, dataset[(1, 3)][0][0], ViewDataset(images(4), simclr_view(SIZE), 1, seed=6)[(2, 3)][0][0]]
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
    for (views, ids), (worker_views, worker_ids) in zip(views_of(sampler), views_of(sampler, 2), strict=True):
        assert torch.equal(ids, worker_ids)
        assert torch.equal(views, worker_views)
        assert (views.shape, ids.dtype) == ((3, 2, 3, SIZE, SIZE), torch.int64)


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
        ids = torch.cat([ids for _, ids in loader])
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
            assert torch.equal(pixels, torch.stack([dataset[(epoch, index)][0][0] for index in ids.tolist()]))


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


def test_a_mistake_in_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="in load"):
        list(image_loader(broken(FaultySource), centre_view(SIZE), [[0], [1]], num_workers=1))


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
    threads, ignored, pid = next(iterator)[0].flatten().tolist()
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
