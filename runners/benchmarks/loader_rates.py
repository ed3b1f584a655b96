"""Images per second of the loaders on real images, beside the usual loader of torchvision and PIL."""

import io
import itertools
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from instance_ssl.data.augmentations import RandomView, simclr_view
from instance_ssl.data.colour import NORMALISE_MEAN, NORMALISE_STD, apply_colours
from instance_ssl.data.datasets import open_source
from instance_ssl.data.decode import convert_to_rgb, decode_pixels, image_pixels
from instance_ssl.data.image_sources import EncodedImages, FileImages, ImageSource
from instance_ssl.data.loaders import BatchLoader
from instance_ssl.data.pack import Packing, pack_images
from instance_ssl.data.sampler import Key, epoch_order
from instance_ssl.data.unreadable_images import OnBroken
from instance_ssl.data.views import ViewDataset
from instance_ssl.errors import UserError
from measure import Timing

Row = dict[str, Any]
# Batches of two views per image: float32 (b, 2, 3, S, S), or 8-bit crops.
Pass = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Settings:
    """View size in pixels, images per batch, loader processes, and passes of each loader."""

    image_size: int
    batch_size: int
    workers: int
    repeats: int


class _TwoViews(Dataset[Tensor]):
    """The usual two-crop data set: torchvision's ImageFolder, PIL, and the same transform twice."""

    def __init__(self, images: Dataset[Any], view: Callable[[Image.Image], Tensor], decodings: int) -> None:
        self.images, self.view, self.decodings = images, view, decodings

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        image = self.images[index][0]
        return torch.stack([self.view(image), self.view(self.images[index][0] if self.decodings == 2 else image)])


class _Loaded(Dataset[Any]):
    """Images of a source as tuples, as torchvision's data sets return them."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        return (self.source.load(index),)


def _pil_blur(image: Image.Image) -> Image.Image:
    """MoCo v2's (moco/loader.py)."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def pil_view(view: RandomView, interpolation: transforms.InterpolationMode) -> Callable[[Image.Image], Tensor]:
    """Builds the same view from torchvision's transforms on PIL images."""
    assert view.colours is not None
    s = view.colours.strength
    steps: list[Any] = [
        transforms.RandomResizedCrop(view.image_size, (view.min_crop_scale, 1.0), interpolation=interpolation),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
    ]
    if view.colours.blur:
        steps.append(transforms.RandomApply([_pil_blur], p=0.5))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(NORMALISE_MEAN, NORMALISE_STD)])


@contextmanager
def _usual_images(source: ImageSource) -> Iterator[Dataset[Any]]:
    """Opens the same files as torchvision's ImageFolder; other sources as PIL images."""
    if not isinstance(source, FileImages):
        yield _Loaded(source)
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "images").symlink_to(source.root.resolve())
        found = ImageFolder(folder)
        place_of = {path: place for place, (path, _) in enumerate(found.samples)}
        yield Subset(found, [place_of[f"{folder}/images/{name}"] for name in source.names])


def _usual_pass(images: Dataset[Any], view: Callable[..., Tensor], decodings: int, settings: Settings) -> Pass:
    dataset = _TwoViews(images, view, decodings)
    persistent = settings.workers > 0
    loader = DataLoader(
        dataset, settings.batch_size, shuffle=True, num_workers=settings.workers, persistent_workers=persistent
    )
    return lambda: iter(loader)


def _own_pass(source: ImageSource, settings: Settings, *, leave_colours: bool) -> Pass:
    dataset = ViewDataset(source, simclr_view(settings.image_size), 2, seed=0, leave_colours=leave_colours)
    keys: list[list[Key]] = []  # read again at every pass
    loader, epochs = BatchLoader(dataset, keys, settings.workers, persistent=True), itertools.count()

    def batches() -> Iterator[Tensor]:
        epoch, size = next(epochs), settings.batch_size
        order = epoch_order(len(source), 0, epoch).tolist()
        keys[:] = [[(epoch, i) for i in order[first : first + size]] for first in range(0, len(order), size)]
        return (batch.views for batch in loader)

    return batches


@contextmanager
def in_all_formats(kind: str, source: ImageSource) -> Iterator[dict[str, ImageSource]]:
    """Yields the source by its kind; if it is files, also as tar shards, original and resized."""
    sources = {kind: source}
    if not isinstance(source, EncodedImages):
        yield sources
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, size in (("tar, the same files", 0), ("packed, short side 256", 256)):
            root = Path(folder, str(size))
            pack_images(source, root / "train", Packing(size, workers=os.cpu_count() or 1), OnBroken())
            sources[name] = open_source("tar", "train", root=root, list_file=None, limit=None)
        yield sources


def compare(sources: Mapping[str, ImageSource], settings: Settings) -> list[Row]:
    """Times all loaders in turns: the usual ones on the first source, ours on each. The first row is the reference.

    Raises:
        UserError: the views of our two paths differ.
    """
    first, view = next(iter(sources.values())), simclr_view(settings.image_size)
    for name, source in sources.items():
        _check_paths(name, source, settings)
    with _usual_images(first) as usual:
        bicubic, bilinear = (
            pil_view(view, mode)
            for mode in (transforms.InterpolationMode.BICUBIC, transforms.InterpolationMode.BILINEAR)
        )
        passes = {
            "torchvision + PIL, decoded once": _usual_pass(usual, bicubic, 1, settings),
            "the same, decoded twice": _usual_pass(usual, bicubic, 2, settings),
            "decoded once, bilinear crops": _usual_pass(usual, bilinear, 1, settings),
        }
        for name, source in sources.items():
            passes[f"{name}: augment_on cpu"] = _own_pass(source, settings, leave_colours=False)
            passes[f"{name}: augment_on device"] = _own_pass(source, settings, leave_colours=True)
        statistics = {name: _statistics(make) for name, make in passes.items() if "augment_on device" not in name}
        timings = _time(passes, settings.repeats)
    return _rows(len(first), timings, statistics)


def _check_paths(name: str, source: ImageSource, settings: Settings) -> None:
    """Checks that views are bit-equal whether the workers or the device change the colours."""
    keys, batches = [(0, index) for index in range(min(32, len(source)))], []
    for leave_colours in (False, True):
        dataset = ViewDataset(source, simclr_view(settings.image_size), 2, seed=0, leave_colours=leave_colours)
        batches.append(dataset.collate([dataset[key] for key in keys]))
    finished, left = batches
    assert left.colours is not None
    if not torch.equal(
        apply_colours(left.views.flatten(0, 1), left.colours.flatten(0, 1)), finished.views.flatten(0, 1)
    ):
        raise UserError(f"{name}: the views of augment_on device are not those of augment_on cpu")


def _statistics(make: Pass) -> tuple[float, float]:
    """Mean and standard deviation over all values of the views; serves as the untimed warm-up pass."""
    sums = torch.zeros(3, dtype=torch.float64)
    for views in make():
        sums += torch.tensor([views.numel(), views.sum(), views.square().sum()], dtype=torch.float64)
    mean = sums[1] / sums[0]
    return mean.item(), (sums[2] / sums[0] - mean**2).sqrt().item()


def _time(passes: Mapping[str, Pass], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Times each pass, all loaders in turns: (seconds, CPU seconds of this process and its workers)."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
    for _ in range(repeats):
        for name, make in passes.items():
            cpu, started = _cpu_seconds(), time.perf_counter()
            for _ in make():
                pass
            seconds = time.perf_counter() - started
            times[name].append((seconds, _cpu_seconds() - cpu))
    return times


def _cpu_seconds() -> float:
    """CPU seconds of this process and its workers, which live as long as their loaders."""
    ticks = 0
    for child in multiprocessing.active_children():
        ticks += sum(map(int, Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _rows(
    count: int, times: Mapping[str, list[tuple[float, float]]], statistics: Mapping[str, tuple[float, float]]
) -> list[Row]:
    rates = {
        name: [Timing.of([count / pair[kind] for pair in pairs]) for kind in (0, 1)] for name, pairs in times.items()
    }
    reference = next(iter(rates.values()))
    rows: list[Row] = []
    for name, (rate, per_core) in rates.items():
        mean, std = statistics.get(name, (None, None))
        rows.append(
            {
                "loader": name,
                "images/s": rate.median,
                "quartiles": f"{rate.low:.0f}-{rate.high:.0f}",
                "x": rate.median / reference[0].median,
                "images a CPU second": per_core.median,
                "CPU quartiles": f"{per_core.low:.0f}-{per_core.high:.0f}",
                "CPU x": per_core.median / reference[1].median,
                "mean": "" if mean is None else round(mean, 3),
                "std": "" if std is None else round(std, 3),
            }
        )
    return rows


def compare_decoders(source: EncodedImages, repeats: int) -> list[Row]:
    """Times each decoder from bytes in memory to pixels, in turns: CPU milliseconds per image."""
    files = [source.read(index) for index in range(min(len(source), 200))]
    decoders: dict[str, Callable[[bytes], Tensor]] = {
        "PIL": _decode_by_pil,
        "torchvision": lambda data: decode_pixels(data, lambda width, height: 1),
        "half as large": lambda data: decode_pixels(data, lambda width, height: 2),
    }
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(repeats):
        for name, decode in decoders.items():
            started = time.process_time()
            for data in files:
                decode(data)
            times[name].append((time.process_time() - started) / len(files) * 1e3)
    return [
        {"decoder": name, "CPU ms": timing.median, "quartiles": f"{timing.low:.2f}-{timing.high:.2f}"}
        for name, timing in ((name, Timing.of(values)) for name, values in times.items())
    ]


def _decode_by_pil(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        return image_pixels(convert_to_rgb(image))
