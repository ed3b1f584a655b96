"""VOC's AP against a direct computation written out here, and on boxes made by hand; COCO's against pycocotools."""

import contextlib
import io
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from instance_ssl.errors import UserError
from instance_ssl.evaluation.detection.metrics import (
    IOU_THRESHOLDS,
    Detections,
    coco_metrics,
    require_coco,
    voc_metrics,
)
from instance_ssl.evaluation.detection.voc import Annotation

Box = tuple[float, float, float, float]


def found(*rows: tuple[Box, float, int]) -> Detections:
    boxes, scores, classes = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(classes, dtype=torch.int64),
    )


def there(*rows: tuple[Box, int, bool]) -> Annotation:
    boxes, classes, difficult = zip(*rows, strict=True) if rows else ((), (), ())
    return Annotation(
        0,
        0,
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(classes, dtype=torch.int64),
        torch.tensor(difficult, dtype=torch.bool),
    )


def direct_ap(
    detections: list[Detections], truth: list[Annotation], label: int, threshold: float, eleven: bool
) -> float:
    """One detection after another, as in the text of the definition; a fraction."""
    rows = []
    for image, d in enumerate(detections):
        for box, score, kind in zip(d.boxes_n4.tolist(), d.scores_n.tolist(), d.classes_n.tolist(), strict=True):
            if kind == label:
                x1, y1, x2, y2 = (float(f"{value:.1f}") for value in (box[0] + 1, box[1] + 1, box[2], box[3]))
                rows.append((float(f"{score:.3f}"), image, (x1, y1, x2, y2)))
    rows.sort(key=lambda row: -row[0])
    taken: set[tuple[int, int]] = set()
    hits, misses, curve = 0, 0, []
    for _, image, (x1, y1, x2, y2) in rows:
        best, best_iou = -1, -1.0
        for number, (kind, (a1, b1, a2, b2)) in enumerate(
            zip(truth[image].classes_m.tolist(), truth[image].boxes_m4.tolist(), strict=True)
        ):
            if kind != label:
                continue
            a1, b1 = a1 + 1, b1 + 1
            common = max(min(x2, a2) - max(x1, a1) + 1, 0) * max(min(y2, b2) - max(y1, b1) + 1, 0)
            areas = (x2 - x1 + 1) * (y2 - y1 + 1) + (a2 - a1 + 1) * (b2 - b1 + 1)
            iou = common / (areas - common)
            if iou > best_iou:
                best, best_iou = number, iou
        if best_iou > threshold:
            if not truth[image].difficult_m[best]:
                if (image, best) in taken:
                    misses += 1
                else:
                    taken.add((image, best))
                    hits += 1
        else:
            misses += 1
        curve.append((hits, misses))
    positives = sum(int(((t.classes_m == label) & ~t.difficult_m).sum()) for t in truth)
    if positives == 0:
        return 0.0
    points = [(h / positives, h / max(h + m, 1e-300)) for h, m in curve]
    if eleven:
        tops = [max([p for r, p in points if r >= point], default=0.0) for point in np.arange(0.0, 1.1, 0.1)]
        return sum(tops) / 11
    area, reached = 0.0, 0.0
    for place, (recall, _) in enumerate(points):
        area += (recall - reached) * max(p for _, p in points[place:])
        reached = recall
    return area


def direct_metrics(
    detections: list[Detections], truth: list[Annotation], classes: int, eleven: bool
) -> dict[str, float]:
    aps = [
        sum(100 * direct_ap(detections, truth, label, threshold, eleven) for label in range(classes)) / classes
        for threshold in IOU_THRESHOLDS
    ]
    return {"AP": sum(aps) / len(aps), "AP50": aps[0], "AP75": aps[5]}


def random_images(seed: int, images: int, classes: int) -> tuple[list[Detections], list[Annotation]]:
    """Objects, and detections near them, far from them and twice on them; some images have neither."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    detections, truth = [], []
    for image in range(images):
        m = 0 if image == 3 else int(integers(0, 6, 1))
        corner = integers(0, 150, m, 2)
        boxes = torch.cat([corner, corner + integers(20, 150, m, 2)], dim=1).float()
        kinds = integers(0, classes, m)
        truth.append(Annotation(0, 0, boxes, kinds, torch.rand(m, generator=generator) < 0.2))
        near = boxes.repeat(2, 1) + 4 * torch.randn(2 * m, 4, generator=generator)
        corner = integers(0, 200, 2, 2).float()
        far = torch.cat([corner, corner + 30], dim=1)
        guesses = torch.cat([near, far])
        labels = torch.cat([kinds, integers(0, classes, m + 2)])
        scores = torch.rand(len(guesses), generator=generator)
        detections.append(Detections(guesses, scores, labels) if image != 4 else found())
    return detections, truth


@pytest.mark.parametrize("eleven", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_voc_figures_equal_the_direct_computation(seed: int, eleven: bool) -> None:
    detections, truth = random_images(seed, 40, 4)
    figures = voc_metrics(detections, truth, 5, eleven_points=eleven)  # nothing is of the fifth class
    assert figures == pytest.approx(direct_metrics(detections, truth, 5, eleven), abs=1e-9)
    assert 5 < figures["AP75"] < figures["AP50"] < 80
    assert 5 < figures["AP"] < figures["AP50"]


def test_by_hand_a_hit_a_duplicate_and_a_miss() -> None:
    """Scores 0.9 hit, 0.8 duplicate, 0.7 hit, 0.6 nothing: precision 1, 1/2, 2/3, 1/2 at recall 1/2, 1/2, 1, 1."""
    truth = [there(((0, 0, 10, 10), 0, False), ((20, 20, 40, 40), 0, False))]
    detections = [
        found(
            ((0, 0, 10, 10), 0.9, 0),
            ((0, 0, 10, 10), 0.8, 0),
            ((20, 20, 40, 40), 0.7, 0),
            ((60, 60, 70, 70), 0.6, 0),
        )
    ]
    eleven = voc_metrics(detections, truth, 1)
    assert eleven["AP50"] == pytest.approx(100 * (6 * 1 + 5 * 2 / 3) / 11)
    assert eleven["AP"] == pytest.approx(eleven["AP50"])
    area = voc_metrics(detections, truth, 1, eleven_points=False)
    assert area["AP75"] == pytest.approx(100 * (1 / 2 * 1 + 1 / 2 * 2 / 3))


def test_sides_count_both_end_pixels_and_the_threshold_itself_is_not_enough() -> None:
    """Pixels 1 … 10 and 1 … 5 of the same rows: IoU 50/100 is not above 0.5; pixels 1 … 6 is."""
    truth = [there(((0, 0, 10, 10), 0, False))]
    assert voc_metrics([found(((0, 0, 5, 10), 0.9, 0))], truth, 1)["AP50"] == 0
    assert voc_metrics([found(((0, 0, 6, 10), 0.9, 0))], truth, 1)["AP50"] == pytest.approx(100)


def test_difficult_objects_count_neither_way() -> None:
    truth = [there(((0, 0, 10, 10), 0, True), ((20, 20, 40, 40), 0, False))]
    detections = [found(((0, 0, 10, 10), 0.9, 0), ((0, 0, 10, 10), 0.8, 0), ((20, 20, 40, 40), 0.7, 0))]
    assert voc_metrics(detections, truth, 1)["AP"] == pytest.approx(100)
    easy = [Annotation(0, 0, truth[0].boxes_m4, truth[0].classes_m, torch.zeros(2, dtype=torch.bool))]
    assert voc_metrics(detections, easy, 1)["AP"] < 90


def test_the_best_object_counts_even_when_it_is_taken() -> None:
    """Two objects side by side, both detections nearer to the first: the second object is not found."""
    truth = [there(((0, 0, 100, 100), 0, False), ((20, 0, 120, 100), 0, False))]
    detections = [found(((0, 0, 100, 100), 0.9, 0), ((8, 0, 108, 100), 0.8, 0))]
    assert voc_metrics(detections, truth, 1)["AP50"] == pytest.approx(100 * 6 / 11)


def test_the_wrong_class_or_image_is_a_miss() -> None:
    truth = [there(((0, 0, 10, 10), 0, False)), there(((0, 0, 10, 10), 1, False))]
    box = (0.0, 0.0, 10.0, 10.0)
    assert voc_metrics([found((box, 0.9, 1)), found((box, 0.9, 0))], truth, 2)["AP50"] == 0
    assert voc_metrics([found((box, 0.9, 0)), found((box, 0.9, 1))], truth, 2)["AP50"] == pytest.approx(100)


@pytest.mark.parametrize("eleven", [True, False])
def test_no_detections_and_no_objects_are_0(eleven: bool) -> None:
    nothing = {"AP": 0, "AP50": 0, "AP75": 0}
    box = (0.0, 0.0, 10.0, 10.0)
    assert voc_metrics([found()], [there((box, 0, False))], 1, eleven_points=eleven) == nothing
    assert voc_metrics([found((box, 0.9, 0))], [there()], 1, eleven_points=eleven) == nothing
    half = voc_metrics([found((box, 0.9, 0))], [there((box, 0, False))], 2, eleven_points=eleven)
    assert half["AP"] == pytest.approx(50)
    with pytest.raises(ValueError, match="1 images"):
        voc_metrics([found()], [], 1)


def test_scores_and_boxes_are_rounded_as_detectron2_writes_them() -> None:
    """0.9004 and 0.9001 are equal after rounding: the order of the images decides, and the miss comes first."""
    box = (0.0, 0.0, 10.0, 10.0)
    truth = [there(), there((box, 0, False))]
    figures = voc_metrics([found((box, 0.9001, 0)), found((box, 0.9004, 0))], truth, 1)
    assert figures["AP50"] == pytest.approx(50)
    assert voc_metrics([found((box, 0.9001, 0)), found((box, 0.9014, 0))], truth, 1)["AP50"] == pytest.approx(100)
    one = [there((box, 0, False))]
    assert voc_metrics([found(((0.0, 0.0, 5.04, 10.0), 0.9, 0))], one, 1)["AP50"] == 0
    assert voc_metrics([found(((0.0, 0.0, 5.06, 10.0), 0.9, 0))], one, 1)["AP50"] == pytest.approx(100)


def test_coco_figures_equal_pycocotools_own() -> None:
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    detections, truth = random_images(5, 60, 4)

    def rectangle(box: list[float]) -> list[float]:
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    annotations, results = [], []
    for image, (d, t) in enumerate(zip(detections, truth, strict=True)):
        for box, kind, difficult in zip(t.boxes_m4.tolist(), t.classes_m.tolist(), t.difficult_m.tolist(), strict=True):
            x, y, width, height = rectangle(box)
            row = {"id": len(annotations) + 1, "image_id": image, "category_id": kind, "iscrowd": int(difficult)}
            annotations.append({**row, "bbox": [x, y, width, height], "area": width * height})
        for box, score, kind in zip(d.boxes_n4.tolist(), d.scores_n.tolist(), d.classes_n.tolist(), strict=True):
            results.append({"image_id": image, "category_id": kind, "score": score, "bbox": rectangle(box)})
    with contextlib.redirect_stdout(io.StringIO()):
        own = coco.COCO()
        own.dataset = {"images": [{"id": i} for i in range(60)], "categories": [{"id": i} for i in range(4)]}
        own.dataset["annotations"] = annotations
        own.createIndex()
        judge = evaluation.COCOeval(own, own.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    expected = dict(
        zip(
            ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100"),
            judge.stats[:9],
            strict=True,
        )
    )
    figures = coco_metrics(detections, truth)
    assert {name: figure / 100 for name, figure in figures.items()} == pytest.approx(expected, abs=1e-6)
    assert 10 < figures["AP"] < 80


def test_absent_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UserError, match=r'pycocotools: pip install -e "\.\[detection\]"'):
        require_coco()
