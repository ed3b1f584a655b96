"""Supervised training of a backbone and a linear classifier on it, the images divided over the ranks.

Every rank holds the network. Gradients are summed over the ranks, so that a step follows the mean loss of the global
batch however unevenly the ranks share it. Batch norm sees the images of its own rank.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.gradients import sum_gradients
from instance_ssl.evaluation.epoch_log import Batches, LabelledBatches, Progress, mean_loss, train_epochs
from instance_ssl.evaluation.features import evaluation_mode
from instance_ssl.evaluation.linear import places


@dataclass(frozen=True)
class TrainingOptions:
    """SGD of backbone and classifier.

    Attributes:
        steps: global batches in all; the last epoch may be cut short.
        backbone_learning_rate, classifier_learning_rate: of the first step.
        global_batch_size: only reported; the gradient is the mean over the images that a batch really has.
        schedule: of both rates: half a cosine to 0, or multiplied by `decay_factor` at each milestone.
        milestones: in epochs, for `milestones`.
        momentum, nesterov: of SGD.
        weight_decay: of all parameters except batch norm's (SimCLR's model_util.py).
        batch_norm_rule: running statistics keep max(1 - 10/s, 0.9) of what they were, s the steps of an epoch
            (SimCLR, arXiv:2002.05709, B.8.1); else torch's 0.9.
    """

    steps: int
    backbone_learning_rate: float
    classifier_learning_rate: float
    global_batch_size: int = 256
    schedule: Literal["cosine", "milestones"] = "cosine"
    milestones: tuple[int, ...] = ()
    decay_factor: float = 0.2
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    batch_norm_rule: bool = False

    def rate_factor(self, step: int, steps_per_epoch: int) -> float:
        """The factor of both learning rates at step 0 … steps - 1."""
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.decay_factor ** sum(step >= milestone * steps_per_epoch for milestone in self.milestones)


def fine_tune(
    backbone: nn.Module,
    data: LabelledBatches,
    group: Group,
    options: TrainingOptions,
    *,
    feature_dim: int,
    seed: int,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    state: dict[str, Any] | None = None,
    on_epoch: Callable[[Progress], None] = lambda done: None,
) -> dict[str, float]:
    """Trains the backbone and a linear classifier on it, then classifies each test image once.

    After every epoch, batch norm's running statistics become their mean over the ranks.

    Args:
        backbone: images (b, …) to features (b, F), on the group's device; trained in place. F is `feature_dim`.
        data: its epochs hold no more parts than `options.steps` asks for.
        seed: of the classifier's weights, ~ N(0, 0.01²) with bias 0 (as in the linear protocol).
        autocast: precision of the forward pass.
        state: of an earlier training's `Progress`, to resume from.
        on_epoch: called at the end of every epoch.

    Returns:
        "top1", "top5" and "mean_per_class" (top-1 averaged over the classes that have test images) in per cent,
        "train_loss" (mean of the last epoch, nats), "epochs" (the last may be cut short), "test_images". The same on
        all ranks.

    Raises:
        DivergedError: when the loss is not finite.
        ValueError: when an epoch has no training images or there are no test images.
    """
    steps_per_epoch, labels = data.steps_per_epoch, data.labels.long().to(group.device)
    network = _Network(backbone, feature_dim, data.num_classes, seed).to(group.device).requires_grad_(True).train()
    if options.batch_norm_rule:
        for module in _batch_norms(network):
            module.momentum = 1 - max(1 - 10 / steps_per_epoch, 0.9)
    optimizer = _optimizer(network, options)
    epochs = math.ceil(options.steps / steps_per_epoch)

    def train_epoch(epoch: int) -> float:
        first = epoch * steps_per_epoch
        steps = range(first, min(first + steps_per_epoch, options.steps))
        factors = [options.rate_factor(step, steps_per_epoch) for step in steps]
        loss = _train_epoch(network, optimizer, factors, data.train_parts(epoch), labels, group, autocast)
        _average_statistics(network, group)
        return loss

    put = network.load_state_dict
    train_loss = train_epochs(
        train_epoch, epochs, optimizer, "network", network.state_dict, put, state=state, on_epoch=on_epoch
    )
    test_labels = data.test_labels.long().to(group.device)
    accuracy = _accuracy(network, data.test_batches(), test_labels, data.num_classes, group, autocast)
    return {**accuracy, "train_loss": train_loss, "epochs": epochs}


class _Network(nn.Module):
    """Images (b, …) → logits (b, C), float32."""

    def __init__(self, backbone: nn.Module, feature_dim: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(feature_dim, num_classes)
        # Drawn on the CPU: the same for every rank and device.
        with torch.no_grad():
            self.classifier.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
            self.classifier.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.backbone(images)).float()


def _batch_norms(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def _optimizer(network: _Network, options: TrainingOptions) -> torch.optim.SGD:
    """A group for each pair of learning rate and weight decay; its "base_lr" is the rate before the schedule."""
    spared = {parameter for module in _batch_norms(network) for parameter in module.parameters()}
    groups = []
    for module, rate in (
        (network.backbone, options.backbone_learning_rate),
        (network.classifier, options.classifier_learning_rate),
    ):
        for decay, is_spared in ((options.weight_decay, False), (0.0, True)):
            parameters = [parameter for parameter in module.parameters() if (parameter in spared) == is_spared]
            groups.append({"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay})
    return torch.optim.SGD(
        [entry for entry in groups if entry["params"]], momentum=options.momentum, nesterov=options.nesterov
    )


def _train_epoch(
    network: _Network,
    optimizer: torch.optim.SGD,
    factors: list[float],
    parts: Iterable[Batches],
    labels: Tensor,
    group: Group,
    autocast: Callable[[], AbstractContextManager[object]],
) -> float:
    """Takes one step per factor and returns the mean loss of the epoch's images."""
    totals = torch.zeros(2, dtype=torch.float64, device=group.device)
    for factor, part in zip(factors, parts, strict=True):
        for entry in optimizer.param_groups:
            entry["lr"] = factor * entry["base_lr"]
        optimizer.zero_grad()
        own = torch.zeros(2, device=group.device)
        for images, ids in part:
            with autocast():
                logits_bC = network(images.to(group.device, non_blocking=True))
            loss = cross_entropy(logits_bC, labels[ids.to(group.device)], reduction="sum")
            loss.backward()
            own += torch.stack([loss.detach(), loss.new_tensor(ids.shape[0])])
        summed = sum_gradients(network.parameters(), own, group)
        for parameter in network.parameters():
            assert parameter.grad is not None
            parameter.grad /= summed[1].clamp_min(1)
        totals += summed
        optimizer.step()
    return mean_loss(totals, "fine-tuning", "lower its learning rates")


def _average_statistics(network: _Network, group: Group) -> None:
    """Replaces the running statistics of batch norm by their mean over the ranks."""
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    packed = group.all_reduce_sum_(torch.cat([buffer.flatten() for buffer in buffers])) / group.size
    for buffer, mean in zip(buffers, packed.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


@torch.inference_mode()
def _accuracy(
    network: _Network,
    batches: Batches,
    labels: Tensor,
    num_classes: int,
    group: Group,
    autocast: Callable[[], AbstractContextManager[object]],
) -> dict[str, float]:
    """Accuracies in per cent over the images of all ranks, any number on each."""
    # For each class: its images, those correct at top-1, and those correct at top-5.
    counts_3C = torch.zeros(3, num_classes, dtype=torch.int64, device=group.device)
    with evaluation_mode(network):
        for images, ids in batches:
            labels_b = labels[ids.to(group.device)]
            with autocast():
                logits_bC = network(images.to(group.device, non_blocking=True))
            places_b = places(logits_bC, labels_b)
            for row, chosen_b in zip(counts_3C, (places_b >= 0, places_b == 0, places_b < 5), strict=True):
                row += labels_b[chosen_b].bincount(minlength=num_classes)
    group.all_reduce_sum_(counts_3C)
    images_C, best_C, _ = counts_3C
    total, best, among_5 = counts_3C.sum(dim=1).tolist()
    if total == 0:
        raise ValueError("no test images")
    tested = images_C > 0
    mean_per_class = 100 * (best_C[tested].double() / images_C[tested]).mean().item()
    accuracies = {"top1": 100 * best / total, "top5": 100 * among_5 / total, "mean_per_class": mean_per_class}
    return {**accuracies, "test_images": total}
