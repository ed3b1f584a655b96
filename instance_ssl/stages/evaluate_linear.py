"""Stage: linear classification on frozen features of each source, by the paper's protocol or on cached features."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from instance_ssl.data.augmentations import centre_view, probe_view
from instance_ssl.data.loaders import Batch, PartLoader
from instance_ssl.data.sampler import epoch_order
from instance_ssl.evaluation.cached_training import train_or_find
from instance_ssl.evaluation.epoch_log import Progress
from instance_ssl.evaluation.features import state_digest
from instance_ssl.evaluation.frozen_encoder import (
    TITLES,
    LabelledImages,
    Representation,
    cached_features,
    evaluation_data,
    labels_of_own_part,
    open_labelled,
    own_batches,
    represent,
)
from instance_ssl.evaluation.linear import probe_cached_features, train_linear_classifier
from instance_ssl.evaluation.workload import Workload
from instance_ssl.run.build import own_parts
from instance_ssl.run.stage import Stage


def run(stage: Stage) -> dict[str, Any]:
    """Top-1 and top-5 of every source; the encoder is bit-equal afterwards, and that is checked."""
    images = open_labelled(stage)
    linear, sources = stage.config.evaluation.linear, stage.config.evaluation.sources
    workload = None
    if linear.protocol == "sgd":
        trainings = [linear.epochs * _steps_per_epoch(stage, images)] * len(sources)
        workload = Workload(stage.log.say, f"linear evaluation ({', '.join(sources)})", trainings)
    results = {}
    for source in sources:
        representation = represent(stage, source)
        before = None if representation.encoder is None else state_digest(representation.encoder)
        if workload is None:
            figures = _probe_cached(stage, representation, images)
        else:
            figures = _train(stage, representation, images, workload)
        if representation.encoder is not None and state_digest(representation.encoder) != before:
            raise RuntimeError("the frozen encoder has changed during linear evaluation")
        results[source] = {
            **figures, "layer": representation.layer, "epoch": representation.epoch, "origin": representation.origin
        }  # fmt: skip
        stage.log.say(f"linear ({linear.protocol}), {TITLES[source]}: {figures['top1']:.2f} %")
        stage.log.metrics(representation.epoch or 0, {f"linear/{source}_top1": figures["top1"]})
    return {"protocol": linear.protocol, "figures": results}


def _probe_cached(stage: Stage, representation: Representation, images: LabelledImages) -> dict[str, float]:
    title = TITLES[representation.source]
    return probe_cached_features(
        cached_features(stage, representation, images.train, f"{title}: train features"),
        labels_of_own_part(stage, images.train_labels),
        cached_features(stage, representation, images.test, f"{title}: test features"),
        labels_of_own_part(stage, images.test_labels),
        stage.world,
        num_classes=images.num_classes,
        l2_penalties=stage.config.evaluation.linear.l2_penalties,
        seed=stage.config.seed,
        on_evaluation=stage.check_together,
    )


def _steps_per_epoch(stage: Stage, images: LabelledImages) -> int:
    return math.ceil(len(images.train) / stage.config.evaluation.linear.global_batch_size)


def _train(
    stage: Stage, representation: Representation, images: LabelledImages, workload: Workload
) -> dict[str, float]:
    linear, data, seed = stage.config.evaluation.linear, evaluation_data(stage), stage.config.seed
    steps_per_epoch = _steps_per_epoch(stage, images)
    loader = PartLoader(
        images.train,
        probe_view(data.image_size),
        data.num_workers,
        seed=seed,
        max_batch_size=stage.config.evaluation.batch_size,
    )

    def train_parts(epoch: int) -> Iterator[Iterator[Batch]]:
        order = epoch_order(len(images.train), seed, epoch)
        for part in loader.epoch(epoch, own_parts(order, linear.global_batch_size, stage.world)):
            stage.guard.check()
            yield part
            workload.advance()

    def test_batches() -> Iterator[Batch]:
        for batch in own_batches(stage, images.test, centre_view(data.image_size)):
            stage.guard.check()
            yield batch

    title = f"{TITLES[representation.source]}: linear classifier"
    decisive = {
        "encoder": representation.source if representation.encoder is None else state_digest(representation.encoder),
        "recipe": [linear.epochs, linear.global_batch_size, linear.learning_rate],
        "images": [images.train.digest, images.test.digest, data.image_size],
        "labels": images.label_digest,
        "seed": seed,
        "precision": str(stage.ds.autocast_dtype),
    }

    def train(state: dict[str, Any] | None, offer: Callable[[Progress], None]) -> dict[str, Any]:
        epochs_done = state["epochs"] if state else 0
        workload.advance(epochs_done * steps_per_epoch, done_before=True)
        with stage.log.progress(title, linear.epochs, "epochs", initial=epochs_done) as progress:

            def on_epoch(done: Progress) -> None:
                stage.log.metrics(done.epochs, {f"linear/{representation.source}_train_loss": done.train_loss})
                offer(done)
                progress.advance(note=f"loss {done.train_loss:.3f}")

            return train_linear_classifier(
                representation.features,
                train_parts,
                test_batches,
                stage.world,
                feature_dim=representation.feature_dim,
                num_classes=images.num_classes,
                labels=images.train_labels,
                test_labels=images.test_labels,
                steps_per_epoch=steps_per_epoch,
                epochs=linear.epochs,
                learning_rate=linear.learning_rate,
                global_batch_size=linear.global_batch_size,
                seed=seed,
                state=state,
                on_epoch=on_epoch,
            )

    with workload.training(linear.epochs * steps_per_epoch):
        return train_or_find(stage, title, decisive, train)
