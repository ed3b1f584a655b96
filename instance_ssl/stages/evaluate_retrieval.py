"""Stage: retrieval among the train images by each source, and by the random network with running batch norms."""

from typing import Any

import torch
from torch import Tensor

from instance_ssl.data.augmentations import centre_view
from instance_ssl.evaluation.frozen_encoder import (
    LabelledImages,
    Representation,
    cached_features,
    embeddings_of,
    open_labelled,
    own_part,
    represent,
    stoppable_progress,
    title_of,
)
from instance_ssl.evaluation.prior_embeddings import prior_rows
from instance_ssl.evaluation.retrieval import retrieval_recall
from instance_ssl.run.given_weights import initial_encoder
from instance_ssl.run.stage import Stage


def run(stage: Stage) -> dict[str, Any]:
    """Returns same-class top-1 and recall@k; `running_prior` is the paper's experiment, without any training."""
    images = open_labelled(stage)
    results = {"running_prior": _running_prior(stage, images)}
    _tell(stage, "random network, running batch norms", "running_prior", results["running_prior"])
    for source in stage.config.evaluation.sources:
        representation = represent(stage, source)
        features_nF = cached_features(stage, representation, images.train, f"{title_of(stage, source)}: train features")
        results[source] = _retrieve(stage, images, representation, features_nF)
        _tell(stage, title_of(stage, source), source, results[source])
    return {"images": "train, each excluded from its own ranking", "figures": results}


def _running_prior(stage: Stage, images: LabelledImages) -> dict[str, Any]:
    """Evaluates the features of the pass that initialises the classifier."""
    encoder, _ = initial_encoder(stage)
    ids, view = torch.arange(len(images.train)), centre_view(stage.config.data.image_size)
    width, label = encoder.feature_dim, "random network, running batch norms"
    features_nF = prior_rows(stage, encoder.backbone, width, images.train, ids, view, "running", label=label)[:, 0]
    representation = Representation("random", encoder.features, width, encoder, 0, "backbone output")
    return {**_retrieve(stage, images, representation, features_nF), "batch_norm": "running"}


def _retrieve(
    stage: Stage, images: LabelledImages, representation: Representation, features_nF: Tensor
) -> dict[str, Any]:
    """Recall of features and, where there is a projection, of embeddings."""

    def recall(rows: Tensor) -> dict[str, Any]:
        labels_n, recall_at = own_part(stage, images.train_labels), stage.config.evaluation.retrieval.recall_at
        with stoppable_progress(stage, "retrieval", len(images.train), "queries") as on_chunk:
            return retrieval_recall(rows, labels_n, stage.world, recall_at=recall_at, on_chunk=on_chunk)

    figures: dict[str, Any] = {**recall(features_nF), **representation.record}
    embeddings_nD = embeddings_of(stage, representation, features_nF)
    if embeddings_nD is not None:
        figures["embeddings"] = {**recall(embeddings_nD), **representation.record, "layer": "projection output"}
    return figures


def _tell(stage: Stage, title: str, source: str, figures: dict[str, Any]) -> None:
    stage.log.say(f"retrieval, {title}: same class {figures['top1']:.2f} % (chance {figures['chance_top1']:.2f} %)")
    stage.log.metrics(figures["epoch"] or 0, {f"retrieval/{source}_top1": figures["top1"]})
