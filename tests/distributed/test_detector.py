"""The detector learns, on any number of ranks alike, and its constants are MoCo's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from voc_tree import CLASSES, make_tree

from instance_ssl.config.detection import DetectionConfig
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError
from instance_ssl.evaluation.detection.batches import DetectionBatch, Resizing, single_images, training_batches
from instance_ssl.evaluation.detection.detector import Detector
from instance_ssl.evaluation.detection.metrics import Detections
from instance_ssl.evaluation.detection.training import (
    DetectorTraining,
    detect,
    detection_figures,
    gather_detections,
    learning_rate,
)
from instance_ssl.evaluation.detection.voc import VocImages, open_voc
from instance_ssl.models.backbones import ResNet

RESIZING = Resizing((64,), 120, flip=True)
SETTINGS = DetectionConfig(iterations=40, steps=(30,), warmup_iterations=4, learning_rate=0.01, batch_size=3)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("voc"))


def detector(name: str = "resnet18", regions: int = 8) -> Detector:
    torch.manual_seed(0)
    return Detector(ResNet(name, small_stem=False), 2, regions_per_image=regions, test_proposals=60)


def batches(data: VocImages, iterations: range, group: Group | None = None, size: int = 3) -> list[DetectionBatch]:
    rank, world = (group.rank, group.size) if group else (0, 1)
    return list(
        training_batches(data, RESIZING, 0, seed=5, batch_size=size, iterations=iterations, rank=rank, world_size=world)
    )


def test_the_learning_rate_is_moco_s() -> None:
    rates = [learning_rate(DetectionConfig(), i) for i in (0, 50, 100, 17_999, 18_000, 21_999, 22_000, 23_999)]
    assert rates == pytest.approx([0.02 * 1e-3, 0.02 * (0.5 + 0.5e-3), 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002])
    assert learning_rate(DetectionConfig(warmup_iterations=0), 0) == 0.02


def test_the_layout_is_res5_with_a_norm_and_strides_are_16_or_4() -> None:
    torch.manual_seed(0)
    backbone = ResNet("resnet50", small_stem=False)
    model = Detector(backbone, 20)
    keys = set(model.state_dict())
    assert {"roi_heads.box_head.norm.running_var", "roi_heads.box_head.layer4.2.conv3.weight", "c4.bn1.bias"} <= keys
    assert model.c4.layer3[0].conv1.weight is backbone.network.layer3[0].conv1.weight
    assert model.roi_heads.box_predictor.bbox_pred.weight.shape == (84, 2048)
    assert model.rpn.head.cls_logits.weight.shape[:2] == (15, 1024)
    assert (model.rpn._pre_nms_top_n, model.rpn._post_nms_top_n) == (
        {"training": 12000, "testing": 6000},
        {"training": 2000, "testing": 1000},
    )
    assert all(parameter.requires_grad for parameter in model.parameters())
    for small_stem, stride in ((False, 16), (True, 4)):
        model = Detector(ResNet("resnet18", small_stem=small_stem), 2)
        batch, features = model._features([torch.zeros(3, 60, 90), torch.zeros(3, 64, 40)])
        assert features["0"].shape[2:] == (64 // stride, 96 // stride)
        assert model.roi_heads.box_roi_pool.stride == stride
        anchors = model.rpn.anchor_generator(batch, list(features.values()))[0]
        assert (anchors[15] - anchors[0]).tolist() == [stride, 0, stride, 0]


def test_boxes_follow_the_resizing_and_the_flip(tree: Path) -> None:
    data = open_voc(tree, ["VOC2007/train"], CLASSES)
    resizing = Resizing((64, 128), 150, flip=True)
    drawn = list(training_batches(data, resizing, 0, seed=1, batch_size=6, iterations=range(4), rank=0, world_size=1))
    sizes = set()
    for batch in drawn:
        for image, boxes in zip(batch.images, batch.boxes, strict=True):
            sizes.add(tuple(image.shape[1:]))
            x1, y1, x2, y2 = boxes[0].round().int().tolist()  # the red square
            inner = image[0, y1 + 3 : y2 - 3, x1 + 3 : x2 - 3]
            assert inner.min() > 1.2
            red = (image[0] > 1.2).float().mean()
            assert red < 1.3 * (y2 - y1) * (x2 - x1) / image[0].numel()
    assert sizes == {(64, 96), (100, 150)}
    assert len({tuple(b.round().int().flatten().tolist()) for batch in drawn for b in batch.boxes}) > 12


def _keys(batch: DetectionBatch) -> list[tuple[int, float]]:
    return [(seed, float(image.sum())) for seed, image in zip(batch.seeds, batch.images, strict=True)]


def test_the_stream_of_images_is_the_same_on_any_ranks_and_after_a_restart(tree: Path) -> None:
    data = open_voc(tree, ["VOC2007/train"], CLASSES)

    def own(rank: int, world_size: int, iterations: range, workers: int = 0) -> list[DetectionBatch]:
        return list(
            training_batches(
                data, RESIZING, workers, seed=5, batch_size=4, iterations=iterations, rank=rank, world_size=world_size
            )
        )

    whole = [_keys(batch) for batch in own(0, 1, range(6))]
    parts = [own(rank, 3, range(6)) for rank in range(3)]
    assert [[key for part in parts for key in _keys(part[i])] for i in range(6)] == whole
    assert [_keys(batch) for batch in own(0, 1, range(4, 6))] == whole[4:]
    assert [_keys(batch) for batch in own(0, 1, range(3), workers=2)] == whole[:3]
    seeds = [seed for batch in whole for seed, _ in batch]
    assert len(set(seeds)) == 24  # four epochs of six images, each drawn anew
    annotations = [*data.annotations]
    annotations[0] = type(annotations[0])(96, 64, torch.empty(0, 4), torch.empty(0).long(), torch.empty(0).bool())
    fewer = VocImages(data.images, annotations)
    boxes = [b for batch in batches(fewer, range(5)) for b in batch.boxes]
    assert len(boxes) == 15
    assert all(len(b) for b in boxes)


def _train(group: Group, tree: str, iterations: int) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    data = open_voc(Path(tree), ["VOC2007/train"], CLASSES)
    training = DetectorTraining(detector(), SETTINGS, group)
    losses = [training.step(batch) for batch in batches(data, range(iterations), group)]
    training.recompute_statistics(batches(data, range(4), group))
    return losses, training.model.state_dict()


def test_training_is_the_same_on_one_rank_and_on_two(tree: Path) -> None:
    """Three images over two ranks: two and one. Later proposals differ, as rounding reorders near-equal scores."""
    ((expected, state),) = run_ranks(_train, 1, str(tree), 2)
    for losses, own in run_ranks(_train, 2, str(tree), 2):
        for one, two in zip(expected, losses, strict=True):
            assert two == pytest.approx(one, rel=2e-3)
        for name, value in state.items():
            if name.startswith("c4"):
                torch.testing.assert_close(own[name], value, rtol=1e-2, atol=1e-3)


def _resumed(group: Group, tree: str) -> tuple[bool, float, float]:
    data = open_voc(Path(tree), ["VOC2007/train"], CLASSES)
    whole = DetectorTraining(detector(), SETTINGS, group)
    for batch in batches(data, range(2)):
        whole.step(batch)
    state = {key: value for key, value in torch.load(_saved(whole.state()), weights_only=True).items()}
    torch.manual_seed(77)
    other = DetectorTraining(Detector(ResNet("resnet18", small_stem=False), 2, regions_per_image=8), SETTINGS, group)
    other.load_state(state)
    for training in (whole, other):
        for batch in batches(data, range(2, 4)):
            training.step(batch)
    same = all(torch.equal(value, other.model.state_dict()[name]) for name, value in whole.model.state_dict().items())
    decays = {settings["weight_decay"]: len(settings["params"]) for settings in whole._optimizer.param_groups}
    return same, decays[1e-4], decays[0.0]


def _saved(state: dict[str, Any]) -> Any:
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.full
def test_a_resumed_training_ends_with_the_same_bits_and_norms_do_not_decay(tree: Path) -> None:
    ((same, decayed, others),) = run_ranks(_resumed, 1, str(tree))
    assert same
    assert others == 2 * 21  # the twenty of a ResNet-18, and the one after layer4
    assert decayed == 20 + 6 + 4


def _diverge(group: Group, tree: str) -> str:
    data = open_voc(Path(tree), ["VOC2007/train"], CLASSES)
    training = DetectorTraining(detector(), SETTINGS, group)
    (batch,) = batches(data, range(1))
    batch.images[0][:] = torch.inf
    try:
        training.step(batch)
    except UserError as error:
        return str(error)
    return ""


def test_divergence_is_the_users_to_mend(tree: Path) -> None:
    (message,) = run_ranks(_diverge, 1, str(tree))
    assert "evaluation.detection.learning_rate" in message


def _evaluate(group: Group, tree: str) -> tuple[list[list[float]], dict[str, Any]]:
    data = open_voc(Path(tree), ["VOC2007/test"], CLASSES)
    model = detector()
    model.roi_heads.score_thresh = 0.2  # an untrained one is sure of nothing
    indices = range(*Partition(len(data), group.size).bounds(group.rank))
    images = single_images(data, Resizing((64,), 120, flip=False), 0, indices)
    own = detect(model, images, [data.annotations[i] for i in indices], group.device)
    found = gather_detections(own, group)
    return [d.boxes_n4.flatten().tolist() for d in found], detection_figures(found, data.annotations, 2, group)


@pytest.mark.full
def test_evaluation_is_the_same_on_any_ranks_whatever_their_parts(tree: Path) -> None:
    """Five images on two ranks are three and two."""
    ((boxes, figures),) = run_ranks(_evaluate, 1, str(tree))
    assert len(boxes) == 5
    assert figures["detections"] > 5
    assert figures["test_images"] == 5
    for result in run_ranks(_evaluate, 2, str(tree)):
        assert result == (boxes, figures)


def _gather(group: Group) -> list[tuple[list[list[float]], list[float], list[int]]]:
    """Images 0 and 1 are rank 0's, rank 1 has none; image 1 has no detections."""
    one = Detections(torch.arange(8.0).view(2, 4), torch.tensor([0.5, 0.25]), torch.tensor([1, 0]))
    none = Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64))
    own = {0: [one, none], 1: [], 2: [one]}[group.rank]
    found = gather_detections(own, group)
    return [(d.boxes_n4.tolist(), d.scores_n.tolist(), d.classes_n.tolist()) for d in found]


def test_ranks_and_images_without_anything_keep_their_places() -> None:
    one = ([[0, 1, 2, 3], [4, 5, 6, 7]], [0.5, 0.25], [1, 0])
    assert run_ranks(_gather, 3) == [[one, ([], [], []), one]] * 3


def test_detections_come_back_in_pixels_of_the_original() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            height, width = images[0].shape[1:]
            box = torch.tensor([[0.0, 0.0, width, height]])
            return [{"boxes": box, "scores": torch.ones(1), "labels": torch.ones(1).long()}]

    annotation = type("A", (), {"width": 333, "height": 500})
    (found,) = detect(Fixed(), [torch.zeros(3, 120, 80)], [annotation], torch.device("cpu"))  # type: ignore[arg-type,list-item]
    assert isinstance(found, Detections)
    torch.testing.assert_close(found.boxes_n4, torch.tensor([[0.0, 0.0, 333.0, 500.0]]))
    assert found.classes_n.tolist() == [0]
