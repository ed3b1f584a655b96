"""Stage: linear classification of each source's frozen features, by the paper's protocol or on cached features."""

import math
from functools import partial
from typing import Any

from instance_ssl.evaluation.features import state_digest
from instance_ssl.evaluation.frozen_encoder import (
    LabelledImages,
    Representation,
    cached_features,
    evaluation_data,
    open_labelled,
    own_part,
    represent,
    title_of,
)
from instance_ssl.evaluation.labelled_training import Training, train_once, whole_sets
from instance_ssl.evaluation.linear import probe_cached_features, train_linear_classifier
from instance_ssl.evaluation.workload import Workload
from instance_ssl.run.stage import Stage


def run(stage: Stage) -> dict[str, Any]:
    """Returns top-1 and top-5 of every source; checks that the encoder is bit-equal afterwards."""
    images = open_labelled(stage)
    linear, sources = stage.config.evaluation.linear, stage.config.evaluation.sources
    workload, steps = None, linear.epochs * math.ceil(len(images.train) / linear.global_batch_size)
    if linear.protocol == "sgd":
        workload = Workload(stage.log.say, f"linear evaluation ({', '.join(sources)})", [steps] * len(sources))
    results = {}
    for source in sources:
        representation = represent(stage, source)
        before = None if representation.encoder is None else state_digest(representation.encoder)
        if workload is None:
            figures = _probe_cached(stage, representation, images)
        else:
            figures = _train(stage, representation, images, steps, workload)
        if representation.encoder is not None and state_digest(representation.encoder) != before:
            raise RuntimeError("the frozen encoder has changed during linear evaluation")
        results[source] = {**figures, **representation.record}
        stage.log.say(f"linear ({linear.protocol}), {title_of(stage, source)}: {figures['top1']:.2f} %")
        stage.log.metrics(representation.epoch or 0, {f"linear/{source}_top1": figures["top1"]})
    return {"protocol": linear.protocol, "figures": results}


def _probe_cached(stage: Stage, representation: Representation, images: LabelledImages) -> dict[str, float]:
    title = title_of(stage, representation.source)
    return probe_cached_features(
        cached_features(stage, representation, images.train, f"{title}: train features"),
        own_part(stage, images.train_labels),
        cached_features(stage, representation, images.test, f"{title}: test features"),
        own_part(stage, images.test_labels),
        stage.world,
        num_classes=images.num_classes,
        l2_penalties=stage.config.evaluation.linear.l2_penalties,
        seed=stage.config.seed,
        on_evaluation=stage.check_together,
    )


def _train(
    stage: Stage, representation: Representation, images: LabelledImages, steps: int, workload: Workload
) -> dict[str, float]:
    linear, seed = stage.config.evaluation.linear, stage.config.seed
    source, encoder = representation.source, representation.encoder
    decisive = {
        "encoder": source if encoder is None else state_digest(encoder),
        "recipe": [linear.epochs, linear.global_batch_size, linear.learning_rate],
        "images": [images.train.digest, images.test.digest, evaluation_data(stage).image_size],
        "labels": images.label_digest,
        "seed": seed,
        "precision": str(stage.ds.autocast_dtype),
    }
    fit = partial(
        train_linear_classifier,
        representation.features,
        group=stage.world,
        feature_dim=representation.feature_dim,
        epochs=linear.epochs,
        learning_rate=linear.learning_rate,
        global_batch_size=linear.global_batch_size,
        seed=seed,
    )
    title, loss_tag = f"{title_of(stage, source)}: linear classifier", f"linear/{source}_train_loss"
    training = Training(title, loss_tag, *whole_sets(images), linear.global_batch_size, steps)
    return train_once(stage, training, decisive, fit, workload)
