"""What is evaluated, and export, by stages: other runs' checkpoints, weights files, folders of images."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks

from instance_ssl.config.deepspeed import load_ds_config
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.evaluation.frozen_encoder import load_backbone, represent
from instance_ssl.files.atomic import write_json
from instance_ssl.run.agreement import share_images
from instance_ssl.run.images import open_images
from instance_ssl.run.log import RunLog
from instance_ssl.run.stage import Stage
from instance_ssl.run.watchdog import Guard
from instance_ssl.stages import export, initialize_classifier

DS = Path(__file__).parents[2] / "ds_configs/cpu_float32.json"
NUM_IMAGES = 7


def make_stage(group: Group, name: str, run_directory: Path, **sections: dict[str, Any]) -> Stage:
    config = ExperimentConfig.model_validate(
        {
            "data": {"kind": "digits", "image_size": 16, "num_workers": 0, "limit_train": 64},
            "model": {"backbone": "resnet18", "embedding_dim": 8, **sections.pop("model", {})},
            "classifier": {"num_hard_classes": 5, "initialization_batch_size": 32},
            "optimization": {"epochs": 1, "warmup_epochs": 0, "global_batch_size": 64},
            "export": {"formats": ["pth", "parquet"]},
            **sections,
        }
    )
    ds = load_ds_config(DS, global_batch_size=64, max_grad_norm=0.0, world_size=1)
    opened = open_images(config.data, "train", group, RunLog(is_main=False))
    source = share_images(opened, None, group)
    stage = Stage(name, run_directory, config, ds, group, RunLog(is_main=group.rank == 0), Guard(group.rank), source)
    if group.rank == 0:
        stage.directory.mkdir(parents=True, exist_ok=True)
        write_json(stage.directory / "environment.json", {"commit": "c0ffee", "versions": {}})
    group.barrier()
    return stage


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a random encoder, whose batch norms have seen the digits."""
    directory = tmp_path_factory.mktemp("export") / "run"
    run_ranks(_initialize, 1, directory)
    return directory


def _initialize(group: Group, directory: Path) -> None:
    initialize_classifier.run(make_stage(group, "initialize_classifier", directory))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    (root / "b").mkdir()
    for number in range(NUM_IMAGES):
        picture = Image.effect_noise((20 + number, 30), 40 + 5 * number).convert("RGB")
        picture.save(root / ("b" if number % 2 else ".") / f"{number}.png")
    return root


def _export(group: Group, directory: Path, sections: dict[str, Any]) -> dict[str, Any]:
    return export.run(make_stage(group, "export", directory, **sections))


def _random_and_file(group: Group, directory: Path, weights: Path) -> list[Any]:
    """States of the backbone: of `random`, of the file made from it, and how `load_backbone` gives them."""
    stage = make_stage(group, "any", directory, evaluation={"weights": str(weights), "sources": ["random", "weights"]})
    random, of_file = represent(stage, "random"), represent(stage, "weights")
    assert random.encoder is not None
    assert of_file.encoder is not None
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    unfrozen, epoch = load_backbone(stage, "weights")
    assert unfrozen.training
    assert all(parameter.requires_grad for parameter in unfrozen.parameters())
    assert not any(parameter.requires_grad for parameter in of_file.encoder.parameters())
    assert epoch is None
    scratch, epoch = load_backbone(stage, "random")
    assert epoch == 0
    states = [encoder.backbone.state_dict() for encoder in (random.encoder, of_file.encoder, unfrozen, scratch)]
    return [states, random.features(images), of_file.features(images), of_file.origin]


def test_weights_that_were_exported_are_the_same_encoder_to_the_bit(run: Path, tmp_path: Path) -> None:
    (run / "export").mkdir()
    (run / "export/detectron2.pkl").touch()  # of another encoder
    (card,) = run_ranks(_export, 1, run, {"export": {"source": "random", "formats": ["pth"]}})
    assert not (run / "export/detectron2.pkl").exists()
    weights = run / "export/backbone.pth"
    (random, of_file, unfrozen, scratch), features, features_of_file, origin = run_ranks(
        _random_and_file, 1, run, weights
    )[0]
    for name, value in random.items():
        assert torch.equal(of_file[name], value), name
        assert torch.equal(unfrozen[name], value), name
    assert torch.equal(features_of_file, features)
    assert origin["sha256"] == card["sha256"]["backbone.pth"]
    # From scratch: the same weights, but batch norm has seen nothing.
    assert torch.equal(scratch["network.conv1.weight"], random["network.conv1.weight"])
    assert scratch["network.bn1.running_mean"].abs().max() == 0
    assert random["network.bn1.running_mean"].abs().max() > 0


def _export_thrice(group: Group, directory: Path, folder: Path) -> list[Any]:
    """pth and rows; then safetensors alone; then, after another training of the same run directory, safetensors."""
    said: list[str] = []
    outcomes: list[Any] = []
    for formats, images in ((["pth", "parquet"], str(folder)), (["safetensors"], None), (["safetensors"], None)):
        sections = {"export": {"source": "random", "formats": formats, "images": images}}
        stage = make_stage(group, "export", directory, **sections)
        stage.log.say = said.append  # type: ignore[method-assign]
        if len(outcomes) == 2:
            card = json.loads((stage.directory / "model_card.json").read_text())
            write_json(stage.directory / "model_card.json", {**card, "encoder_sha256": "another"})
        card = export.run(stage)
        outcomes.append((card, sorted(path.name for path in stage.directory.iterdir()), list(said)))
        said.clear()
    return outcomes


def test_a_further_export_keeps_files_of_the_same_encoder_and_says_what_it_removes(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("pyarrow")
    shutil.copytree(run / "initialize_classifier", tmp_path / "run/initialize_classifier")
    first, second, third = run_ranks(_export_thrice, 1, tmp_path / "run", folder)[0]
    assert {"backbone.pth", "backbone.safetensors", "images"} <= set(second[1])
    assert second[0]["sha256"].keys() == {"backbone.pth", "backbone.safetensors"}
    assert second[0]["sha256"]["backbone.pth"] == first[0]["sha256"]["backbone.pth"]
    assert second[0]["images"] == first[0]["images"]
    assert "load" in second[0]
    assert any(line == "kept, of the same encoder: backbone.pth" for line in second[2])
    assert "backbone.pth" not in third[1]
    assert third[0]["sha256"].keys() == {"backbone.safetensors"}
    assert "images" not in third[0]
    assert any("removed, not known to be of this encoder: backbone.pth" in line for line in third[2])
    assert any("rows there are of another encoder" in line for line in third[2])


def test_two_ranks_write_the_rows_of_a_folder_like_one_from_another_runs_checkpoint(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    checkpoint = run / "initialize_classifier/checkpoints/step_000000000"
    shutil.copytree(checkpoint, tmp_path / "other/pretrain/checkpoints/step_000000000")
    sections: dict[str, Any] = {"export": {"images": str(folder), "formats": ["pth", "parquet"]}}
    arrays = []
    for size, given in ((1, checkpoint), (2, tmp_path / "other")):
        sections["evaluation"] = {"checkpoint": str(given), "batch_size": 2}
        cards = run_ranks(_export, size, tmp_path / f"run_{size}", sections)
        directory = tmp_path / f"run_{size}/export/images"
        assert cards[0] == cards[-1]
        assert not list(directory.glob("part_*"))
        assert (directory / "names.txt").read_text().splitlines() == [
            "0.png", "2.png", "4.png", "6.png", "b/1.png", "b/3.png", "b/5.png"
        ]  # fmt: skip
        arrays.append({name: np.load(directory / f"{name}.npy") for name in ("features", "embeddings")})
        assert arrays[-1]["features"].shape == (NUM_IMAGES, 512)
        assert arrays[-1]["embeddings"].shape == (NUM_IMAGES, 8)
        table = parquet.read_table(directory / "images.parquet")
        assert np.array_equal(np.stack(table["embeddings"].to_numpy()), arrays[-1]["embeddings"])
    for name, rows in arrays[0].items():
        np.testing.assert_allclose(arrays[1][name], rows, rtol=1e-4, atol=1e-5)
    card = json.loads((tmp_path / "run_1/export/model_card.json").read_text())
    assert card["stem"].startswith("3x3")
    assert (card["epoch"], card["num_instances"], card["commit"]) == (0, 64, "c0ffee")
    assert len(card["data_digest"]) == 64
    assert str(tmp_path.parent) not in json.dumps(card)


def _stop_once(group: Group, directory: Path, sections: dict[str, Any]) -> list[str]:
    """Exports, but the first time with a request to end before the second batch."""
    said: list[str] = []
    stage = make_stage(group, "export", directory, **sections)
    stage.guard.reason = "a test"
    with pytest.raises(BaseException, match="a test"):
        export.run(stage)
    stage.guard.reason = None
    stage.log.say = said.append  # type: ignore[method-assign]
    export.run(stage)
    return said


@pytest.mark.full
def test_a_stopped_export_of_a_folder_goes_on(run: Path, folder: Path, tmp_path: Path) -> None:
    checkpoint = run / "initialize_classifier/checkpoints/step_000000000"
    sections: dict[str, Any] = {"evaluation": {"checkpoint": str(checkpoint), "batch_size": 2}}
    sections["export"] = {"images": str(folder), "formats": []}
    (said,) = run_ranks(_stop_once, 1, tmp_path / "stopped", sections)
    assert any("2 images done" in line for line in said)
    run_ranks(_export, 1, tmp_path / "whole", sections)
    stopped, whole = (np.load(tmp_path / f"{name}/export/images/features.npy") for name in ("stopped", "whole"))
    assert np.array_equal(stopped, whole)


def _error_of(group: Group, directory: Path, sections: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        export.run(make_stage(group, "export", directory, **sections))
    return str(caught.value)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"evaluation": {"checkpoint": "{d}"}}, "is not a checkpoint (MANIFEST.json: "),
        ({"evaluation": {"checkpoint": "{c}"}, "model": {"backbone": "resnet34"}}, "not fit this encoder: 80 missing"),
        ({"evaluation": {"weights": "{d}/wrong.pth"}, "export": {"source": "weights"}}, "1 extra (nothing)"),
        ({"export": {"source": "weights"}}, "set evaluation.weights"),
        ({"export": {"images": "{d}/absent"}}, "export.images {d}/absent is not a folder"),
        ({}, "run runners/pretrain.py first"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(sections: dict[str, Any], expected: str, run: Path, tmp_path: Path) -> None:
    torch.save({"nothing": torch.zeros(1)}, tmp_path / "wrong.pth")
    checkpoint = run / "initialize_classifier/checkpoints/step_000000000"
    filled = json.loads(json.dumps(sections).replace("{d}", str(tmp_path)).replace("{c}", str(checkpoint)))
    messages = run_ranks(_error_of, 1, tmp_path / "run", filled)
    assert expected.replace("{d}", str(tmp_path)) in messages[0]
    assert "\n" not in messages[0]
