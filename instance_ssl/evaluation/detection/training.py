"""Fine-tunes a detector with a pre-trained backbone by SGD over all ranks, and evaluates its AP."""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from instance_ssl.config.detection import DetectionConfig
from instance_ssl.distributed.batch_norm import SynchronisedBatchNorm2d, synchronise_batch_norm
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.gradients import sum_gradients
from instance_ssl.errors import UserError
from instance_ssl.evaluation.detection.batches import DetectionBatch
from instance_ssl.evaluation.detection.detector import Detector
from instance_ssl.evaluation.detection.metrics import Detections, coco_metrics, voc_metrics
from instance_ssl.evaluation.detection.voc import Annotation


def learning_rate(config: DetectionConfig, iteration: int) -> float:
    """Iteration 0, 1, …'s rate: up from a thousandth over the warm-up, down to a tenth at each of `steps`.

    The defaults are MoCo's 24k schedule (facebookresearch/moco, detection/configs/pascal_voc_R_50_C4_24k.yaml).
    """
    done = min(1.0, iteration / config.warmup_iterations) if config.warmup_iterations else 1.0
    warmth = 1e-3 * (1 - done) + done
    return config.learning_rate * warmth * 0.1 ** bisect.bisect_right(config.steps, iteration)


class DetectorTraining:
    """A detector, its SGD and its iteration, the same on all ranks.

    Batch norm's weights and biases do not decay (detectron2's defaults).

    Args:
        model: its batch norms are replaced by synchronised ones.

    Attributes:
        iteration: iterations done.
    """

    def __init__(self, model: Detector, config: DetectionConfig, group: Group) -> None:
        synchronise_batch_norm(model, group)
        self.model, self.config, self.group = model.to(group.device), config, group
        self.iteration = 0
        norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
        self._parameters = dict(model.named_parameters())
        decayed = [p for p in self._parameters.values() if id(p) not in norms]
        others = [p for p in self._parameters.values() if id(p) in norms]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )

    def step(self, batch: DetectionBatch) -> dict[str, float]:
        """Steps on this rank's part of the global batch; returns the batch's mean losses by name and their sum, "loss".

        Raises:
            UserError: on all ranks, when the loss is not finite; the weights are unchanged.
        """
        self.model.train()
        losses = self._losses(batch)
        share = len(batch.images) / self.config.batch_size
        self._optimizer.zero_grad()
        (torch.stack(list(losses.values())).sum() * share).backward()
        own = torch.stack(list(losses.values())).detach() * share
        summed = sum_gradients(self._parameters.values(), own, self.group)
        figures = dict(zip(losses, summed.tolist(), strict=True))
        figures["loss"] = sum(figures.values())
        if not math.isfinite(figures["loss"]):
            raise UserError(
                f"detection: the loss became {figures['loss']} at iteration {self.iteration}; lower "
                "evaluation.detection.learning_rate"
            )
        for settings in self._optimizer.param_groups:
            settings["lr"] = learning_rate(self.config, self.iteration)
        self._optimizer.step()
        self.iteration += 1
        return figures

    def recompute_statistics(
        self, batches: Iterable[DetectionBatch], on_batch: Callable[[], None] = lambda: None
    ) -> None:
        """Replaces batch norm's running averages by plain means over these batches (detectron2's PRECISE_BN)."""
        norms = [module for module in self.model.modules() if isinstance(module, SynchronisedBatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        self.model.train()
        with torch.no_grad():
            for batch in batches:
                on_batch()
                self._losses(batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def state(self) -> dict[str, Any]:
        """Weights, momentum and iteration: tensors and a number."""
        kept = self._optimizer.state
        buffers = {name: kept[p].get("momentum_buffer") for name, p in self._parameters.items()}
        momentum = {n: torch.zeros_like(p) if buffers[n] is None else buffers[n] for n, p in self._parameters.items()}
        return {"iteration": self.iteration, "model": self.model.state_dict(), "momentum": momentum}

    def load_state(self, state: dict[str, Any]) -> None:
        """Resumes from `state`."""
        self.iteration = state["iteration"]
        self.model.load_state_dict(state["model"])
        for name, parameter in self._parameters.items():
            self._optimizer.state[parameter]["momentum_buffer"] = state["momentum"][name].to(parameter, copy=True)

    def _losses(self, batch: DetectionBatch) -> dict[str, Tensor]:
        device = self.group.device
        targets = [
            {"boxes": boxes.to(device), "labels": classes.to(device) + 1}
            for boxes, classes in zip(batch.boxes, batch.classes, strict=True)
        ]
        images = [image.to(device, non_blocking=True) for image in batch.images]
        return self.model.losses(images, targets, batch.seeds)


@torch.inference_mode()
def detect(
    model: Detector,
    images: Iterable[Tensor],
    annotations: Sequence[Annotation],
    device: torch.device,
    on_image: Callable[[], None] = lambda: None,
) -> list[Detections]:
    """Detections in each image (3, h, w), in pixels of the original, whose size its annotation gives."""
    model.eval()
    found = []
    for image, annotation in zip(images, annotations, strict=True):
        (result,) = model([image.to(device, non_blocking=True)])
        scale = torch.tensor([annotation.width / image.shape[2], annotation.height / image.shape[1]]).repeat(2)
        boxes_n4 = result["boxes"].float().cpu() * scale
        found.append(Detections(boxes_n4, result["scores"].float().cpu(), result["labels"].cpu() - 1))
        on_image()
    return found


def gather_detections(own: Sequence[Detections], group: Group) -> list[Detections]:
    """Gathers the detections of all ranks' images, in order of rank, any number on each. Collective."""
    counts = torch.tensor([len(d.scores_n) for d in own], dtype=torch.int64, device=group.device)
    columns = [torch.cat([d.boxes_n4, d.scores_n[:, None], d.classes_n[:, None].float()], dim=1) for d in own]
    rows = torch.cat([torch.empty(0, 6), *columns]).to(group.device)
    all_counts = group.all_gather_rows(counts, group.row_counts(len(counts)))
    all_rows = group.all_gather_rows(rows, group.row_counts(len(rows))).cpu()
    return [Detections(part[:, :4], part[:, 4], part[:, 5].long()) for part in all_rows.split(all_counts.tolist())]


def detection_figures(
    detections: Sequence[Detections], annotations: Sequence[Annotation], num_classes: int, group: Group
) -> dict[str, Any]:
    """AP, AP50 and AP75 by VOC's 11 points, by the "area", and by "coco", computed by rank 0 for all.

    Raises:
        UserError: when torchmetrics or pycocotools is not installed.
    """
    figures: dict[str, Any] | None = None
    if group.rank == 0:
        figures = {
            **voc_metrics(detections, annotations, num_classes),
            "area": voc_metrics(detections, annotations, num_classes, eleven_points=False),
            "coco": coco_metrics(detections, annotations),
            "test_images": len(annotations),
            "detections": sum(len(d.scores_n) for d in detections),
        }
    return group.broadcast_object(figures)
