"""Stage: an encoder as files for others, with a model card, and the features of any folder of images."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instance_ssl.checkpoint.export import (
    ONNX_OPSET,
    backbone_state,
    loading_code,
    require_packages,
    write_detectron2,
    write_onnx,
    write_pth,
    write_safetensors,
)
from instance_ssl.checkpoint.hub_export import HUB_FILES, Preprocessing, timm_network, write_hub
from instance_ssl.config.data import DataConfig
from instance_ssl.data.augmentations import NORMALISE_MEAN, NORMALISE_STD, centre_view
from instance_ssl.data.image_sources import ImageSource, write_instances
from instance_ssl.data.loaders import image_loader
from instance_ssl.data.sampler import consecutive_batches
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError
from instance_ssl.evaluation.feature_files import append_features, join_parts, keep_whole_rows, write_parquet
from instance_ssl.evaluation.features import state_digest
from instance_ssl.evaluation.frozen_encoder import Representation, represent, stoppable_progress
from instance_ssl.files.atomic import saved_file, write_json
from instance_ssl.files.disk_space import find_no_space, saving, why_not_written
from instance_ssl.models.backbones import SMALL_IMAGE_PIXELS, ResNet, choose_stem, is_library_network
from instance_ssl.models.encoder import Encoder
from instance_ssl.run.agreement import on_rank_0, share_images
from instance_ssl.run.build import describe_encoder
from instance_ssl.run.directory import read_json
from instance_ssl.run.images import open_images
from instance_ssl.run.stage import Stage

_HUB = tuple(f"hub/{name}" for name in HUB_FILES)
_BACKBONE_FILES = ("backbone.pth", "backbone.safetensors", "features.onnx", "detectron2.pkl", *_HUB)


def run(stage: Stage) -> dict[str, Any]:
    """Files of the backbone and its card, by rank 0; rows of `export.images`, by all ranks."""
    export = stage.config.export
    require_packages(export.formats)
    images = None if export.images is None else _open_folder(stage, export.images)
    representation = represent(stage, export.source)
    encoder = representation.encoder
    assert encoder is not None  # no source of `export` is pixels
    stage.log.say(describe_encoder(stage.config))
    described = {**_describe(stage, representation), "encoder_sha256": state_digest(encoder)}
    before = stage.on_rank_0(lambda: _earlier_export(stage, described))
    written = stage.on_rank_0(lambda: _write_backbone(stage, encoder, described))
    kept = {name: sha256 for name, sha256 in before["sha256"].items() if name not in written}
    files = {**kept, **written}
    card = {**described, **_describe_files(stage, encoder, files), "sha256": files}
    names = [*written, "model_card.json"]
    if kept:
        stage.log.say(f"kept, of the same encoder: {', '.join(kept)}")
    if images is not None:
        card["images"] = _write_rows(stage, representation, encoder, images)
        names += card["images"]["files"]
    elif before["images"] is not None:
        card["images"] = before["images"]

    def write_card() -> None:
        environment = read_json(stage.directory / "environment.json") or {}
        made_with = {key: environment.get(key) for key in ("commit", "versions")}
        with saving(path := stage.directory / "model_card.json"):
            write_json(path, {**card, **made_with})

    stage.on_rank_0(write_card)
    stage.log.say(f"{', '.join(names)}: in {stage.directory}")
    return card


def _earlier_export(stage: Stage, described: dict[str, Any]) -> dict[str, Any]:
    """What stays of an earlier export of this encoder: files by their SHA-256, and the rows.

    Removes files of another encoder; its rows, which take long, stay but leave the card. Logs both.
    """
    card = read_json(stage.directory / "model_card.json") or {}
    same = all(card.get(key) == described[key] for key in ("encoder_sha256", "image_size"))
    recorded, kept, removed = card.get("sha256"), {}, []
    for name in _BACKBONE_FILES:
        path = stage.directory / name
        if not path.exists():
            continue
        sha256 = _sha256(path)
        if same and isinstance(recorded, dict) and recorded.get(name) == sha256:
            kept[name] = sha256
        else:
            path.unlink()
            removed.append(name)
    if removed:
        stage.log.say(f"removed, not known to be of this encoder: {', '.join(removed)} (in {stage.directory})")
    if card.get("images") and not same:
        stage.log.say(f"{stage.directory / 'images'}: the rows there are of another encoder")
    return {"sha256": kept, "images": card.get("images") if same else None}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_backbone(stage: Stage, encoder: Encoder, described: dict[str, Any]) -> dict[str, str]:
    """The files of `export.formats` that there can be of this backbone; the SHA-256 of each by its name."""
    backbone, size = encoder.backbone, stage.config.data.image_size
    state, is_resnet, small = backbone_state(backbone), isinstance(backbone, ResNet), _has_small_stem(stage)
    if stage.config.model.backbone == "small_cnn":
        stage.log.say("small_cnn is not a torchvision network: its keys are its own")
    elif is_resnet and small:
        stage.log.say("the 3x3 stem is not torchvision's: model_card.json says how to load it; none for detectron2")
    writers: dict[str, tuple[str, Callable[[Path], None]]] = {
        "pth": ("backbone.pth", lambda path: write_pth(state, path)),
        "safetensors": ("backbone.safetensors", lambda path: write_safetensors(state, path)),
        "hub": ("hub", lambda path: _write_hub(stage, encoder, state, described, path)),
        "onnx": ("features.onnx", lambda path: write_onnx(backbone, size, path)),
    }
    if is_resnet and not small:
        writers["detectron2"] = ("detectron2.pkl", lambda path: write_detectron2(state, path))
    written: dict[str, str] = {}
    for form in stage.config.export.formats:
        if form in writers:
            name, write = writers[form]
            stage.guard.check()
            write(stage.directory / name)
            names = _HUB if form == "hub" else (name,)
            written |= {name: _sha256(stage.directory / name) for name in names}
    return written


def _write_hub(
    stage: Stage, encoder: Encoder, state: dict[str, Tensor], described: dict[str, Any], folder: Path
) -> None:
    name, small = stage.config.model.backbone, _has_small_stem(stage)
    network = timm_network(encoder.backbone, name, small_stem=small)
    if network is None:
        stage.log.say(f"timm cannot build this {name}: hub/config.json says how to load it")
    size = stage.config.data.image_size
    inputs = Preprocessing(size, size / _resized(size), NORMALISE_MEAN, NORMALISE_STD)
    load = loading_code(encoder.backbone, name, small_stem=small)
    write_hub(folder, state, network, inputs, described, load)


def _has_small_stem(stage: Stage) -> bool:
    model = stage.config.model
    return choose_stem(model.backbone, model.stem, stage.config.data.image_size) == "small"


def _resized(image_size: int) -> int:
    """Short side that an image is resized to before the centre crop."""
    return round(image_size * 256 / 224) if image_size > SMALL_IMAGE_PIXELS else image_size


def _describe(stage: Stage, representation: Representation) -> dict[str, Any]:
    """What a user of the files alone must know."""
    size = stage.config.data.image_size
    return {
        "architecture": stage.config.model.backbone,
        **_describe_stem(stage),
        "image_size": size,
        "channels": "RGB in [0, 1], then normalised",
        "mean": NORMALISE_MEAN,
        "std": NORMALISE_STD,
        "resize": f"bicubic, short side {_resized(size)}, centre crop" if _resized(size) > size else "bicubic, whole",
        "layer": representation.layer,
        "feature_dim": representation.feature_dim,
        "classifier": "none: it is not in the files (with strict=False, the library's stays as it is)",
        "source": representation.source,
        "epoch": representation.epoch,
        # Without its path: the card goes to others.
        **{key: value for key, value in representation.origin.items() if key not in ("checkpoint", "file")},
        **_initial_weights(stage),
    }


def _initial_weights(stage: Stage) -> dict[str, Any]:
    """What the run started from, without paths: the card goes to others."""
    origin = (read_json(stage.run_directory / "initialize_classifier/result.json") or {}).get("initial_weights")
    if not isinstance(origin, dict):
        return {}
    return {"initial_weights": {key: value for key, value in origin.items() if key not in ("checkpoint", "file")}}


def _describe_stem(stage: Stage) -> dict[str, Any]:
    model = stage.config.model
    if is_library_network(model.backbone):
        return {"options": model.backbone_options}
    return {"stem": "3x3, stride 1, no max-pool" if _has_small_stem(stage) else "7x7, stride 2, max-pool"}


def _describe_files(stage: Stage, encoder: Encoder, files: Iterable[str]) -> dict[str, Any]:
    """How to load those of the files that need an explanation."""
    described: dict[str, Any] = {}
    load = loading_code(encoder.backbone, stage.config.model.backbone, small_stem=_has_small_stem(stage))
    if load and "backbone.pth" in files:
        described["load"] = load
    if "features.onnx" in files:
        described["onnx"] = {"opset": ONNX_OPSET, "input": "images (batch, 3, S, S)", "output": "features (batch, F)"}
    return described


def _open_folder(stage: Stage, root: Path) -> ImageSource:
    try:
        own = stage.config.data
        data = DataConfig(kind="folder", root=root, exif=own.exif, alpha=own.alpha)
        images = open_images(data, "train", stage.world, stage.log)
        return share_images(images, stage.run_directory, stage.world)
    except UserError as error:
        raise UserError(str(error).replace("data.root", "export.images")) from None


def _write_rows(stage: Stage, representation: Representation, encoder: Encoder, images: ImageSource) -> dict[str, Any]:
    """Features of every image of the folder, and embeddings where the projection belongs to them. Collective."""
    columns = {"features": slice(0, encoder.feature_dim)}
    if representation.source != "weights":  # a file of weights has no projection
        columns["embeddings"] = slice(encoder.feature_dim, encoder.feature_dim + stage.config.model.embedding_dim)
    directory = stage.directory / "images"
    # Only parts of the same rows are resumed.
    recipe = [state_digest(encoder), images.digest, stage.config.data.image_size, stage.ds.autocast_dtype, len(columns)]
    tag = hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]
    parts = [directory / f"part_{tag}_{rank}_of_{stage.world.size}" for rank in range(stage.world.size)]
    stage.together(lambda: _append_own_rows(stage, encoder, images, parts[stage.world.rank], columns))
    files = stage.world.broadcast_object(
        stage.together(
            lambda: on_rank_0(lambda: _join(stage, images, parts, columns), stage.world, lambda _: stage.guard.beat())
        )
    )
    dims = {name: place.stop - place.start for name, place in columns.items()}
    return {"num_images": len(images), "digest": images.digest, "dims": dims, "files": files}


def _append_own_rows(
    stage: Stage, encoder: Encoder, images: ImageSource, part: Path, columns: dict[str, slice]
) -> None:
    """Appends the missing rows of this rank's contiguous part of the images."""
    width = max(place.stop for place in columns.values())
    start, stop = Partition(len(images), stage.world.size).bounds(stage.world.rank)

    def rows_of(images_b: Tensor) -> Tensor:
        with stage.autocast():
            features = encoder.backbone(images_b)
            rows = [features] if "embeddings" not in columns else [features, encoder.projection(features)]
        return torch.cat([row.float() for row in rows], dim=1)

    needed = 4 * width * (stop - start)
    try:
        part.parent.mkdir(exist_ok=True)
        done = keep_whole_rows(part, width)
        needed -= 4 * width * done
        if problem := find_no_space(part.parent, needed):
            raise UserError(f"{part} cannot be written: {problem}")
        if done:
            stage.log.say(f"resuming from {part}: {done:,} images done")
        size, data = stage.config.evaluation.batch_size, stage.config.data
        batches = consecutive_batches(start + done, stop, size)
        loader = image_loader(images, centre_view(data.image_size), batches, data.num_workers)
        label, initial = "features of the folder", done * stage.world.size
        with stoppable_progress(stage, label, len(images), "images", initial=initial, in_step=False) as on_batch:
            append_features(part, rows_of, loader, width, stage.world.device, on_batch=on_batch)
    except OSError as error:
        raise UserError(f"{part} cannot be written: {why_not_written(error, part.parent, needed)}") from None


def _join(stage: Stage, images: ImageSource, parts: list[Path], columns: dict[str, slice]) -> list[str]:
    """The .npy files, the list of names and the table; the parts are removed. Their names, relative to the stage's."""
    directory, width = parts[0].parent, max(place.stop for place in columns.values())
    arrays = {name: directory / f"{name}.npy" for name in columns}
    for name, path in arrays.items():
        stage.guard.check()
        with saved_file(path) as temporary:
            join_parts(parts, width, columns[name], temporary)
    paths, table = [*arrays.values(), directory / "names.txt"], directory / "images.parquet"
    write_instances(images, directory / "names.txt")
    if "parquet" in stage.config.export.formats:
        with saved_file(table) as temporary:
            write_parquet(images.names, arrays, temporary)
        paths.append(table)
    elif table.exists():
        table.unlink()
        stage.log.say(f"removed, for export.formats has no parquet and the rows are new: {table}")
    for part in directory.glob("part_*"):
        part.unlink()
    return [str(path.relative_to(stage.directory)) for path in paths]
