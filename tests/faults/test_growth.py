"""Data sets that change between two runs: images that come, go, and change places (F15)."""

import json
import os
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rig import NUM_IMAGES, checkpoints, digests, metrics, run

from instance_ssl.checkpoint import directory
from instance_ssl.checkpoint.committed import checksum
from instance_ssl.checkpoint.directory import read_tensors
from instance_ssl.data.augmentations import centre_view
from instance_ssl.data.datasets import open_source
from instance_ssl.models.encoder import build_encoder

LOST = (3, 50)
NEW = [f"{name}.png" for name in ("000a", "033a", *(f"9{number:02d}" for number in range(10)))]
NEW_PER_EPOCH = (NUM_IMAGES + len(NEW)) // 12


@pytest.fixture
def images(initialised: Path, place: Path) -> Path:
    """Images of the test's own, in place of the shared ones."""
    (place / "images").unlink()
    return Path(shutil.copytree(initialised / "images", place / "images"))


def stop_at(place: Path, step: int, **options: Any) -> None:
    stopped = run(place, fault=f"step:1:{step - 1}:term", **options)
    assert stopped.wait() == [75, 75], stopped.text()
    assert checkpoints(place)[-1].name == f"step_{step:09d}"


def add_images(images: Path) -> None:
    for number, name in enumerate(NEW):
        Image.effect_noise((20, 20), 30 + 10 * number).convert("RGB").save(images / name)


def rows_of(checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and momentum of all classes."""
    rows = [torch.load(path, weights_only=True) for path in sorted(checkpoint.glob("rows_*.pt"))]
    return torch.cat([part["weight"] for part in rows]), torch.cat([part["momentum"] for part in rows])


def embeddings(images: Path, checkpoint: Path) -> torch.Tensor:
    """Of the new images, in the order of their names, by the checkpoint's encoder."""
    encoder = build_encoder(backbone="small_cnn", stem="auto", image_size=16, projection="mlp",
                            projection_hidden_dim=None, embedding_dim=16)  # fmt: skip
    encoder.load_state_dict(read_tensors(checkpoint / "encoder.pt")["state"])
    source = open_source("folder", "train", root=images, list_file=None, limit=None)
    view = centre_view(16)
    batch = torch.stack([view(source.load(list(source.names).index(name))) for name in NEW])
    with torch.inference_mode():
        return encoder.eval()(batch)


def update(place: Path, size: int = 2, **options: Any) -> str:
    """Runs the stage by itself; what it said."""
    done = run(place, stage="update_images", size=size, micro_batch=6 // size, **options)
    assert set(done.wait()) == {0}, done.text()
    return done.text()


@pytest.mark.parametrize(
    "size", [pytest.param(1, marks=pytest.mark.fault), 2, pytest.param(3, marks=pytest.mark.fault)]
)
def test_rows_of_images_that_stay_keep_their_bits_and_new_ones_are_made_of_features(
    place: Path, images: Path, size: int
) -> None:
    stop_at(place, 12)  # two epochs and two steps
    newest = checkpoints(place)[-1]
    old, old_momentum = rows_of(newest)
    names = (place / "run/instances.txt").read_text().split()
    logged = [line["step"] for line in metrics(place)]
    add_images(images)
    for number in LOST:
        (images / f"{number:03d}.png").unlink()
    x_MD = embeddings(images, newest)
    said = update(place, size, settings={"data.allow_lost": True})
    assert "2 of 65 removed, 12 added (classes 63 to 74, their rows from their features)" in said
    assert "in the middle of epoch 3, which begins again" in said

    kept = [index for index in range(NUM_IMAGES) if index not in LOST]
    weight, momentum = rows_of(checkpoints(place)[-1])
    norm = torch.linalg.vector_norm(old[kept], dim=1).mean()
    assert torch.equal(weight[:63], old[kept])
    assert torch.equal(momentum[:63], old_momentum[kept])
    torch.testing.assert_close(weight[63:], torch.nn.functional.normalize(x_MD) * norm, rtol=1e-4, atol=1e-5)
    assert not momentum[63:].any()
    encoders = [read_tensors(path / "encoder.pt") for path in (newest_of_before(place), checkpoints(place)[-1])]
    for then, now in zip(*(tensors_of(encoder) for encoder in encoders), strict=True):
        assert torch.equal(then, now)

    assert (place / "run/instances.txt").read_text().split() == [*(names[index] for index in kept), *NEW]
    new_ids = np.load(place / "run/instances_map_1.npy")
    assert new_ids[list(LOST)].tolist() == [-1, -1]
    assert new_ids[kept].tolist() == list(range(63))
    change = json.loads((place / "run/data_changes.jsonl").read_text())
    assert [change[when]["num_instances"] for when in ("before", "now")] == [65, 75]
    assert (change["epoch"], change["step_before"], change["step_now"]) == (2, 12, 2 * NEW_PER_EPOCH)
    assert [path.name for path in checkpoints(place)] == [f"step_{2 * NEW_PER_EPOCH:09d}"]
    assert [line["step"] for line in metrics(place)] == [round(s * NEW_PER_EPOCH / 5) for s in logged if s <= 10]
    assert "updating the images" not in update(place, size)


def newest_of_before(place: Path) -> Path:
    return sorted((place / "run/pretrain/checkpoints_before_update_1").iterdir())[-1]


def tensors_of(encoder: dict[str, Any]) -> list[torch.Tensor]:
    momenta = [slots["momentum_buffer"] for slots in encoder["optimizer"].values()]
    return [*encoder["state"].values(), *momenta]


def test_a_training_updates_the_images_itself_and_a_crash_changes_nothing(place: Path, images: Path) -> None:
    stop_at(place, 7)
    add_images(images)
    shutil.copytree(place / "run", place / "before")
    done = run(place)
    assert done.wait() == [0, 0], done.text()
    assert "in the middle of epoch 2, which begins again" in done.text()
    assert checkpoints(place)[-1].name == f"step_{3 * NEW_PER_EPOCH:09d}"
    assert len(rows_of(checkpoints(place)[-1])[0]) == NUM_IMAGES + len(NEW)
    steps = [line["step"] for line in metrics(place) if "train/loss" in line]
    assert steps == sorted(set(steps))
    assert steps[-1] == 3 * NEW_PER_EPOCH
    expected = digests(place)
    shutil.rmtree(place / "run")
    (place / "before").rename(place / "run")
    assert -9 in run(place, fault=f"step:0:{NEW_PER_EPOCH + 1}:kill").wait()  # before anything else is saved
    stop_at(place, 3 * NEW_PER_EPOCH - 2)
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert "begins again" not in resumed.text()
    assert digests(place) == expected


def kill_at_a_change_of_the_disk() -> None:
    """Rank 0 is killed as it is about to make the $KILL_AT-th change to the run's directory but for its status."""
    left = int(os.environ["KILL_AT"])

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        path = str(arguments[0]) if arguments else ""
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") and "/run/" in path and "status" not in path:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "0":
        sys.addaudithook(watch)


@pytest.mark.parametrize(
    "kill_at", [12, *(pytest.param(n, marks=pytest.mark.fault) for n in range(2, 32, 2) if n != 12)]
)
def test_a_kill_leaves_the_old_state_or_the_new_one(place: Path, images: Path, kill_at: int) -> None:
    stop_at(place, 7)
    (images / "003.png").unlink()
    settings = {"data.allow_lost": True}
    environment = {"KILL_AT": str(kill_at)}
    prepare = kill_at_a_change_of_the_disk
    killed = run(place, stage="update_images", settings=settings, prepare=prepare, environment=environment)
    if killed.wait() == [0, 0]:
        assert kill_at > 15, "the update makes fewer changes than were thought"
    update(place, settings=settings)
    assert len(rows_of(checkpoints(place)[-1])[0]) == 64
    assert json.loads((place / "run/data.json").read_text())["num_instances"] == 64
    assert len((place / "run/data_changes.jsonl").read_text().splitlines()) == 1
    assert not (place / "run/update").exists()
    done = run(place)
    assert done.wait() == [0, 0], done.text()


def test_images_that_go_are_refused_and_then_removed_if_that_is_allowed(place: Path, images: Path) -> None:
    stop_at(place, 7)
    for number in LOST:
        (images / f"{number:03d}.png").unlink()
    refused = run(place)
    assert refused.wait() == [2, 2], refused.text()
    assert refused.text().count("error: ") == 1
    assert "003.png, 050.png have gone): restore them, or set data.allow_lost to drop their classes" in refused.text()
    settings = {"data.allow_lost": True, "data.max_broken_share": 0}
    goes_on = run(place, settings=settings, fault="step:1:7:term")
    assert goes_on.wait() == [75, 75], goes_on.text()
    assert "2 of 65 removed, 0 added" in goes_on.text()
    done = run(place, settings={"data.max_broken_share": 0})  # once is enough
    assert done.wait() == [0, 0], done.text()
    assert "updating the images" not in done.text()
    assert len(rows_of(checkpoints(place)[-1])[0]) == NUM_IMAGES - 2


def test_a_list_that_changes_before_there_is_a_classifier_is_the_new_list(place: Path, images: Path) -> None:
    shutil.rmtree(place / "run")
    begun = run(place, stage="initialize_classifier", fault="initialize:1:2:term")
    assert begun.wait() == [75, 75], begun.text()
    add_images(images)
    done = run(place, stage="initialize_classifier")
    assert done.wait() == [0, 0], done.text()
    assert "the images have changed, or lie in other shards than before: the pass begins again" in done.text()
    assert len(rows_of(checkpoints(place, "initialize_classifier")[-1])[0]) == NUM_IMAGES + len(NEW)


def as_left_by_an_earlier_version(place: Path, stretches: list[list[int]]) -> None:
    """The newest checkpoint says from which step on epochs had how many steps."""
    newest = checkpoints(place)[-1]
    position = json.loads((newest / "training.json").read_text())
    record = directory.write_file(newest / "training.json", json.dumps({**position, "stretches": stretches}))
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    manifest["files"]["training.json"] = asdict(record)
    manifest["checksum"] = checksum(manifest["files"])
    (newest / "MANIFEST.json").write_text(json.dumps(manifest))


def test_a_run_of_an_earlier_version_resumes_to_the_bit(place: Path, clean: dict[str, str]) -> None:
    stop_at(place, 7)
    as_left_by_an_earlier_version(place, [[0, 0, 5]])
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


@pytest.mark.full
def test_a_run_of_an_earlier_version_with_left_out_images_goes_on_without_them(place: Path, images: Path) -> None:
    stop_at(place, 8)  # 5 of them in the epoch that was begun again
    old, _ = rows_of(checkpoints(place)[-1])
    as_left_by_an_earlier_version(place, [[0, 0, 4], [3, 0, 5]])
    lines = ["3\t0\tcannot decode 003.png (image 3): cut short\t003.png\n"]
    lines += ["50\t6\tnot in the data set any more\t050.png\n"]
    (place / "run/left_out.txt").write_text("".join(lines))
    (images / "050.png").unlink()
    shutil.copytree(place / "run", place / "before")
    said = update(place, settings={"data.on_broken": "skip", "data.max_broken_share": 0.1})
    assert "2 of 65 removed, 0 added" in said
    kept = [index for index in range(NUM_IMAGES) if index not in LOST]
    assert torch.equal(rows_of(checkpoints(place)[-1])[0], old[kept])
    assert not (place / "run/left_out.txt").exists()
    assert (place / "run/broken.txt").read_text().endswith("\tcannot decode 003.png (image 3): cut short\t003.png\n")
    again = run(place, settings={"data.on_broken": "skip", "data.max_broken_share": 0.1})
    assert again.wait() == [0, 0], again.text()
    assert "excluded, it cannot be read: 003.png" in again.text()
    assert checkpoints(place)[-1].name == "step_000000015"
    shutil.rmtree(place / "run")
    (place / "before").rename(place / "run")
    by_itself = run(place)  # once left out is left out, whatever data.on_broken says
    assert by_itself.wait() == [0, 0], by_itself.text()
    assert len(rows_of(checkpoints(place)[-1])[0]) == 63


@pytest.mark.full
def test_a_list_in_another_order_is_the_same_data_set(place: Path, images: Path, clean: dict[str, str]) -> None:
    shutil.rmtree(place / "run")
    names = sorted(path.name for path in images.iterdir())
    (place / "list.txt").write_text("\n".join(names))
    settings = {"data.kind": "list", "data.list_file": place / "list.txt"}
    begun = run(place, stage="initialize_classifier", settings=settings)
    assert begun.wait() == [0, 0], begun.text()
    stop_at(place, 7, settings=settings)
    (place / "list.txt").write_text("\n".join(reversed(names)))
    resumed = run(place, settings=settings)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


def test_images_that_come_once_all_is_done_are_refused(place: Path, images: Path) -> None:
    done = run(place)
    assert done.wait() == [0, 0], done.text()
    add_images(images)
    refused = run(place)
    assert refused.wait() == [2, 2], refused.text()
    assert "000a.png, 033a.png, 900.png and 9 more have come, and training is complete" in refused.text()
