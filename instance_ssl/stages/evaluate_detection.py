"""Stage: detection on PASCAL VOC, every source's backbone fine-tuned in Faster R-CNN."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from instance_ssl.checkpoint.directory import replace_file
from instance_ssl.config.detection import DetectionConfig
from instance_ssl.data.folders import missing_here
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError
from instance_ssl.evaluation.cached_training import read_state
from instance_ssl.evaluation.detection.batches import DetectionBatch, Resizing, single_images, training_batches
from instance_ssl.evaluation.detection.detector import Detector
from instance_ssl.evaluation.detection.metrics import Detections, require_coco
from instance_ssl.evaluation.detection.training import (
    DetectorTraining,
    detect,
    detection_figures,
    gather_detections,
    learning_rate,
)
from instance_ssl.evaluation.detection.voc import VocImages, open_voc
from instance_ssl.evaluation.features import state_digest
from instance_ssl.evaluation.frozen_encoder import evaluation_data, load_backbone, stoppable_progress, title_of
from instance_ssl.evaluation.workload import Workload
from instance_ssl.models.backbones import ResNet, is_library_network
from instance_ssl.run.images import rendering_of
from instance_ssl.run.stage import Stage
from instance_ssl.run.watchdog import Stopped

_RECIPE = {
    "detector": "Faster R-CNN C4, batch norm after res5 (Res5ROIHeadsExtraNorm), all layers tuned, float32",
    "batch_norm": "synchronised over ranks",
    "AP": "VOC2007's 11 points, difficult ignored, mean over IoU 0.50:0.95 (detectron2's PascalVOCDetectionEvaluator)",
}


def run(stage: Stage) -> dict[str, Any]:
    """Returns AP, AP50 and AP75 of every source, and COCO's metrics."""
    detection, sources = stage.config.evaluation.detection, stage.config.evaluation.sources
    _refuse(stage)
    train, test = (_open(stage, lists) for lists in (detection.train, detection.test))
    stage.log.say(f"detection: {len(train)} training images, {len(test)} test images")
    results = {}
    for source in sources:
        load_backbone(stage, source)  # a missing one fails before hours of training
    workload = Workload(stage.log.say, f"detection ({', '.join(sources)})", [detection.iterations] * len(sources))
    for source in sources:
        training, epoch, digest = _build(stage, source)
        with workload.training(detection.iterations):
            loss = _train(stage, source, training, train, _bound(stage, source, digest, train), workload)
        found = _detect(stage, source, training.model, test)
        figures = detection_figures(found, test.annotations, len(detection.classes), stage.world)
        results[source] = {**figures, "train_loss": loss, "epoch": epoch, "backbone": digest}
        coco = {f"coco_{name}": value for name, value in figures["coco"].items()}
        headline = {name: figures[name] for name in ("AP", "AP50", "AP75")}
        stage.log.say(
            f"detection, {title_of(stage, source)}: " + ", ".join(f"{k} {v:.2f}" for k, v in headline.items())
        )
        logged = {f"detection/{source}_{name}": value for name, value in {**headline, **coco}.items()}
        stage.log.metrics(detection.iterations, logged)
    recipe = {**_RECIPE, **_settings(detection), "train_images": len(train), "test_images": len(test)}
    return {"protocol": "detection", "recipe": recipe, "figures": results}


def _refuse(stage: Stage) -> None:
    """Checks the configuration before any work.

    Raises:
        UserError: naming the key.
    """
    stage.together(require_coco)
    detection = stage.config.evaluation.detection
    if "pixels" in stage.config.evaluation.sources:
        raise UserError("evaluation.sources: pixels have no network to detect with; take random, trained or weights")
    backbone = stage.config.model.backbone
    if backbone == "small_cnn" or is_library_network(backbone):
        raise UserError(f"model.backbone {backbone} has no layer4 to detect with; take resnet18, 34, 50 or 101")
    if detection.batch_size < stage.world.size:
        raise UserError(
            f"evaluation.detection.batch_size {detection.batch_size} is less than one image for each of "
            f"{stage.world.size} ranks"
        )


def _open(stage: Stage, lists: Sequence[str]) -> VocImages:
    """Opens the images of some lists: rank 0 reads the lists for all ranks. Collective."""
    detection = stage.config.evaluation.detection
    rendering = rendering_of(evaluation_data(stage))
    data = stage.on_rank_0(lambda: open_voc(detection.root, lists, detection.classes, rendering))

    def check() -> None:
        if (problem := missing_here(data.images.probes())) is not None:
            raise UserError(f"evaluation.detection.root: rank {stage.world.rank}: {problem}")

    stage.together(check)
    return data


def _build(stage: Stage, source: str) -> tuple[DetectorTraining, int | None, str]:
    """Builds a detector on the source's backbone; returns it, the backbone's epochs and the digest of its state."""
    detection = stage.config.evaluation.detection
    encoder, epoch = load_backbone(stage, source)
    backbone = encoder.backbone
    assert isinstance(backbone, ResNet)
    digest = state_digest(backbone)
    torch.manual_seed(stage.config.seed)  # the new layers are the same whatever the source
    model = Detector(
        backbone,
        len(detection.classes),
        regions_per_image=detection.regions_per_image,
        test_proposals=detection.test_proposals,
    )
    return DetectorTraining(model, detection, stage.world), epoch, digest


def _train(
    stage: Stage, source: str, training: DetectorTraining, data: VocImages, bound: str, workload: Workload
) -> float | None:
    """Trains, or resumes from the last state; returns the mean loss of the last iterations, None without any."""
    detection = stage.config.evaluation.detection
    path = stage.directory / f"detector_{source}.pth"
    state = read_state(stage, path)
    if state is not None and state.get("bound") == bound:
        training.load_state(state)
        stage.log.say(f"detection resumes at iteration {training.iteration}")
    elif state is not None:
        stage.log.say(f"{path.name} is of another backbone, recipe or images: training starts again")
    workload.advance(training.iteration, done_before=True)

    def save() -> None:
        stage.on_rank_0(lambda: replace_file(path, {**training.state(), "bound": bound}))

    recent, title = [], f"{title_of(stage, source)}: detector"
    left = range(training.iteration, detection.iterations)
    with stage.log.progress(title, detection.iterations, "steps", initial=training.iteration) as bar:
        for batch in _batches(stage, data, left):
            figures = training.step(batch)
            recent.append(figures["loss"])
            bar.advance(note=f"loss {figures['loss']:.3f}")
            workload.advance()
            done = training.iteration
            if done % stage.config.log.every_steps == 0 or done == detection.iterations:
                figures["rate"] = learning_rate(detection, done - 1)
                named = {f"detection/{source}_{name}": value for name, value in figures.items()}
                stage.log.metrics(done, named)
            try:
                stage.check_together()
            except Stopped:
                save()
                raise
            if done % detection.save_every == 0 or done == detection.iterations:
                save()
    if detection.statistics_iterations:
        # The batches that would come next, which the training has not seen in this shape.
        coming = range(detection.iterations, detection.iterations + detection.statistics_iterations)
        training.recompute_statistics(_batches(stage, data, coming), stage.check_together)
    last = recent[-stage.config.log.every_steps :]
    return sum(last) / len(last) if last else None


def _batches(stage: Stage, data: VocImages, iterations: range) -> Iterator[DetectionBatch]:
    detection = stage.config.evaluation.detection
    return training_batches(
        data,
        Resizing(detection.train_short_sides, detection.max_long_side, flip=True),
        evaluation_data(stage).num_workers,
        seed=stage.config.seed,
        batch_size=detection.batch_size,
        iterations=iterations,
        rank=stage.world.rank,
        world_size=stage.world.size,
    )


def _detect(stage: Stage, source: str, model: Detector, data: VocImages) -> list[Detections]:
    """Detections in all test images, divided over the ranks."""
    detection = stage.config.evaluation.detection
    indices = range(*Partition(len(data), stage.world.size).bounds(stage.world.rank))
    resizing = Resizing((detection.test_short_side,), detection.max_long_side, flip=False)
    images = single_images(data, resizing, evaluation_data(stage).num_workers, indices)
    title, annotations = f"{title_of(stage, source)}: detections", [data.annotations[i] for i in indices]
    with stoppable_progress(stage, title, len(data), "images", in_step=False) as advance:
        own = detect(model, images, annotations, stage.world.device, lambda: advance(1))
    return gather_detections(own, stage.world)


def _settings(detection: DetectionConfig) -> dict[str, Any]:
    return detection.model_dump(mode="json", exclude={"save_every"})


def _bound(stage: Stage, source: str, digest: str, data: VocImages) -> str:
    """Identifies the training that a saved state belongs to; only that one resumes from it."""
    settings = _settings(stage.config.evaluation.detection)
    for free in ("root", "test", "test_short_side", "test_proposals", "statistics_iterations"):
        del settings[free]
    parts = {"source": source, "backbone": digest, "images": data.images.digest, "seed": stage.config.seed}
    return json.dumps({**parts, **settings}, sort_keys=True)
