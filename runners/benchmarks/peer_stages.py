"""Stages of the peers' benchmark: train a peer and evaluate it on the way; evaluate our own run's checkpoints alike.

Images, order, views, batches, schedule, precision and evaluation are the same functions for all. The clock stops during
evaluations. The curve has a point every `checkpoint.keep_every_epochs`; only at the last has the schedule ended.
"""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from instance_ssl.checkpoint.state import intact_checkpoints
from instance_ssl.data.loaders import view_loader
from instance_ssl.data.sampler import GlobalBatchSampler
from instance_ssl.data.views import ViewBatch
from instance_ssl.errors import UserError
from instance_ssl.evaluation.features import evaluation_mode
from instance_ssl.evaluation.frozen_encoder import (
    LabelledImages,
    Representation,
    cached_features,
    open_labelled,
    own_part,
    represent_checkpoint,
    vote,
)
from instance_ssl.evaluation.linear import probe_cached_features
from instance_ssl.files.structured import read_json_lines
from instance_ssl.models.backbones import Backbone, build_backbone
from instance_ssl.run.build import training_views
from instance_ssl.run.directory import read_json
from instance_ssl.run.stage import Stage
from instance_ssl.stages import pretrain
from instance_ssl.training.schedules import warmup_cosine
from instance_ssl.training.step import flatten_views
from measure import peak_bytes
from peer_methods import Peer, PeerName, build_peer

_INITIALISATION, _TRAINING = "initialize_classifier", "pretrain"


def run_peer(stage: Stage) -> dict[str, Any]:
    """Trains the peer that the stage is named after in one process and returns its curve; a stopped run starts over.

    `classifier.temperature` is its τ and `classifier.num_sampled_classes` the length of MoCo's queue; the other keys of
    that section have no effect.

    Raises:
        UserError: more than one process, a number of views other than two, or lightly is not installed.
    """
    config = stage.config
    if stage.world.size > 1:
        raise UserError(f"the peers run in one process, not in {stage.world.size}")
    if config.augmentation.num_views != 2:
        raise UserError(f"the peers take augmentation.num_views 2, not {config.augmentation.num_views}")
    if config.optimization.optimizer != "sgd":
        raise UserError(f"the peers train with optimization.optimizer sgd, not {config.optimization.optimizer}")
    images = open_labelled(stage)
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.model.backbone, config.model.stem, config.data.image_size)
    peer = build_peer(
        cast(PeerName, stage.name),
        backbone,
        feature_dim=backbone.feature_dim,
        embedding_dim=config.model.embedding_dim,
        temperature=config.classifier.temperature,
        queue=config.classifier.num_sampled_classes,
        num_instances=len(stage.source),
    ).to(stage.world.device)
    points: list[dict[str, float]] = []
    seconds, first, epochs = 0.0, list[float](), _epochs(stage, peer)
    peak = peak_bytes(lambda: first.append(next(epochs)), stage.world.device)  # before an evaluation raises it
    for epoch, spent in enumerate(itertools.chain(first, epochs), start=1):
        seconds += spent
        if _is_point(stage, epoch):
            points.append(_point(stage, images, _frozen(stage, backbone, epoch), epoch, seconds))
    return _record(stage, points, peak / 2**20)


def run_training(stage: Stage) -> dict[str, Any]:
    """Runs this project's training and adds its peak memory to the figures."""
    figures: dict[str, Any] = {}
    peak = peak_bytes(lambda: figures.update(pretrain.run(stage)), stage.world.device)
    return {**figures, "training_peak_mib": peak / 2**20}


def run_own(stage: Stage) -> dict[str, Any]:
    """Returns the same curve from this run's kept checkpoints, with the seconds of initialisation and training.

    Raises:
        UserError: the run has not been trained, or has kept no checkpoints.
    """
    seconds_at = _training_seconds(stage)
    images = open_labelled(stage)
    points = []
    for checkpoint in intact_checkpoints(stage.checkpoints_of(_TRAINING), stage.world):
        position = checkpoint.position
        if position.step not in seconds_at:  # saved at a stop, between two lines of the log
            continue
        representation = represent_checkpoint(stage, checkpoint)
        points.append(_point(stage, images, representation, position.epoch, seconds_at[position.step]))
    if not points:
        raise UserError(f"{stage.checkpoints_of(_TRAINING)} holds no checkpoints: run the stage {_TRAINING} first")
    return _record(stage, points, _number_in(stage.run_directory / _TRAINING / "result.json", "training_peak_mib"))


def _number_in(path: Path, key: str) -> float:
    value = (read_json(path) or {}).get(key)
    if not isinstance(value, int | float):
        raise UserError(f"{path} holds no {key}: run its stage again")
    return value


def _epochs(stage: Stage, peer: Peer) -> Iterator[float]:
    """Trains epoch by epoch and yields the seconds of each."""
    config, optimization = stage.config, stage.config.optimization
    batch_size = optimization.global_batch_size
    sampler = GlobalBatchSampler(len(stage.source), batch_size, batch_size, 0, 1, config.seed)
    loader = view_loader(training_views(config, stage.source), sampler, config.data.num_workers)
    parameters = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, lr=1.0, momentum=optimization.momentum, weight_decay=optimization.weight_decay
    )
    steps = sampler.steps_per_epoch
    with stage.log.progress("train", optimization.epochs * steps, "steps") as progress:
        for epoch in range(optimization.epochs):
            sampler.epoch = epoch
            peer.train()
            began = time.perf_counter()
            for step, batch in enumerate(loader, start=epoch * steps):
                optimizer.param_groups[0]["lr"] = warmup_cosine(
                    step,
                    peak=optimization.peak_learning_rate,
                    warmup_steps=optimization.warmup_epochs * steps,
                    total_steps=optimization.epochs * steps,
                )
                loss = _step(stage, peer, optimizer, batch)
                progress.advance(note=f"loss {loss:.3f}")
                stage.guard.check()
            seconds = time.perf_counter() - began
            stage.log.metrics(
                (epoch + 1) * steps,
                {"train/loss": loss, "speed/images_per_second": steps * batch_size / seconds},
            )
            yield seconds


def _step(stage: Stage, peer: Peer, optimizer: torch.optim.Optimizer, batch: ViewBatch) -> float:
    images, ids = flatten_views(batch, stage.world.device)
    with stage.autocast():
        loss = peer(images.unflatten(0, (-1, len(batch.ids))).transpose(0, 1), ids[: len(batch.ids)])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    peer.after_step()
    return loss.item()


def _frozen(stage: Stage, backbone: Backbone, epoch: int) -> Representation:
    def features(images: Tensor) -> Tensor:
        with stage.autocast(), evaluation_mode(backbone):
            return backbone(images)

    return Representation("trained", features, backbone.feature_dim, None, epoch, "backbone output")


def _is_point(stage: Stage, epoch: int) -> bool:
    every = stage.config.checkpoint.keep_every_epochs
    return epoch == stage.config.optimization.epochs or (every is not None and epoch % every == 0)


def _point(
    stage: Stage, images: LabelledImages, representation: Representation, epoch: int, seconds: float
) -> dict[str, float]:
    """Measures k-NN and linear accuracy in per cent after `epoch` epochs and `seconds` of training."""
    knn, linear = stage.config.evaluation.knn, stage.config.evaluation.linear
    train_nF = cached_features(stage, representation, images.train, f"epoch {epoch}: train features")
    test_mF = cached_features(stage, representation, images.test, f"epoch {epoch}: test features")
    votes = vote(stage, images, train_nF, test_mF, knn, f"epoch {epoch}: k-NN")
    probe = probe_cached_features(
        train_nF,
        own_part(stage, images.train_labels),
        test_mF,
        own_part(stage, images.test_labels),
        stage.world,
        num_classes=images.num_classes,
        l2_penalties=linear.l2_penalties,
        seed=stage.config.seed,
        on_evaluation=stage.check_together,
    )
    knn_top1 = votes[knn.neighbours[0], knn.temperatures[0]]["top1"]
    stage.log.say(f"epoch {epoch}, {seconds:.1f} s: k-NN {knn_top1:.2f} %, linear {probe['top1']:.2f} %")
    return {"epoch": epoch, "seconds": seconds, "knn_top1": knn_top1, "linear_top1": probe["top1"]}


def _record(stage: Stage, points: list[dict[str, float]], peak_mib: float) -> dict[str, Any]:
    """Returns the curve, its last point, and time and memory of the training."""
    last, optimization = points[-1], stage.config.optimization
    steps = optimization.epochs * (len(stage.source) // optimization.global_batch_size)
    return {
        "layer": "backbone output",
        "epochs": optimization.epochs,
        "knn_top1": last["knn_top1"],
        "linear_top1": last["linear_top1"],
        "training_seconds": last["seconds"],
        "training_images_per_second": steps * optimization.global_batch_size / last["seconds"],
        "training_peak_mib": peak_mib,
        "curve": points,
    }


def _training_seconds(stage: Stage) -> dict[int, float]:
    """Maps steps to seconds of initialisation and training, from the logs of both.

    The training logs images per second since the previous line, over everything in between.
    """
    initialisation = stage.run_directory / _INITIALISATION / "result.json"
    metrics = stage.run_directory / _TRAINING / "metrics.jsonl"
    for path in (initialisation, metrics, stage.run_directory / _TRAINING / "result.json"):
        if not path.exists():
            raise UserError(f"{path} does not exist: run the stages {_INITIALISATION} and {_TRAINING} first")
    total, before, at = _number_in(initialisation, "seconds"), 0, {}
    for line in read_json_lines(metrics)[0]:
        if not line.keys() >= {"step", "speed/images_per_second"}:
            continue
        images = (line["step"] - before) * stage.config.optimization.global_batch_size
        total, before = total + images / line["speed/images_per_second"], line["step"]
        at[line["step"]] = total
    return at
