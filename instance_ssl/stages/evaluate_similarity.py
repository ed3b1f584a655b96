"""Stage: Figure 4, the intra- and inter-instance cosines of every initialisation of the classifier."""

import math
from typing import Any

import torch
from torch import Tensor

from instance_ssl.classifier.prior import initialize_gaussian
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.choices import InitializationMode
from instance_ssl.data.augmentations import centre_view
from instance_ssl.evaluation.prior_embeddings import prior_rows
from instance_ssl.evaluation.similarity import draw_similarities, instance_similarities
from instance_ssl.run.build import moving_statistics, training_view
from instance_ssl.run.given_weights import initial_encoder
from instance_ssl.run.stage import Stage


def run(stage: Stage) -> dict[str, Any]:
    """Returns the cosines by mode, over all images or a seeded sample of them; needs no checkpoint."""
    settings, total = stage.config.evaluation.similarity, len(stage.source)
    generator = torch.Generator().manual_seed(stage.config.seed)
    ids_N = torch.randperm(total, generator=generator)[: settings.num_images].sort().values
    results: dict[str, dict[str, float]] = {}
    for mode in settings.modes:
        results[mode] = _measure(stage, mode, ids_N)
        stage.log.say(
            f"similarity, {mode}: own class {results[mode]['intra_class']:.4f}, others "
            f"{results[mode]['inter_class']:.4f}, gap {results[mode]['class_gap']:.4f}; views "
            f"{results[mode]['intra_view']:.4f} and {results[mode]['inter_view']:.4f}"
        )
        stage.log.metrics(0, {f"similarity/{mode}_{name}": results[mode][name] for name in ("class_gap", "view_gap")})
    record = {
        "layer": "projection output",
        "views": settings.num_views,
        "sample": "all images" if len(ids_N) == total else f"{len(ids_N)} of {total} images, seed {stage.config.seed}",
        "figures": results,
    }
    picture = stage.directory / "similarity.png"
    if stage.world.rank == 0:
        draw_similarities(picture, results)
    return {**record, "picture": str(picture.relative_to(stage.run_directory))}


def _measure(stage: Stage, mode: InitializationMode, ids_N: Tensor) -> dict[str, float]:
    """Compares rows of W, made of the deterministic view as in the initialisation, with random views as in training.

    The views' pass continues the statistics of the rows' pass. With Gaussian rows the network is in training mode:
    batch statistics.
    """
    config, classifier, width = stage.config, stage.config.classifier, stage.config.model.embedding_dim
    encoder, _ = initial_encoder(stage)
    moving = moving_statistics(encoder, config)
    if mode == "gaussian":
        options = SoftmaxOptions(classifier.temperature, classifier.loss_form, torch.float32)
        shard = ClassifierShard(len(ids_N), width, stage.world, options)
        initialize_gaussian(shard, config.seed)
        weights_nD = shard.weight
    else:
        view = centre_view(config.data.image_size)
        rows_n1D = prior_rows(
            stage, encoder, width, stage.source, ids_N, view, mode, label=f"{mode}: rows of W", moving=moving
        )
        weights_nD = rows_n1D[:, 0]
    view = training_view(config.augmentation, config.data)
    network_mode: InitializationMode = "batch" if mode == "gaussian" else mode
    num_batches = math.ceil(len(ids_N) / classifier.initialization_batch_size)
    views_nVD = prior_rows(
        stage, encoder, width, stage.source, ids_N, view, network_mode,
        label=f"{mode}: views", num_views=config.evaluation.similarity.num_views,
        batches_done=num_batches, moving=moving,
    )  # fmt: skip
    return instance_similarities(views_nVD, weights_nD, stage.world)
