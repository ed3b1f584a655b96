"""Stage: fine-tuning on a small share of the training labels, and the supervised baseline on the same images."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from instance_ssl.evaluation.fine_tuning import TrainingOptions
from instance_ssl.evaluation.frozen_encoder import LabelledImages, load_backbone, open_labelled, title_of
from instance_ssl.evaluation.label_lists import draw_balanced, read_label_list, write_label_list
from instance_ssl.evaluation.labelled_training import (
    LAYERS,
    describe_images,
    fine_tune_once,
    tunable_sources,
    whole_sets,
)
from instance_ssl.evaluation.workload import Workload
from instance_ssl.run.stage import Stage


def run(stage: Stage) -> dict[str, Any]:
    """Returns top-1 and top-5 of every source and fraction of the labels; `random` is trained from scratch."""
    images = open_labelled(stage)
    semi_supervised = stage.config.evaluation.semi_supervised
    sources = tunable_sources(stage)
    labelled = [_labelled_ids(stage, images, place) for place in range(len(semi_supervised.fractions))]
    whole, test = whole_sets(images)
    trainings = [
        _options(stage, source, place, len(ids)).steps for source in sources for place, (ids, _) in enumerate(labelled)
    ]
    workload = Workload(stage.log.say, f"semi-supervised ({', '.join(sources)})", trainings)
    results: dict[str, Any] = {}
    for source in sources:
        encoder, epoch = load_backbone(stage, source)
        rows = []
        for place, (fraction, (ids, list_file)) in enumerate(zip(semi_supervised.fractions, labelled, strict=True)):
            title = f"{100 * fraction:g} % of the labels, {title_of(stage, source)}"
            options = _options(stage, source, place, len(ids))
            tag = f"semi_supervised/{source}_{fraction:g}"
            figures = fine_tune_once(stage, workload, encoder, options, title, tag, replace(whole, ids=ids), test)
            rows.append({"fraction": fraction, "labels": list_file, **figures, "recipe": asdict(options)})
            stage.log.say(f"{title} ({len(ids)} images): {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %")
            stage.log.metrics(epoch or 0, {f"{tag}_top1": figures["top1"]})
        results[source] = {"layer": LAYERS, "epoch": epoch, "fractions": rows}
    return {"figures": results, "evaluated_on": describe_images(stage, images)}


def _labelled_ids(stage: Stage, images: LabelledImages, place: int) -> tuple[Tensor, str]:
    """The labelled images of one fraction, and the file that lists them. Collective.

    Raises:
        UserError: when a list that was given does not fit the images.
    """
    semi_supervised = stage.config.evaluation.semi_supervised
    fraction, names = semi_supervised.fractions[place], images.train.names

    def find() -> tuple[Tensor, str]:
        if semi_supervised.list_files is not None:
            path = semi_supervised.list_files[place]
            return read_label_list(path, names), str(path)
        # Rounded down, as SimCLR's 12,811 and 128,116 of 1,281,167 are; one of each class at least.
        count = max(images.num_classes, math.floor(fraction * len(names) + 1e-9))
        ids = draw_balanced(images.train_labels.cpu(), min(count, len(names)), stage.config.seed)
        drawn = Path(stage.directory.name) / f"labels_{fraction:g}.txt"
        write_label_list(stage.run_directory / drawn, names, ids)
        return ids, str(drawn)

    return stage.on_rank_0(find)


def _options(stage: Stage, source: str, place: int, num_images: int) -> TrainingOptions:
    section = stage.config.evaluation.semi_supervised
    rates, epochs = (section.backbone_learning_rate, section.classifier_learning_rates[place]), section.epochs
    if source == "random":
        rates, epochs = (section.random_learning_rate, section.random_learning_rate), section.random_epochs or epochs
    return TrainingOptions(
        epochs * math.ceil(num_images / section.global_batch_size),
        *rates,
        global_batch_size=section.global_batch_size,
        schedule="milestones",
        milestones=tuple(round(share * epochs) for share in section.milestones),
        decay_factor=section.decay_factor,
        weight_decay=section.weight_decay,
    )
