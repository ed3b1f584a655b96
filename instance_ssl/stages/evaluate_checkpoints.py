"""Stage: Figure 1(b), instance accuracy against semantic accuracy over a run's checkpoints of today's images."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from instance_ssl.checkpoint.identity import keys_digest
from instance_ssl.checkpoint.state import Checkpoint, intact_checkpoints, load_rows
from instance_ssl.config.experiment import flatten
from instance_ssl.errors import UserError
from instance_ssl.evaluation.accuracy_correlation import correlations, draw_correlation, instance_accuracy
from instance_ssl.evaluation.frozen_encoder import (
    LabelledImages,
    Representation,
    cached_features,
    open_labelled,
    represent_checkpoint,
    vote,
)
from instance_ssl.files.atomic import write_json
from instance_ssl.run.broken_images import BrokenImages, readable_batches
from instance_ssl.run.build import classifier_shard, own_parts, training_view
from instance_ssl.run.directory import read_json
from instance_ssl.run.resumption import accept
from instance_ssl.run.stage import Stage

_POINT = {"epoch", "step", "instance_accuracy", "knn_top1", "logged_instance_accuracy"}


def run(stage: Stage) -> dict[str, Any]:
    """Returns the pairs, oldest first, and their correlation; a measured checkpoint is not measured again.

    Raises:
        UserError: when there are fewer than two checkpoints.
    """
    found = intact_checkpoints(stage.checkpoints_of("pretrain"), stage.world)
    if len(found) < 2:
        raise UserError(
            f"{stage.checkpoints_of('pretrain')} holds {len(found)} intact checkpoints and a correlation takes 2: "
            "train with checkpoint.keep_every_epochs, say 10, so that they stay"
        )
    accept(found[-1], stage)
    images = open_labelled(stage)
    known = _known_points(stage, images)
    left = sum(checkpoint.directory.name not in known for checkpoint in found)
    stage.log.say(f"{len(found)} checkpoints, {left} to evaluate")
    points = []
    for checkpoint in found:
        name = checkpoint.directory.name
        if name not in known:
            known[name] = _measure(stage, checkpoint, images)
            _keep_points(stage, images, known)
        points.append({"checkpoint": name, **known[name]})
        _tell(stage, points[-1])
    return {**_recipe(stage, images), **_correlate(stage, points), "figures": points}


def _measure(stage: Stage, checkpoint: Checkpoint, images: LabelledImages) -> dict[str, Any]:
    """One point: both accuracies in per cent, and the one that the training logged in that epoch."""
    representation = represent_checkpoint(stage, "trained", checkpoint)
    position, knn = checkpoint.position, stage.config.evaluation.knn
    instance = _instance_accuracy(stage, checkpoint, representation)
    label = f"epoch {position.epoch}"
    train_nF = cached_features(stage, representation, images.train, f"{label}: train features")
    test_mF = cached_features(stage, representation, images.test, f"{label}: test features")
    headline = knn.model_copy(update={"neighbours": knn.neighbours[:1], "temperatures": knn.temperatures[:1]})
    accuracies = vote(stage, images, train_nF, test_mF, headline, f"{label}: k-NN")
    logged = position.figures.get("instance_accuracy")
    return {
        "epoch": position.epoch,
        "step": position.step,
        "instance_accuracy": 100 * instance,
        "knn_top1": accuracies[knn.neighbours[0], knn.temperatures[0]]["top1"],
        "logged_instance_accuracy": None if logged is None else 100 * logged,
    }


def _instance_accuracy(stage: Stage, checkpoint: Checkpoint, representation: Representation) -> float:
    """Of one seeded random view of every image: the deterministic view is what the rows were initialised with."""
    encoder = representation.encoder
    assert encoder is not None
    shard = classifier_shard(stage)
    stage.together(lambda: load_rows(checkpoint, shard))

    def embed(images: Tensor) -> Tensor:
        with stage.autocast():
            return encoder(images)

    label = f"epoch {checkpoint.position.epoch}: instances"
    with stage.log.progress(label, len(stage.source), "images") as progress:

        def on_batch(count: int) -> None:
            progress.advance(count)
            stage.check_together()

        figures = instance_accuracy(
            embed,
            shard,
            _own_views(stage),
            stage.world,
            embedding_dim=stage.config.model.embedding_dim,
            on_batch=on_batch,
        )
    return figures["instance_accuracy"]


def _own_views(stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of every batch of all images that can be read; a part may be empty."""
    num_images, size = len(stage.source), stage.config.evaluation.batch_size
    parts = own_parts(torch.arange(num_images), size * stage.world.size, stage.world)
    view = training_view(stage.config.augmentation, stage.config.data)
    return readable_batches(stage, parts, BrokenImages(stage), view)


def _correlate(stage: Stage, points: list[dict[str, Any]]) -> dict[str, Any]:
    semantic = [point["knn_top1"] for point in points]
    figures: dict[str, Any] = correlations([point["instance_accuracy"] for point in points], semantic)
    logged = [(point["logged_instance_accuracy"], point["knn_top1"]) for point in points]
    known = [(x, y) for x, y in logged if x is not None]
    if len(known) >= 2:
        figures["with_logged"] = correlations([x for x, _ in known], [y for _, y in known])
    stage.log.say(
        f"instance against semantic accuracy over {len(points)} checkpoints: Pearson {_short(figures['pearson'])}, "
        f"Spearman {_short(figures['spearman'])}"
    )
    picture, note = stage.directory / "correlation.png", f"Pearson {_short(figures['pearson'])}"
    if stage.world.rank == 0:
        draw_correlation(picture, points, "instance_accuracy", "knn_top1", note)
    return {"correlation": figures, "picture": str(picture.relative_to(stage.run_directory))}


def _short(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _tell(stage: Stage, point: dict[str, Any]) -> None:
    stage.log.say(
        f"epoch {point['epoch']}: instance accuracy {point['instance_accuracy']:.2f} %, k-NN {point['knn_top1']:.2f} %"
    )
    stage.log.metrics(
        point["epoch"],
        {
            "checkpoints/instance_accuracy": point["instance_accuracy"],
            "checkpoints/knn_top1": point["knn_top1"],
        },
    )


def _recipe(stage: Stage, images: LabelledImages) -> dict[str, Any]:
    knn = stage.config.evaluation.knn
    return {
        "instance": "one seeded random view of every training image, against all N classes",
        "semantic": "weighted k-NN",
        "k": knn.neighbours[0],
        "temperature": knn.temperatures[0],
        "layer": "backbone output",
        "bank_images": len(images.train),
        "query_images": len(images.test),
    }


def _known_points(stage: Stage, images: LabelledImages) -> dict[str, dict[str, Any]]:
    """Points that this stage measured earlier, by the same recipe on the same images."""
    points = None
    path = stage.directory / "points.json"
    if stage.world.rank == 0:
        kept = read_json(path) or {}
        points = kept.get("points") if kept.get("of") == _identity(stage, images) else None
    points = stage.world.broadcast_object(points)
    points = points if isinstance(points, dict) else {}
    return {name: point for name, point in points.items() if isinstance(point, dict) and point.keys() >= _POINT}


def _keep_points(stage: Stage, images: LabelledImages, points: dict[str, dict[str, Any]]) -> None:
    if stage.world.rank == 0:
        write_json(stage.directory / "points.json", {"of": _identity(stage, images), "points": points})


def _identity(stage: Stage, images: LabelledImages) -> dict[str, Any]:
    digests = {
        "configuration": keys_digest(flatten(stage.config)),
        "train": images.train.digest,
        "test": images.test.digest,
    }
    return {**_recipe(stage, images), **digests, "labels": images.label_digest}
