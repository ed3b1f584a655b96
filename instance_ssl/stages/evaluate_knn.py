"""Stage: weighted k-nearest-neighbour accuracy of each source, and a picture of nearest neighbours."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instance_ssl.evaluation.knn import knn_accuracy
from instance_ssl.evaluation.neighbours import NeighbourRow, draw_neighbours, nearest_neighbours
from instance_ssl.stages.context import Stage
from instance_ssl.stages.representation import (
    TITLES,
    LabelledImages,
    cached_features,
    labels_of_own_part,
    open_labelled,
    represent,
)

_PICTURE_QUERIES = 12
_PICTURE_NEIGHBOURS = 6


def run(stage: Stage) -> dict[str, Any]:
    """The whole grid of k and temperature for every source; the first pair is the headline."""
    images = open_labelled(stage)
    results: dict[str, Any] = {}
    neighbour_ids: dict[str, list[list[int]]] = {}
    query_ids = torch.linspace(0, len(images.test) - 1, _PICTURE_QUERIES).long().unique()
    for source in stage.config.evaluation.sources:
        representation = represent(stage, source)
        title = TITLES[source]
        train_nF = cached_features(stage, representation, images.train, f"{title}: train features")
        test_mF = cached_features(stage, representation, images.test, f"{title}: test features")
        accuracies = knn_accuracy(
            train_nF,
            labels_of_own_part(stage, images.train_labels),
            test_mF,
            labels_of_own_part(stage, images.test_labels),
            stage.world,
            neighbours=stage.config.evaluation.knn.neighbours,
            temperatures=stage.config.evaluation.knn.temperatures,
            num_classes=images.num_classes,
        )
        grid = [{"k": k, "temperature": t, **figures} for (k, t), figures in accuracies.items()]
        headline = grid[0]  # named beforehand: the best of the grid would be chosen on the test set
        results[source] = {
            **headline, "layer": representation.layer, "epoch": representation.epoch, "origin": representation.origin,
            "grid": grid,
        }  # fmt: skip
        neighbour_ids[source] = nearest_neighbours(
            train_nF, _rows_of_all(stage, test_mF, query_ids), stage.world, _PICTURE_NEIGHBOURS
        ).tolist()
        stage.log.say(f"k-NN, {title}: {headline['top1']:.2f} % (k = {headline['k']}, T = {headline['temperature']})")
        stage.log.metrics(representation.epoch or 0, {f"knn/{source}_top1": headline["top1"]})
    picture = stage.directory / "neighbours.png"
    if stage.world.rank == 0:
        _draw(picture, images, query_ids.tolist(), neighbour_ids)
    return {"figures": results, "picture": str(picture.relative_to(stage.run_directory))}


def _rows_of_all(stage: Stage, features_nF: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` of features that lie divided over the ranks, on every rank."""
    counts = stage.world.row_counts(len(features_nF))
    first = sum(counts[: stage.world.rank])
    rows = features_nF.new_zeros(len(ids), features_nF.shape[1])
    own = (ids >= first) & (ids < first + len(features_nF))
    rows[own] = features_nF[ids[own] - first]
    return stage.world.all_reduce_sum_(rows)


def _draw(path: Path, images: LabelledImages, query_ids: list[int], neighbour_ids: dict[str, list[list[int]]]) -> None:
    rows = []
    for place, query in enumerate(query_ids):
        label = images.test_labels[query]
        neighbours = {
            TITLES[source]: [(images.train.load(i), bool(images.train_labels[i] == label)) for i in ids[place]]
            for source, ids in neighbour_ids.items()
        }
        rows.append(NeighbourRow(images.test.load(query), neighbours))
    draw_neighbours(path, rows)
