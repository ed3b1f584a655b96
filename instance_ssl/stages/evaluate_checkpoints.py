"""Stage: Figure 1(b), instance accuracy against semantic accuracy over a run's checkpoints of today's images."""

from pathlib import Path
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
    stoppable_progress,
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
    recipe, path = _recipe(stage, images), stage.directory / "points.json"
    identity = {
        **recipe,
        "configuration": keys_digest(flatten(stage.config)),
        "train": images.train.digest,
        "test": images.test.digest,
        "labels": images.label_digest,
    }
    known: dict[str, dict[str, Any]] = stage.on_rank_0(lambda: _known_points(path, identity))
    left = sum(checkpoint.directory.name not in known for checkpoint in found)
    stage.log.say(f"{len(found)} checkpoints, {left} to evaluate")
    points = []
    for checkpoint in found:
        name = checkpoint.directory.name
        if name not in known:
            known[name] = _measure(stage, checkpoint, images)
            if stage.world.rank == 0:
                write_json(path, {"of": identity, "points": known})
        point = {"checkpoint": name, **known[name]}
        points.append(point)
        epoch, instance, semantic = point["epoch"], point["instance_accuracy"], point["knn_top1"]
        stage.log.say(f"epoch {epoch}: instance accuracy {instance:.2f} %, k-NN {semantic:.2f} %")
        stage.log.metrics(epoch, {"checkpoints/instance_accuracy": instance, "checkpoints/knn_top1": semantic})
    return {**recipe, **_correlate(stage, points), "figures": points}


def _measure(stage: Stage, checkpoint: Checkpoint, images: LabelledImages) -> dict[str, Any]:
    """One point: both accuracies in per cent, and the one that the training logged in that epoch."""
    representation = represent_checkpoint(stage, checkpoint)
    position, knn = checkpoint.position, stage.config.evaluation.knn
    label = f"epoch {position.epoch}"
    instance = _instance_accuracy(stage, checkpoint, representation, f"{label}: instances")
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


def _instance_accuracy(stage: Stage, checkpoint: Checkpoint, representation: Representation, label: str) -> float:
    """Of one seeded random view of every image: the deterministic view is what the rows were initialised with.

    Images that cannot be read are excluded; a rank's part of a batch may be empty.
    """
    encoder = representation.encoder
    assert encoder is not None
    shard = classifier_shard(stage)
    stage.together(lambda: load_rows(checkpoint, shard))

    def embed(images: Tensor) -> Tensor:
        with stage.autocast():
            return encoder(images)

    config, world = stage.config, stage.world
    parts = own_parts(torch.arange(len(stage.source)), config.evaluation.batch_size * world.size, world)
    batches = readable_batches(stage, parts, BrokenImages(stage), training_view(config.augmentation, config.data))
    with stoppable_progress(stage, label, len(stage.source), "images") as on_batch:
        width = config.model.embedding_dim
        figures = instance_accuracy(embed, shard, batches, world, embedding_dim=width, on_batch=on_batch)
    return figures["instance_accuracy"]


def _correlate(stage: Stage, points: list[dict[str, Any]]) -> dict[str, Any]:
    def correlate(key: str) -> dict[str, float | None]:
        pairs = [(point[key], point["knn_top1"]) for point in points if point[key] is not None]
        return correlations([x for x, _ in pairs], [y for _, y in pairs])

    figures: dict[str, Any] = correlate("instance_accuracy")
    pearson, spearman = ("undefined" if r is None else f"{r:.3f}" for r in (figures["pearson"], figures["spearman"]))
    if sum(point["logged_instance_accuracy"] is not None for point in points) >= 2:
        figures["with_logged"] = correlate("logged_instance_accuracy")
    over = f"instance against semantic accuracy over {len(points)} checkpoints"
    stage.log.say(f"{over}: Pearson {pearson}, Spearman {spearman}")
    picture = stage.directory / "correlation.png"
    if stage.world.rank == 0:
        draw_correlation(picture, points, f"Pearson {pearson}")
    return {"correlation": figures, "picture": str(picture.relative_to(stage.run_directory))}


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


def _known_points(path: Path, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Points that this stage measured earlier, by the same recipe on the same images."""
    kept = read_json(path) or {}
    points = kept.get("points") if kept.get("of") == identity else None
    points = points if isinstance(points, dict) else {}
    return {name: point for name, point in points.items() if isinstance(point, dict) and point.keys() >= _POINT}
