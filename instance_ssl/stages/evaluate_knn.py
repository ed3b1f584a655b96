"""Stage: weighted k-nearest-neighbour accuracy of each source, a picture of neighbours, and a sample for a map."""

from pathlib import Path
from typing import Any

from torch import Tensor

from instance_ssl.checkpoint.directory import replace_file
from instance_ssl.evaluation.embedding_map import evenly_spaced, principal_components
from instance_ssl.evaluation.frozen_encoder import (
    LabelledImages,
    cached_features,
    embeddings_of,
    open_labelled,
    represent,
    title_of,
    vote,
)
from instance_ssl.evaluation.knn import ShardedBank
from instance_ssl.evaluation.neighbour_picture import NeighbourRow, draw_neighbours
from instance_ssl.run.stage import Stage

_PICTURE_QUERIES = 12
_PICTURE_NEIGHBOURS = 6
# The map's limits: test images, floats that their features may take, and principal components kept.
_MAP_IMAGES, _MAP_FLOATS, _MAP_COMPONENTS = 1000, 20_000_000, 50


def run(stage: Stage) -> dict[str, Any]:
    """Returns the accuracies over a grid of k and temperature for every source, on features and on embeddings."""
    images = open_labelled(stage)
    results: dict[str, Any] = {}
    neighbour_ids: dict[str, list[list[int]]] = {}
    samples: dict[str, dict[str, Tensor]] = {}  # principal components of some test images, for a map
    query_ids = evenly_spaced(len(images.test), _PICTURE_QUERIES)
    for source in stage.config.evaluation.sources:
        representation = represent(stage, source)
        title = title_of(stage, source)
        train_nF = cached_features(stage, representation, images.train, f"{title}: train features")
        test_mF = cached_features(stage, representation, images.test, f"{title}: test features")
        figures = {**_vote(stage, images, train_nF, test_mF), **representation.record}
        train_nD, test_mD = (embeddings_of(stage, representation, features) for features in (train_nF, test_mF))
        if train_nD is not None and test_mD is not None:
            votes = _vote(stage, images, train_nD, test_mD)
            figures["embeddings"] = {**votes, "layer": "projection output", "epoch": representation.epoch}
        results[source] = figures
        queries_qF, k = _rows_of_all(stage, test_mF, query_ids), min(_PICTURE_NEIGHBOURS, len(images.train))
        neighbour_ids[title] = ShardedBank(train_nF, stage.world).search(queries_qF, k)[1].tolist()
        ids = evenly_spaced(len(images.test), min(_MAP_IMAGES, max(2, _MAP_FLOATS // test_mF.shape[1])))
        components = principal_components(_rows_of_all(stage, test_mF, ids), _MAP_COMPONENTS)
        samples[source] = {"ids": ids, "components": components.cpu()}
        _tell(stage, source, results[source])
    picture = stage.directory / "neighbours.png"

    def write() -> None:
        _draw(picture, images, query_ids.tolist(), neighbour_ids)
        labels = {"labels": images.test_labels.cpu(), "class_names": images.test.class_names}
        replace_file(stage.directory / "map.pt", {"sources": samples, **labels})

    stage.on_rank_0(write)
    return {"figures": results, "picture": str(picture.relative_to(stage.run_directory))}


def _vote(stage: Stage, images: LabelledImages, train_nF: Tensor, test_mF: Tensor) -> dict[str, Any]:
    """The grid's first pair as the headline, and the whole grid."""
    accuracies = vote(stage, images, train_nF, test_mF, stage.config.evaluation.knn, "k-NN")
    grid = [{"k": k, "temperature": t, **figures} for (k, t), figures in accuracies.items()]
    return {**grid[0], "grid": grid}  # fixed beforehand: the best of the grid would be chosen on the test set


def _tell(stage: Stage, source: str, figures: dict[str, Any]) -> None:
    embeddings = figures.get("embeddings")
    beside = f", embeddings {embeddings['top1']:.2f} %" if embeddings else ""
    setting = f"k = {figures['k']}, T = {figures['temperature']}"
    stage.log.say(f"k-NN, {title_of(stage, source)}: {figures['top1']:.2f} %{beside} ({setting})")
    metrics = {f"knn/{source}_top1": figures["top1"]}
    if embeddings:
        metrics[f"knn/{source}_embeddings_top1"] = embeddings["top1"]
    stage.log.metrics(figures["epoch"] or 0, metrics)


def _rows_of_all(stage: Stage, features_nF: Tensor, ids: Tensor) -> Tensor:
    """Gathers the rows `ids` of features that are sharded over the ranks."""
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
            title: [(images.train.load(i), bool(images.train_labels[i] == label)) for i in ids[place]]
            for title, ids in neighbour_ids.items()
        }
        rows.append(NeighbourRow(images.test.load(query), neighbours))
    draw_neighbours(path, rows)
