"""Images that cannot be read, where they are skipped: `data.on_broken: skip` (F25)."""

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


def record(place: Path) -> list[int]:
    """Ids of the images in broken.txt, in order."""
    lines = [line.split("\t") for line in (place / "run/broken.txt").read_text().splitlines()]
    assert all(len(line) == 3 and int(line[0]) > 0 for line in lines)
    return [int(name.removesuffix(".png")) for *_, name in lines]


def rows_of(checkpoint: Path, key: str) -> torch.Tensor:
    rows = [torch.load(path, weights_only=True) for path in sorted(checkpoint.glob("rows_*.pt"))]
    return torch.cat([part[key] for part in rows])


def initialise(place: Path, **options: Any) -> torch.Tensor:
    """The rows that the training begins with."""
    done = run(place, stage="initialize_classifier", settings=SKIP, **options)
    assert done.wait() == [0, 0], done.text()
    assert record(place) == [TRUNCATED]
    weight = rows_of(checkpoints(place, "initialize_classifier")[-1], "weight")
    others = torch.arange(len(weight)) != TRUNCATED
    norm = torch.linalg.vector_norm(weight, dim=1)
    torch.testing.assert_close(norm[TRUNCATED], norm[others].mean())
    assert torch.cosine_similarity(weight[TRUNCATED], weight[others]).max() < 0.95
    return weight


def test_ids_stay_with_their_images_and_the_class_of_a_broken_one_stays(place: Path, images: Path) -> None:
    begun = initialise(place)
    seen = place / "seen"
    seen.mkdir()
    done = run(place, settings=SKIP, prepare=vanish_and_write_down, environment={"SEEN": str(seen)})
    assert done.wait() == [0, 0], done.text()
    for index in VANISHED:
        assert done.text().count(f"cannot decode {images / f'{index:03d}.png'}") == 1, "once, by one rank"
    assert done.text().count("007.png") == 0, "known since the initialisation"
    assert sorted(record(place)) == sorted((TRUNCATED, *VANISHED))
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
    newest = checkpoints(place)[-1]
    weight, hard = rows_of(newest, "weight"), rows_of(newest, "hard_classes")
    for index in (TRUNCATED, *VANISHED):  # as everyone's negative and hard class its row moves on
        assert (weight[index] != begun[index]).any()
        assert rows_of(newest, "momentum")[index].any()
        assert (hard[index] >= 0).all()
    assert json.loads((place / "run/pretrain/result.json").read_text())["broken_images"] == 3


SAMPLED = {"classifier.sampling": "random", "classifier.smoothing_factor": 0, "classifier.num_sampled_classes": 30}


@pytest.mark.parametrize(
    "settings", [pytest.param({}, id="full"), pytest.param(SAMPLED, id="sampled", marks=pytest.mark.fault)]
)
def test_a_run_with_broken_images_resumes_to_the_bit(place: Path, images: Path, settings: dict[str, Any]) -> None:
    """Stopped and then thrown back by a crash to before one was found: what is known is replaced all the same."""
    settings = {**SKIP, **settings, "checkpoint.every_steps": 4}
    done = run(place, stage="initialize_classifier", settings=settings)
    assert done.wait() == [0, 0], done.text()
    shutil.copytree(place / "run", place / "begun")
    undisturbed = run(place, settings=settings, prepare=vanish_once_opened)
    assert undisturbed.wait() == [0, 0], undisturbed.text()
    expected, found = digests(place), record(place)
    shutil.rmtree(place / "run")
    (place / "begun").rename(place / "run")
    stopped = run(place, settings=settings, fault="step:1:1:term", prepare=vanish_once_opened)
    assert stopped.wait() == [75, 75], stopped.text()
    crashed = run(place, settings=settings, fault="step:0:7:kill", prepare=vanish_once_opened)
    assert -9 in crashed.wait()
    resumed = run(place, settings=settings, prepare=vanish_once_opened)
    assert resumed.wait() == [0, 0], resumed.text()
    assert sorted(record(place)) == sorted(found)
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
    assert len(record(place)) == 3
    assert checkpoints(place)
    refused = run(place, settings=settings)
    assert refused.wait() == [2, 2], refused.text()
    goes_on = run(place, settings=SKIP)
    assert goes_on.wait() == [0, 0], goes_on.text()


@pytest.mark.full
def test_files_that_vanish_while_it_runs_are_replaced_by_worker_processes_too(place: Path, images: Path) -> None:
    initialise(place)
    settings = {**SKIP, "data.num_workers": 1}
    with running(place, fault="step:*:*:sleep=0.1", settings=settings) as goes_on:
        wait_for(lambda: checkpoints(place), 60)
        for number in (10, 11, 12):
            (images / f"{number:03d}.png").unlink()
        assert goes_on.wait() == [0, 0], goes_on.text()
    found = set(record(place)) - {TRUNCATED}
    assert found
    assert found <= {10, 11, 12}


def update(place: Path, **options: Any) -> str:
    done = run(place, stage="update_images", **options)
    assert done.wait() == [0, 0], done.text()
    return done.text()


@pytest.mark.full
def test_broken_images_are_removed_between_two_runs_and_repaired_ones_come_again(place: Path, images: Path) -> None:
    initialise(place)
    stopped = run(place, settings=SKIP, fault="step:0:9:term", prepare=vanish_once_opened)
    assert stopped.wait() == [75, 75], stopped.text()
    broken = sorted(record(place))
    assert len(broken) == 3
    before = rows_of(checkpoints(place)[-1], "weight")
    assert "3 of 65 removed, 0 added" in update(place, settings=SKIP)
    kept = [index for index in range(65) if index not in broken]
    assert torch.equal(rows_of(checkpoints(place)[-1], "weight"), before[kept])
    goes_on = run(place, settings=SKIP, fault="step:0:11:term")  # 003.png and 040.png are there, and of their size
    assert goes_on.wait() == [75, 75], goes_on.text()
    assert "excluded, it cannot be read: 003.png" in goes_on.text()
    assert "updating the images" not in goes_on.text()
    Image.effect_noise((20, 20), 90).convert("RGB").save(images / "007.png")
    done = run(place, settings=SKIP)
    assert done.wait() == [0, 0], done.text()
    assert "0 of 62 removed, 1 added (classes 62 to 62, their rows from their features)" in done.text()
    assert (place / "run/instances.txt").read_text().split()[-1] == "007.png"


@pytest.mark.full
def test_what_is_broken_may_be_gone_or_another_file_when_the_run_goes_on(place: Path, images: Path) -> None:
    initialise(place)
    stopped = run(place, settings=SKIP, fault="step:0:9:term", prepare=vanish_once_opened)
    assert stopped.wait() == [75, 75], stopped.text()
    (images / "003.png").unlink()
    (images / "007.png").write_bytes(b"")
    (images / "040.png").write_bytes((images / "040.png").read_bytes()[:500])
    done = run(place, settings=SKIP)
    assert done.wait() == [0, 0], done.text()
    assert "3 of 65 removed, 1 added" in done.text()  # 040.png has a good header, and is found broken once more
    assert record(place).count(40) == 2
    assert len(rows_of(checkpoints(place)[-1], "weight")) == 63


def test_what_breaks_between_two_runs_is_removed_with_its_class(place: Path, images: Path) -> None:
    initialise(place)
    (images / "020.png").write_bytes(b"")
    done = run(place, settings=SKIP)
    assert done.wait() == [0, 0], done.text()
    assert "excluded, it cannot be read: 020.png: the file is empty" in done.text()
    assert "2 of 65 removed, 0 added" in done.text()  # a changed list is one without what is known to be broken
    assert len(rows_of(checkpoints(place)[-1], "weight")) == 63
