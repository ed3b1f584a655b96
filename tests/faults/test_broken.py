"""Images that cannot be read, where they are left out: `data.on_broken: skip` (F25)."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rig import STEPS_PER_EPOCH, checkpoints, digests, run, running, status, wait_for

import instance_ssl.training.step as pretraining
from instance_ssl.config.experiment import load_config
from instance_ssl.data.datasets import open_source
from instance_ssl.data.image_sources import FileImages
from instance_ssl.data.views import ViewBatch, ViewDataset
from instance_ssl.run.build import training_view

SKIP = {"data.on_broken": "skip", "data.max_broken_share": 0.1}
TRUNCATED, VANISHED = 7, (3, 40)


@pytest.fixture
def images(initialised: Path, place: Path) -> Path:
    """Images of the test's own, one of them cut short behind a good header, and no run yet."""
    (place / "images").unlink()
    shutil.rmtree(place / "run")
    images = Path(shutil.copytree(initialised / "images", place / "images"))
    Image.effect_noise((64, 64), 90).convert("RGB").save(images / "007.png")
    (images / "007.png").write_bytes((images / "007.png").read_bytes()[:2000])
    return images


def vanish_once_opened() -> None:
    """Two files are there when the data set is opened, and gone when they are wanted."""
    read = FileImages.read

    def read_or_not(source: FileImages, index: int) -> bytes:
        if index in VANISHED:
            raise FileNotFoundError(2, "No such file or directory")
        return read(source, index)

    FileImages.read = read_or_not  # type: ignore[method-assign]


def vanish_and_write_down() -> None:
    """The same; and ids and hashes of all that is trained on go to $SEEN."""
    vanish_once_opened()
    original, path = pretraining.flatten_views, Path(os.environ["SEEN"]) / os.environ["RANK"]

    def flatten_views(batch: ViewBatch, device: torch.device) -> Any:
        line = [(index, hash_of(views)) for index, views in zip(batch.ids.tolist(), batch.views, strict=True)]
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return original(batch, device)

    pretraining.flatten_views = flatten_views


def hash_of(views: torch.Tensor) -> str:
    return hashlib.sha256(views.numpy().tobytes()).hexdigest()


def record(place: Path) -> list[tuple[int, int]]:
    """Id and step of every line of left_out.txt."""
    lines = [line.split("\t") for line in (place / "run/left_out.txt").read_text().splitlines()]
    assert all(len(line) == 4 and line[3] == f"{int(line[0]):03d}.png" for line in lines)
    return [(int(index), int(step)) for index, step, *_ in lines]


def weight_and_momentum(checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.load(path, weights_only=True) for path in sorted(checkpoint.glob("rows_*.pt"))]
    return torch.cat([part["weight"] for part in rows]), torch.cat([part["momentum"] for part in rows])


def initialise(place: Path, **options: Any) -> None:
    done = run(place, stage="initialize_classifier", settings=SKIP, **options)
    assert done.wait() == [0, 0], done.text()
    assert record(place) == [(TRUNCATED, 0)]
    weight, _ = weight_and_momentum(checkpoints(place, "initialize_classifier")[-1])
    assert (weight == 0).all(dim=1).nonzero()[:, 0].tolist() == [TRUNCATED]


def test_ids_stay_with_their_images_and_what_is_broken_is_left_out_on_all_ranks(place: Path, images: Path) -> None:
    initialise(place)
    seen = place / "seen"
    seen.mkdir()
    done = run(place, settings=SKIP, prepare=vanish_and_write_down, environment={"SEEN": str(seen)})
    assert done.wait() == [0, 0], done.text()
    for index in VANISHED:
        assert done.text().count(f"cannot decode {images / f'{index:03d}.png'}") == 1, "once, by one rank"
    found = record(place)
    assert sorted(index for index, _ in found) == sorted((TRUNCATED, *VANISHED))
    config = load_config(place / "config.yaml")
    source = open_source("folder", "train", root=images, list_file=None, limit=None)
    dataset = ViewDataset(source, training_view(config.augmentation, config.data), 2, config.seed)
    num_seen = 0
    for path in seen.iterdir():
        for number, line in enumerate(path.read_text().splitlines()):
            epoch = number // (2 * STEPS_PER_EPOCH)  # of two micro-batches
            for index, digest in json.loads(line):
                assert index not in (TRUNCATED, *VANISHED)
                assert digest == hash_of(dataset.collate([dataset[epoch, index]]).views[0]), (epoch, index)
                num_seen += 1
    assert num_seen == 3 * 60
    for rows in weight_and_momentum(checkpoints(place)[-1]):
        assert (rows == 0).all(dim=1).nonzero()[:, 0].tolist() == [3, 7, 40]


SAMPLED = {"classifier.sampling": "random", "classifier.smoothing_factor": 0, "classifier.num_sampled_classes": 30}


@pytest.mark.parametrize(
    "settings", [pytest.param({}, id="full"), pytest.param(SAMPLED, id="sampled", marks=pytest.mark.fault)]
)
def test_a_run_with_broken_images_resumes_to_the_bit(place: Path, images: Path, settings: dict[str, Any]) -> None:
    """Stopped once one is found; and thrown back by a crash to before the other is."""
    settings = {**SKIP, **settings, "checkpoint.every_steps": 1}
    done = run(place, stage="initialize_classifier", settings=settings)
    assert done.wait() == [0, 0], done.text()
    shutil.copytree(place / "run", place / "begun")
    undisturbed = run(place, settings=settings, prepare=vanish_once_opened)
    assert undisturbed.wait() == [0, 0], undisturbed.text()
    expected, found = digests(place), record(place)
    first, last = (step for _, step in found[1:])
    assert first < last
    shutil.rmtree(place / "run")
    (place / "begun").rename(place / "run")
    stopped = run(place, settings=settings, fault=f"step:1:{first}:term", prepare=vanish_once_opened)
    assert stopped.wait() == [75, 75], stopped.text()
    crashed = run(place, settings=settings, fault=f"step:0:{last + 1}:kill", prepare=vanish_once_opened)
    assert -9 in crashed.wait()
    for checkpoint in checkpoints(place):
        if int(checkpoint.name[5:]) >= last:  # so that the last one is found a second time
            shutil.rmtree(checkpoint)
    resumed = run(place, settings=settings)  # and is there again: it is left out where it was
    assert resumed.wait() == [0, 0], resumed.text()
    assert record(place) == found
    assert digests(place) == expected


def test_too_many_end_the_run_with_their_names_and_a_checkpoint(place: Path, images: Path) -> None:
    initialise(place)
    settings = {**SKIP, "data.max_broken_share": 0.04}  # two of 65
    ended = run(place, settings=settings, prepare=vanish_once_opened)
    assert ended.wait() == [2, 2], ended.text()
    assert ended.text().count("error: ") == 1
    assert "3 of 65 images cannot be read, more than data.max_broken_share 0.04" in ended.text()
    assert all(f"{index:03d}.png" in status(place)["reason"] for index in (TRUNCATED, *VANISHED))
    assert "Traceback" not in ended.text()
    last = max(step for _, step in record(place))
    assert checkpoints(place)[-1].name == f"step_{last:09d}"
    refused = run(place, settings=settings)
    assert refused.wait() == [2, 2], refused.text()
    goes_on = run(place, settings=SKIP)
    assert goes_on.wait() == [0, 0], goes_on.text()


def test_files_that_vanish_while_it_runs_are_left_out_by_worker_processes_too(place: Path, images: Path) -> None:
    initialise(place)
    settings = {**SKIP, "data.num_workers": 1}
    with running(place, fault="step:*:*:sleep=0.1", settings=settings) as goes_on:
        wait_for(lambda: checkpoints(place))
        for number in (10, 11, 12):
            (images / f"{number:03d}.png").unlink()
        assert goes_on.wait() == [0, 0], goes_on.text()
    found = {index for index, _ in record(place)} - {TRUNCATED}
    assert found
    assert found <= {10, 11, 12}


def test_what_is_left_out_may_be_gone_or_another_file_when_the_run_goes_on(place: Path, images: Path) -> None:
    initialise(place)
    stopped = run(place, settings=SKIP, fault="step:0:9:term", prepare=vanish_once_opened)
    assert stopped.wait() == [75, 75], stopped.text()
    found = record(place)
    assert len(found) == 3
    (images / "003.png").unlink()
    (images / "007.png").write_bytes(b"")
    (images / "040.png").write_bytes((images / "040.png").read_bytes()[:500])
    done = run(place, settings=SKIP)
    assert done.wait() == [0, 0], done.text()
    assert record(place) == found
    for rows in weight_and_momentum(checkpoints(place)[-1]):
        assert (rows == 0).all(dim=1).nonzero()[:, 0].tolist() == [3, 7, 40]


def test_what_breaks_between_two_runs_is_left_out_with_its_class(place: Path, images: Path) -> None:
    initialise(place)
    (images / "020.png").write_bytes(b"")
    done = run(place, settings=SKIP)
    assert done.wait() == [0, 0], done.text()
    assert "020.png: the file is empty; its class is left out" in done.text()
    assert record(place) == [(TRUNCATED, 0), (20, 0)]
    weight, _ = weight_and_momentum(checkpoints(place)[-1])
    assert (weight == 0).all(dim=1).nonzero()[:, 0].tolist() == [TRUNCATED, 20]
