"""Stage: fine-tuning on another data set, learning rate and weight decay chosen on held-out training images."""

from dataclasses import asdict, replace
from typing import Any

import torch

from instance_ssl.evaluation.epoch_log import DivergedError
from instance_ssl.evaluation.fine_tuning import TrainingOptions
from instance_ssl.evaluation.frozen_encoder import LabelledImages, load_backbone, open_labelled, title_of
from instance_ssl.evaluation.label_lists import draw_balanced
from instance_ssl.evaluation.labelled_training import (
    LAYERS,
    Subset,
    describe_images,
    fine_tune_once,
    tunable_sources,
    whole_sets,
)
from instance_ssl.evaluation.workload import Workload
from instance_ssl.models.encoder import Encoder
from instance_ssl.run.stage import Stage

# A training that sees each image more often than this suggests the preset for small sets.
_OFTEN = 500


def run(stage: Stage) -> dict[str, Any]:
    """Returns the test metrics of every source, at the learning rate and weight decay that did best when held out."""
    images = open_labelled(stage)
    fine_tune = stage.config.evaluation.fine_tune
    whole, test = whole_sets(images)
    fitted, held_out = _split(stage, images)
    grids = {source: _grid(stage, source) for source in tunable_sources(stage)}
    workload = _announce(stage, grids, len(fitted.ids))
    results: dict[str, Any] = {}
    for source, grid in grids.items():
        encoder, epoch = load_backbone(stage, source)
        record: dict[str, Any] = {"layer": LAYERS, "epoch": epoch}
        options = grid[0]
        if len(grid) > 1:
            points = _search(stage, workload, source, encoder, grid, fitted, held_out)
            options = grid[_best(points, fine_tune.metric)]
            record |= {"held_out_images": len(held_out.ids), "grid": points}
        title, tag = f"{title_of(stage, source)}: fine-tuning", f"fine_tune/{source}"
        figures = fine_tune_once(stage, workload, encoder, options, title, tag, whole, test)
        results[source] = {"metric": fine_tune.metric, **figures, **record, "recipe": asdict(options)}
        stage.log.say(f"fine-tuned, {title_of(stage, source)}: {fine_tune.metric} {figures[fine_tune.metric]:.2f} %")
        stage.log.metrics(epoch or 0, {f"{tag}_{fine_tune.metric}": figures[fine_tune.metric]})
    return {"figures": results, "evaluated_on": describe_images(stage, images)}


def _split(stage: Stage, images: LabelledImages) -> tuple[Subset, Subset]:
    """Splits off the held-out training images: the data set's own, or equally many of each class."""
    held_out = images.train.held_out
    if held_out is None:
        count = max(1, round(stage.config.evaluation.fine_tune.held_out_fraction * len(images.train)))
        held_out = draw_balanced(images.train_labels.cpu(), count, stage.config.seed)
    whole, _ = whole_sets(images)
    fitted = whole.ids[~torch.isin(whole.ids, held_out)]
    return replace(whole, ids=fitted), replace(whole, ids=held_out)


def _grid(stage: Stage, source: str) -> list[TrainingOptions]:
    """Pairs every learning rate with every weight decay, divided by the rate; other options are SimCLR's."""
    fine_tune = stage.config.evaluation.fine_tune
    steps, rates = fine_tune.steps, fine_tune.learning_rates
    if source == "random":
        steps, rates = fine_tune.random_steps, fine_tune.random_learning_rates
    size = fine_tune.global_batch_size
    return [
        TrainingOptions(steps, rate, rate, size, nesterov=True, weight_decay=decay / rate, batch_norm_rule=True)
        for rate in rates
        for decay in fine_tune.weight_decays
    ]


def _announce(stage: Stage, grids: dict[str, list[TrainingOptions]], num_images: int) -> Workload:
    """Logs how much there is to train, and the preset for small sets where each image would be seen often."""
    fine_tune = stage.config.evaluation.fine_tune
    trainings = []
    for grid in grids.values():
        trainings += [options.steps for options in grid] if len(grid) > 1 else []
        trainings.append(grid[0].steps)  # the best one, on all training images
    workload = Workload(stage.log.say, f"fine-tuning ({', '.join(grids)})", trainings)
    times = max(trainings) * fine_tune.global_batch_size // num_images
    if fine_tune.preset == "paper" and times > _OFTEN:
        stage.log.say(
            f"fine-tuning: a training sees each of the {num_images:,} images {times:,} times; "
            "--set evaluation.fine_tune.preset=small, for sets of this size, takes 4 short trainings a source"
        )
    return workload


def _search(
    stage: Stage, workload: Workload, source: str, encoder: Encoder, grid: list[TrainingOptions], *sets: Subset
) -> list[dict[str, Any]]:
    """Metrics of each point of the grid on the held-out images, None for a point that diverges."""
    points = []
    for place, options in enumerate(grid, start=1):
        rate, decay = options.backbone_learning_rate, options.weight_decay
        title = f"{title_of(stage, source)}: {place} of {len(grid)}, learning rate {rate:g}, weight decay {decay:g}"
        try:
            tag = f"fine_tune/{source}_grid_{place}"
            figures = fine_tune_once(stage, workload, encoder, options, title, tag, *sets)
        except DivergedError:
            stage.log.say(f"{title}: diverged")
            figures = {}
        held_out_figures = {f"held_out_{name}": figures.get(name) for name in ("top1", "mean_per_class")}
        points.append({"learning_rate": rate, "weight_decay": decay, **held_out_figures})
    return points


def _best(points: list[dict[str, Any]], metric: str) -> int:
    """Index of the best point, the first of equals.

    Raises:
        DivergedError: when every point diverged.
    """
    found = [point[f"held_out_{metric}"] for point in points]
    values = [-1.0 if value is None else value for value in found]
    if max(values) < 0:
        raise DivergedError(
            "fine-tuning diverged at every point of the grid: lower evaluation.fine_tune's learning rates"
        )
    return values.index(max(values))
