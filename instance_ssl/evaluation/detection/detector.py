"""Faster R-CNN with a C4 backbone, on torchvision's detection parts and any of our ResNets.

The layout and constants are those of MoCo's detection configs (facebookresearch/moco, detection/configs and
train_net.py's Res5ROIHeadsExtraNorm) and of detectron2's Base-RCNN-C4 defaults: proposals are found on the output of
layer3 (stride 16), RoIAlign crops every region there at 14 x 14, and the crop runs through layer4, one more batch norm
and a global average. All layers are tuned. Unlike detectron2, images are padded to a multiple of 32 pixels and anchors
are whole pixels, as in torchvision.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import roi_align

from instance_ssl.models.backbones import ResNet, channels_last

_ANCHORS_PER_IMAGE = 256
_REGION_SIDE = 14
_PADDED_TO = 32


class Detector(nn.Module):
    """Images → losses in training, detections in evaluation.

    Args:
        backbone: its modules are reused, not copied.
        num_classes: without the background.
        regions_per_image: sampled to train the box head, up to a quarter of them on objects.
        test_proposals: regions classified in evaluation.
    """

    def __init__(
        self, backbone: ResNet, num_classes: int, *, regions_per_image: int = 512, test_proposals: int = 1000
    ) -> None:
        super().__init__()
        network = backbone.network
        parts = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        self.c4 = nn.Sequential(OrderedDict((part, getattr(network, part)) for part in parts))
        channels = network.layer4[0].conv1.in_channels
        small_stem = isinstance(network.maxpool, nn.Identity)
        self.rpn = _region_proposals(channels, test_proposals)
        self.roi_heads = _res5_heads(network.layer4, backbone.feature_dim, num_classes, regions_per_image)
        self.roi_heads.box_roi_pool = _RoiAlign(stride=4 if small_stem else 16)

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]], seeds: list[int]) -> dict[str, Tensor]:
        """The four losses of a batch: means over its images.

        Args:
            images: (3, h, w) each, normalised.
            targets: of each image "boxes" (m, 4), none of them empty, and "labels" (m,) from 1.
            seeds: one for each image, of its anchors and regions.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.rpn.fg_bg_sampler.generators = self.roi_heads.fg_bg_sampler.generators = generators
        batch, features = self._features(images)
        proposals, rpn_losses = self.rpn(batch, features, targets)
        _, box_losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
        return {**rpn_losses, **box_losses}

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Of each image (3, h, w) at most 100 "boxes" (n, 4) in its pixels, "scores" (n,) and "labels" (n,) from 1."""
        batch, features = self._features(images)
        proposals, _ = self.rpn(batch, features)
        return self.roi_heads(features, proposals, batch.image_sizes)[0]

    def _features(self, images: list[Tensor]) -> tuple[ImageList, dict[str, Tensor]]:
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = (-(-max(side) // _PADDED_TO) * _PADDED_TO for side in zip(*sizes, strict=True))
        padded = images[0].new_zeros(len(images), 3, height, width)
        for place, image in enumerate(images):
            padded[place, :, : image.shape[1], : image.shape[2]] = image
        return ImageList(padded, sizes), {"0": self.c4(channels_last(padded))}


class _SeededSampler:
    """torchvision's BalancedPositiveNegativeSampler with one generator for each image.

    An image's losses then do not depend on its batch, on the rank or on a restart.
    """

    def __init__(self, per_image: int, positive_fraction: float) -> None:
        self.per_image, self.max_positives = per_image, int(per_image * positive_fraction)
        self.generators: list[torch.Generator] = []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks of the sampled positives (≥ 1) and negatives (0) of each image."""
        positives, negatives = [], []
        for label_n, generator in zip(labels, self.generators, strict=True):
            positives.append(_some(label_n >= 1, self.max_positives, generator))
            negatives.append(_some(label_n == 0, self.per_image - int(positives[-1].sum()), generator))
        return positives, negatives


def _some(wanted_n: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A mask of `count` random wanted ones, or of all where there are fewer."""
    (places,) = torch.where(wanted_n)
    order = torch.randperm(len(places), generator=generator)[:count].to(places.device)
    return torch.zeros_like(wanted_n).index_fill_(0, places[order], True)


class _RegionProposals(RegionProposalNetwork):
    """torchvision's, with detectron2's losses: L1 for boxes, and both divided by 256 anchors per image."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Loss of objectness and of boxes."""
        positive, negative = (torch.cat(masks) for masks in self.fg_bg_sampler(labels))
        anchors = _ANCHORS_PER_IMAGE * len(labels)
        chosen = positive | negative
        objectness_loss = functional.binary_cross_entropy_with_logits(
            objectness.flatten()[chosen], torch.cat(labels)[chosen], reduction="sum"
        )
        targets = torch.cat(regression_targets)
        box_loss = functional.l1_loss(pred_bbox_deltas[positive], targets[positive], reduction="sum")
        return objectness_loss / anchors, box_loss / anchors


class _Res5Heads(RoIHeads):
    """torchvision's, for boxes alone, with detectron2's L1 loss, divided by the number of regions."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of each image, or losses."""
        if not self.training:
            logits, deltas = self._predict(features, proposals, image_shapes)
            found = self.postprocess_detections(logits, deltas, proposals, image_shapes)
            return [{"boxes": b, "scores": s, "labels": k} for b, s, k in zip(*found, strict=True)], {}
        proposals, _, labels, regression_targets = self.select_training_samples(proposals, targets)
        logits, deltas = self._predict(features, proposals, image_shapes)
        label_n, target_n4 = torch.cat(labels), torch.cat(regression_targets)
        (positive,) = torch.where(label_n > 0)
        own_n4 = deltas.view(len(label_n), -1, 4)[positive, label_n[positive]]
        box_loss = functional.l1_loss(own_n4, target_n4[positive], reduction="sum") / len(label_n)
        return [], {"loss_classifier": functional.cross_entropy(logits, label_n), "loss_box_reg": box_loss}

    def _predict(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))


class _RoiAlign(nn.Module):
    """detectron2's ROIAlignV2: aligned by half a pixel, with adaptive sampling."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, features: dict[str, Tensor], proposals: list[Tensor], _: list[tuple[int, int]]) -> Tensor:
        """Regions (n, C, 14, 14)."""
        return roi_align(features["0"], proposals, _REGION_SIDE, 1 / self.stride, sampling_ratio=0, aligned=True)


def _region_proposals(channels: int, test_proposals: int) -> _RegionProposals:
    anchors = AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),))
    rpn = _RegionProposals(
        anchors,
        RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=_ANCHORS_PER_IMAGE,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 12000, "testing": 6000},
        post_nms_top_n={"training": 2000, "testing": test_proposals},
        nms_thresh=0.7,
    )
    rpn.fg_bg_sampler = _SeededSampler(_ANCHORS_PER_IMAGE, 0.5)
    return rpn


def _res5_heads(layer4: nn.Module, feature_dim: int, num_classes: int, regions_per_image: int) -> _Res5Heads:
    head = OrderedDict(layer4=layer4, norm=nn.BatchNorm2d(feature_dim), pool=nn.AdaptiveAvgPool2d(1))
    predictor = FastRCNNPredictor(feature_dim, num_classes + 1)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    heads = _Res5Heads(
        nn.Identity(),
        nn.Sequential(head),
        predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=regions_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
    )
    heads.fg_bg_sampler = _SeededSampler(regions_per_image, 0.25)
    return heads
