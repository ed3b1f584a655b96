"""Data sets that change between two runs: images that come, go, and change places (F15)."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rig import NUM_IMAGES, checkpoints, digests, metrics, run

import instance_ssl.stages.pretrain as pretrain
from instance_ssl.checkpoint.directory import read_tensors
from instance_ssl.data.augmentations import centre_view
from instance_ssl.data.datasets import open_source
from instance_ssl.models.encoder import build_encoder

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


def watch_the_growth() -> None:
    """Every rank's rows, once the new ones are filled, go to $ROWS."""
    original = pretrain.add_rows

    def add_rows(stage: Any, shard: Any, *others: Any) -> None:
        original(stage, shard, *others)
        state = {"weight": shard.weight.clone(), "momentum": shard.momentum_buffer.clone()}
        torch.save(state, Path(os.environ["ROWS"]) / f"{shard.start:09d}.pt")

    pretrain.add_rows = add_rows


def rows_of(paths: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.load(path, weights_only=True) for path in sorted(paths)]
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


@pytest.mark.parametrize(("size", "micro_batch"), [(2, 3), pytest.param(3, 2, marks=pytest.mark.fault)])
def test_images_that_come_get_rows_of_their_features_behind_the_old_ones(
    place: Path, images: Path, size: int, micro_batch: int
) -> None:
    stop_at(place, 10)  # two epochs
    old, old_momentum = rows_of(list(checkpoints(place)[-1].glob("rows_*.pt")))
    names = (place / "run/instances.txt").read_text()
    add_images(images)
    x_MD = embeddings(images, checkpoints(place)[-1])
    rows = place / "rows"
    rows.mkdir()
    environment = {"ROWS": str(rows)}
    grown = run(place, size=size, micro_batch=micro_batch, prepare=watch_the_growth, environment=environment)
    assert set(grown.wait()) == {0}, grown.text()
    weight, momentum = rows_of(list(rows.iterdir()))
    assert torch.equal(weight[:NUM_IMAGES], old)
    assert torch.equal(momentum[:NUM_IMAGES], old_momentum)
    norm = torch.linalg.vector_norm(old, dim=1).mean()
    torch.testing.assert_close(weight[NUM_IMAGES:], torch.nn.functional.normalize(x_MD) * norm, rtol=1e-4, atol=1e-5)
    assert not momentum[NUM_IMAGES:].any()
    assert f"12 images have come to the 65 that there were: they are classes 65 to {64 + len(NEW)}" in grown.text()
    result = json.loads((place / "run/pretrain/result.json").read_text())
    assert result["steps"] == 10 + NEW_PER_EPOCH
    assert (place / "run/instances.txt").read_text() == names + "".join(f"{name}\n" for name in NEW)
    assert json.loads((place / "run/data.json").read_text())["num_instances"] == NUM_IMAGES + len(NEW)
    change = json.loads((place / "run/data_changes.jsonl").read_text())
    assert [change[when]["num_instances"] for when in ("before", "now")] == [NUM_IMAGES, NUM_IMAGES + len(NEW)]
    final, _ = rows_of(list(checkpoints(place)[-1].glob("rows_*.pt")))
    assert len(final) == NUM_IMAGES + len(NEW)
    assert (final[NUM_IMAGES:] != weight[NUM_IMAGES:]).any(dim=1).all()
    steps = [line["step"] for line in metrics(place) if "train/loss" in line]
    assert steps == sorted(set(steps))
    assert steps[-1] == 10 + NEW_PER_EPOCH


def test_an_epoch_in_which_they_come_begins_again_and_a_crash_changes_nothing(place: Path, images: Path) -> None:
    stop_at(place, 7)
    add_images(images)
    shutil.copytree(place / "run", place / "before")
    grown = run(place)
    assert grown.wait() == [0, 0], grown.text()
    assert "in the middle of epoch 2, which begins again" in grown.text()
    assert checkpoints(place)[-1].name == f"step_{7 + 2 * NEW_PER_EPOCH:09d}"
    expected = digests(place)
    shutil.rmtree(place / "run")
    (place / "before").rename(place / "run")
    assert -9 in run(place, fault="step:0:8:kill").wait()  # before anything is saved
    stop_at(place, 15)  # in the last of the longer epochs
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert "begins again" not in resumed.text()
    assert digests(place) == expected


def test_images_that_go_are_refused_and_then_left_out_if_that_is_allowed(place: Path, images: Path) -> None:
    stop_at(place, 7)
    for number in (3, 50):
        (images / f"{number:03d}.png").unlink()
    refused = run(place)
    assert refused.wait() == [2, 2], refused.text()
    assert refused.text().count("error: ") == 1
    assert "003.png, 050.png have gone): restore them, or set data.allow_lost to leave them out" in refused.text()
    settings = {"data.allow_lost": True, "data.max_broken_share": 0}
    goes_on = run(place, settings=settings, fault="step:1:9:term")
    assert goes_on.wait() == [75, 75], goes_on.text()
    assert "003.png is not in the data set any more; its class is left out" in goes_on.text()
    done = run(place, settings={"data.max_broken_share": 0})  # once is enough
    assert done.wait() == [0, 0], done.text()
    for rows in rows_of(list(checkpoints(place)[-1].glob("rows_*.pt"))):
        assert (rows == 0).all(dim=1).nonzero()[:, 0].tolist() == [3, 50]
    lines = (place / "run/left_out.txt").read_text().splitlines()
    assert lines == [f"{number}\t7\tnot in the data set any more\t{number:03d}.png" for number in (3, 50)]


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
