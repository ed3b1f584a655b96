"""What loader processes take does not grow with the number of images, and none of it is /dev/shm's."""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from PIL import Image

from instance_ssl.data.augmentations import simclr_view
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.data.loaders import PartLoader, image_loader, view_loader
from instance_ssl.data.name_table import pack_names
from instance_ssl.data.sampler import GlobalBatchSampler, consecutive_batches, epoch_order
from instance_ssl.data.views import ViewDataset
from instance_ssl.errors import UserError  # noqa: F401  # for SMALL_SHM
from instance_ssl.run.build import own_parts

ROOT = Path(__file__).parents[3]


class Numbers(Sequence[str]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return f"{index}.jpg"


class GreySquares(ImageSource):
    """As many images as are asked for, none of which is anywhere."""

    def __init__(self, count: int) -> None:
        super().__init__(pack_names(()), None, "grey")
        self.names = Numbers(count)

    def load(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (index % 256,) * 3)


def mib_of_worker() -> float:
    """What the only one shares with no other process: two would share what the main process has dropped."""
    [worker] = multiprocessing.active_children()
    return psutil.Process(worker.pid).memory_full_info().uss / 2**20


def training(count: int) -> float:
    sampler = GlobalBatchSampler(count, 64, 8, 0, 4, seed=0)
    loader = view_loader(ViewDataset(GreySquares(count), simclr_view(8), 2, seed=0), sampler, 1)
    for sampler.epoch in range(2):  # the first order is gone in the second
        sampler.global_batch(0)
        batches = iter(loader)
        for _ in range(20):
            next(batches)
    return mib_of_worker()


def evaluation(count: int) -> float:
    batches = iter(image_loader(GreySquares(count), simclr_view(8), consecutive_batches(0, count, 64), 1))
    for _ in range(20):
        next(batches)
    return mib_of_worker()


def probe(count: int) -> float:
    world = SimpleNamespace(rank=0, size=4)
    loader = PartLoader(GreySquares(count), simclr_view(8), 1, seed=0, max_batch_size=8)
    for epoch in range(2):
        parts = loader.epoch(epoch, own_parts(epoch_order(count, 0, epoch), 64, world))  # type: ignore[arg-type]
        for _ in range(20):
            list(next(parts))
    return mib_of_worker()


def measure(passes: Callable[[int], float], count: int, results: Connection) -> None:
    torch.set_num_threads(1)
    blocks = sys.getallocatedblocks()
    results.send((passes(count), sys.getallocatedblocks() - blocks))


@pytest.mark.parametrize("passes", [training, evaluation, probe])
def test_a_worker_takes_no_more_for_ten_times_the_images(passes: Callable[[int], float]) -> None:
    """The order of ten million is 76 MiB. Each is measured in a process where nothing went before."""
    found = []
    for count in (1_000_000, 10_000_000):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=measure, args=(passes, count, sender))
        process.start()
        assert receiver.poll(60)
        found.append(receiver.recv())
        process.join(30)
    (few, _), (many, objects) = found
    assert abs(many - few) < 4, f"{few:.1f} MiB with 1 M images, {many:.1f} MiB with 10 M"
    assert objects < 50_000  # of the main process: none an image, nor one a batch


SMALL_SHM = """
import sys
sys.path.insert(0, "tests/unit/data")
from test_loader_memory import *
for leave_colours in (False, True):
    dataset = ViewDataset(GreySquares(64), simclr_view(128), 2, seed=0, leave_colours=leave_colours)
    try:
        loader = view_loader(dataset, GlobalBatchSampler(64, 8, 8, 0, 1, seed=0), 2)
        print(sum(len(batch.ids) for batch in loader))
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("512k", ["64"] * 2),
        pytest.param("16k", ["/dev/shm has no room for the locks of 2 loader processes"] * 2, marks=pytest.mark.full),
    ],
)
def test_batches_need_no_dev_shm(size: str, said: list[str]) -> None:
    """Of eight images here are 3 MiB, and several wait: torch's own way of handing them over would hang."""
    mount = f"mount -t tmpfs -o size={size} none /dev/shm"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no namespace of one's own may be had here")
    python = [sys.executable, "-c", SMALL_SHM]
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *python]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = ended.stdout.splitlines()
    assert len(lines) == len(said), ended.stderr
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True)), lines
