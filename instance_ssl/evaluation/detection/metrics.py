"""Average precision of detections: PASCAL VOC's as in detectron2, and COCO's by pycocotools.

Boxes are (x1, y1, x2, y2) in pixels, continuous and 0-based: a box over the whole image is (0, 0, width, height).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from instance_ssl.errors import UserError
from instance_ssl.evaluation.detection.voc import Annotation

IOU_THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))

# The original's rounding: 0.1 · 3 exceeds 0.3 a little, so that 3 of 10 objects do not reach that recall.
_RECALL_POINTS = np.arange(0.0, 1.1, 0.1)


class Detections(NamedTuple):
    """Detections in one image: boxes (n, 4), scores (n,), classes (n,) from 0."""

    boxes_n4: Tensor
    scores_n: Tensor
    classes_n: Tensor


def voc_metrics(
    detections: Sequence[Detections], truth: Sequence[Annotation], num_classes: int, *, eleven_points: bool = True
) -> dict[str, float]:
    """PASCAL VOC's metrics as defined by detectron2's PascalVOCDetectionEvaluator.

    For each class and threshold t, the detections of all images are taken by descending score, each matched with the
    object of its class and image of highest IoU. With an IoU above t (not equal to it) the first detection of an object
    is a hit and every later one a miss; one of a `difficult` object is neither. Other detections are misses, including
    those whose best object is taken, whatever else they overlap. Recall counts objects that are not difficult. Boxes
    include both end pixels, as in voc_eval.py: a side is x2 - x1 + 1. AP is the mean of the highest precision at
    recall ≥ 0, 0.1, … 1 (VOC2007), or else the area under the precision's envelope (VOC2010 and later). A class without
    objects counts as 0. Scores are first rounded to 0.001 and boxes to 0.1 pixels, as in the files that detectron2
    writes; equal scores keep the order of the images.

    Source: detectron2, detectron2/evaluation/pascal_voc_evaluation.py (after py-faster-rcnn's voc_eval.py).

    Args:
        detections: of each image.
        truth: of the same images.
        eleven_points: VOC2007's AP, which goes with its test images; else the area.

    Returns:
        In per cent, mean over the classes: "AP" (mean over thresholds 0.50, 0.55, … 0.95), "AP50", "AP75".

    Raises:
        ValueError: when the two differ in their number of images.
    """
    if len(detections) != len(truth):
        raise ValueError(f"detections of {len(detections)} images, objects of {len(truth)}")
    table = np.array([_class_aps(detections, truth, label, eleven_points) for label in range(num_classes)])
    means = 100 * table.mean(axis=0)
    return {"AP": float(means.mean()), "AP50": float(means[0]), "AP75": float(means[5])}


def coco_metrics(detections: Sequence[Detections], truth: Sequence[Annotation]) -> dict[str, float]:
    """COCO's metrics by torchmetrics on pycocotools: at most 100 detections per image, 101 recall points.

    Difficult objects count as crowds, which COCO ignores. A class without objects is excluded from the mean. Small,
    medium and large areas are those of the original image.

    Returns:
        In per cent: "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100"; -100 where there
        is no object of that kind (pycocotools).

    Raises:
        UserError: when torchmetrics or pycocotools is not installed.
    """
    require_coco()
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(
        backend="pycocotools",
        # pycocotools' own; torchmetrics' are rounded to float32, which moves AP by up to 0.01 points.
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        sync_on_compute=False,  # called by one rank alone, it must not wait for others
    )
    metric.update(
        [{"boxes": d.boxes_n4, "scores": d.scores_n, "labels": d.classes_n} for d in detections],
        [{"boxes": t.boxes_m4, "labels": t.classes_m, "iscrowd": t.difficult_m.long()} for t in truth],
    )
    figures = metric.compute()
    names = {"map": "AP", "map_50": "AP50", "map_75": "AP75", "map_small": "AP_small", "map_medium": "AP_medium"}
    names |= {"map_large": "AP_large", "mar_1": "AR1", "mar_10": "AR10", "mar_100": "AR100"}
    return {name: 100 * float(figures[key]) for key, name in names.items()}


def require_coco() -> None:
    """Checks that COCO's metrics can be computed.

    Raises:
        UserError: when torchmetrics or pycocotools is not installed.
    """
    try:
        import pycocotools  # noqa: F401
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise UserError(f'detection needs {error.name}: pip install -e ".[detection]"') from None


def _class_aps(
    detections: Sequence[Detections], truth: Sequence[Annotation], label: int, eleven_points: bool
) -> list[float]:
    """AP of one class at each threshold, a fraction."""
    scores, overlaps, objects, difficult = [], [], [], []
    first, positives = 0, 0  # objects are numbered over all images
    for found, there in zip(detections, truth, strict=True):
        chosen = there.classes_m == label
        is_difficult = there.difficult_m[chosen].numpy()
        own = found.classes_n == label
        iou, best = _best_overlaps(found.boxes_n4[own], there.boxes_m4[chosen])
        scores.append(_rounded(found.scores_n[own], 3))
        overlaps.append(iou)
        objects.append(first + best)
        difficult.append(is_difficult[best] if len(is_difficult) else np.zeros(len(best), bool))
        first += len(is_difficult)
        positives += int((~is_difficult).sum())
    order = np.argsort(-np.concatenate(scores), kind="stable")
    iou, best, easy = (np.concatenate(part)[order] for part in (overlaps, objects, difficult))
    return [_ap(*_hits_and_misses(iou, best, easy, t), positives, eleven_points) for t in IOU_THRESHOLDS]


def _hits_and_misses(
    iou_n: np.ndarray, object_n: np.ndarray, difficult_n: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Which detections, in order of score, are hits and which are misses."""
    over_n = iou_n > threshold
    candidates = np.flatnonzero(over_n & ~difficult_n)
    hit_n = np.zeros(len(iou_n), bool)
    hit_n[candidates[np.unique(object_n[candidates], return_index=True)[1]]] = True  # the first of each object
    return hit_n, ~hit_n & ~(over_n & difficult_n)


def _ap(hit_n: np.ndarray, miss_n: np.ndarray, positives: int, eleven_points: bool) -> float:
    if positives == 0:
        return 0.0
    hits, misses = np.cumsum(hit_n), np.cumsum(miss_n)
    recall = hits / positives
    precision = hits / np.maximum(hits + misses, np.finfo(np.float64).eps)
    if eleven_points:
        return float(sum(max(precision[recall >= point], default=0.0) for point in _RECALL_POINTS) / 11)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def _best_overlaps(boxes_n4: Tensor, objects_m4: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Each box's highest IoU, 0 without objects, and the object that has it."""
    boxes = _rounded(boxes_n4 + torch.tensor([1.0, 1.0, 0.0, 0.0]), 1).reshape(-1, 1, 4)
    objects = (objects_m4.double() + torch.tensor([1.0, 1.0, 0.0, 0.0])).numpy().reshape(1, -1, 4)
    if objects.shape[1] == 0:
        return np.zeros(len(boxes)), np.zeros(len(boxes), np.int64)
    corners = np.minimum(boxes[..., 2:], objects[..., 2:]) - np.maximum(boxes[..., :2], objects[..., :2])
    common = np.maximum(corners + 1.0, 0.0).prod(axis=2)
    areas, object_areas = ((each[..., 2:] - each[..., :2] + 1.0).prod(axis=-1) for each in (boxes, objects))
    iou = common / (areas + object_areas - common)
    best = iou.argmax(axis=1)
    return iou[np.arange(len(boxes)), best], best


def _rounded(values: Tensor, digits: int) -> np.ndarray:
    """Rounds as Python does; numpy's rounding multiplies first and can differ in the last place."""
    flat = [round(value, digits) for value in values.flatten().tolist()]
    return np.array(flat, dtype=np.float64).reshape(tuple(values.shape))
