"""Plans a training step: bytes by part, bytes sent, FLOPs, and the most classes that fit.

The encoder is run once on torch's fake tensors (meta tensors that know their device, and so follow autocast);
the classifier is run by `classifier_cost.py`. The plan excludes the CUDA context (about 0.5 GiB), the workspaces of
libraries, and what the caching allocator loses between blocks.
"""

import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from instance_ssl.config.choices import Layout, OptimizerName
from instance_ssl.distributed.comm import ring_bytes
from instance_ssl.training.classifier_cost import (
    ClassifierSize,
    classifier_flops,
    classifier_memory,
    classifier_traffic,
)
from instance_ssl.training.live_bytes import LiveBytes
from instance_ssl.training.optimizers import state_size

_FLOAT = 4  # bytes; weights, gradients and optimizer state of the encoder are float32 under every JSON
# Their gradients are reduced in the autocast dtype under ZeRO (LOWER_PRECISION_SAFE_MODULES of DeepSpeed 0.19.8).
_LOW_PRECISION_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# DeepSpeed's default for an absent key (0.19.8, zero/config.py).
_DEFAULT_BUCKET_SIZE = 500_000_000


@dataclass(frozen=True)
class EncoderCost:
    """What the encoder costs one rank in one micro-batch.

    Attributes:
        num_parameters: all are trained.
        num_kept: numbers that the optimizer keeps for them.
        num_low_precision: parameters of linear layers and convolutions.
        buffer_bytes: running statistics.
        kept: bytes of activations when the backward pass starts, including images and autocast's weights.
        backward_peak: peak bytes of forward and backward pass above weights and existing gradients.
        first_backward_peak: the same if the gradients of the weights are allocated on the way, and counted.
        flops: of forward and backward pass, 2 a multiply-add.
    """

    num_parameters: int
    num_kept: int
    num_low_precision: int
    buffer_bytes: int
    kept: int
    backward_peak: int
    first_backward_peak: int
    flops: int


@dataclass(frozen=True)
class EngineSize:
    """The settings that decide DeepSpeed's memory and traffic.

    Attributes:
        world_size: T.
        accumulation_steps: micro-batches of an optimizer step.
        autocast_dtype: of the forward pass; None: float32.
        communication_dtype: of gradients without ZeRO.
        zero_stage: 0, 1 or 2.
        reduce_bucket_size: numbers in one of ZeRO's buckets.
        num_buckets: of each dtype that is reduced.
    """

    world_size: int
    accumulation_steps: int
    autocast_dtype: torch.dtype | None
    communication_dtype: torch.dtype
    zero_stage: int
    reduce_bucket_size: int
    num_buckets: int


@dataclass(frozen=True)
class EncoderMemory:
    """Bytes of the encoder on one rank.

    Attributes:
        weights: with running statistics.
        optimizer: momentum or moments, and under ZeRO the partition's copy of the weights.
        waiting: gradients of earlier micro-batches during the forward pass.
        gradients: of all parameters without ZeRO; under it of the partition, and of what accumulates.
        buckets: ZeRO's, during the backward pass.
        kept: activations between forward and backward pass.
        backward_peak: peak of activations and transient gradients.
        reduction: copy of the gradients that is reduced or given to the optimizer.
    """

    weights: int
    optimizer: int
    waiting: int
    gradients: int
    buckets: int
    kept: int
    backward_peak: int
    reduction: int

    @property
    def peak(self) -> int:
        """Peak of the encoder alone."""
        backward = self.gradients + max(self.backward_peak + self.buckets, self.reduction)
        return self.weights + self.optimizer + max(self.waiting + self.kept, backward)


@dataclass(frozen=True)
class Plan:
    """One layout on one rank: `resident` all the time, and one of the `phases` at a time.

    Attributes:
        resident: bytes by part.
        phases: bytes by phase and part.
        sent: bytes on the wire in a step, by part and collective.
        flops: of a step, by part.
    """

    resident: dict[str, int]
    phases: dict[str, dict[str, int]]
    sent: dict[str, Counter[str]] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes at the largest phase."""
        return sum(self.resident.values()) + max(sum(parts.values()) for parts in self.phases.values())

    @property
    def largest_phase(self) -> str:
        """The phase that decides the peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))


def measure_encoder(
    build: Callable[[], nn.Module],
    *,
    image_size: int,
    num_views: int,
    autocast_dtype: torch.dtype | None,
    optimizer: OptimizerName = "sgd",
) -> EncoderCost:
    """Measures forward and backward pass of one micro-batch on fake tensors, with or without recomputation.

    Args:
        build: returns the encoder.
        num_views: images of one forward pass, counting all views.
    """
    encoder = build()  # not on fake tensors: some constructors compute with the values of tensors
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _make_fake(encoder, mode)
        parameters = list(encoder.parameters())
        with FlopCounterMode(display=False) as flops:
            kept, first_backward_peak = _live_bytes(encoder, image_size, num_views, autocast_dtype)
        _, backward_peak = _live_bytes(encoder, image_size, num_views, autocast_dtype)
    low = [module for module in encoder.modules() if isinstance(module, _LOW_PRECISION_MODULES)]
    return EncoderCost(
        num_parameters=sum(p.numel() for p in parameters),
        num_kept=state_size(encoder, optimizer),
        num_low_precision=sum(p.numel() for module in low for p in module.parameters(recurse=False)),
        buffer_bytes=sum(b.nbytes for b in encoder.buffers()),
        kept=kept,
        backward_peak=backward_peak,
        first_backward_peak=first_backward_peak,
        flops=flops.get_total_flops(),
    )


def _make_fake(network: nn.Module, mode: FakeTensorMode) -> None:
    """Puts fake tensors in the place of all parameters and buffers."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = nn.Parameter(mode.from_tensor(parameter.detach()), requires_grad=parameter.requires_grad)
            setattr(module, name, fake)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, mode.from_tensor(buffer))


def _live_bytes(
    encoder: nn.Module, image_size: int, num_views: int, autocast_dtype: torch.dtype | None
) -> tuple[int, int]:
    """Bytes between forward and backward pass, and the peak; gradients count if this call allocates them."""
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    with LiveBytes([*encoder.parameters(), *encoder.buffers(), *gradients]) as counted:
        images = torch.empty(num_views, 3, image_size, image_size, memory_format=torch.channels_last)
        with torch.autocast("cpu", autocast_dtype) if autocast_dtype else nullcontext():
            embeddings = encoder(images)
        kept = counted.live
        embeddings.backward(torch.empty_like(embeddings))
    return kept, counted.peak


def engine_size(
    engine: dict[str, Any], *, world_size: int, accumulation_steps: int, autocast_dtype: torch.dtype | None
) -> EngineSize:
    """From the resolved DeepSpeed JSON."""
    zero = engine.get("zero_optimization", {})
    named = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    contiguous = zero.get("contiguous_gradients", True)
    return EngineSize(
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        autocast_dtype=autocast_dtype,
        communication_dtype=named[engine.get("communication_data_type", "fp32")],
        zero_stage=zero.get("stage", 0),
        reduce_bucket_size=int(zero.get("reduce_bucket_size", _DEFAULT_BUCKET_SIZE)),
        num_buckets=(2 if zero.get("overlap_comm", False) else 1) if contiguous else 0,
    )


def encoder_memory(cost: EncoderCost, size: EngineSize) -> EncoderMemory:
    """What DeepSpeed 0.19.8 holds for an encoder and its optimizer (read in its source, and measured)."""
    whole, kept = cost.num_parameters * _FLOAT, cost.num_kept * _FLOAT
    part = math.ceil(cost.num_parameters / size.world_size) * _FLOAT
    weights = whole + cost.buffer_bytes
    accumulates = size.accumulation_steps > 1
    if size.zero_stage == 0:
        narrow = size.communication_dtype.itemsize
        copies = _FLOAT if narrow == _FLOAT else _FLOAT + narrow
        reduction = cost.num_parameters * copies  # `buffered_allreduce_fallback` flattens all gradients
        # Allocated once a step, while activations are released.
        backward = cost.backward_peak if accumulates else cost.first_backward_peak - whole
        waiting = whole if accumulates else 0
        return EncoderMemory(weights, kept, waiting, whole, 0, cost.kept, backward, reduction)
    waiting = (whole if size.zero_stage == 1 else part) if accumulates else 0
    num_dtypes = len([count for count in _gradient_counts(cost, size).values() if count])
    buckets = num_dtypes * size.num_buckets * size.reduce_bucket_size * _FLOAT
    gradients = part + waiting
    optimizer = part + math.ceil(kept / size.world_size)
    return EncoderMemory(weights, optimizer, waiting, gradients, buckets, cost.kept, cost.backward_peak, part)


def encoder_traffic(cost: EncoderCost, size: EngineSize) -> Counter[str]:
    """Bytes that one rank sends in a step: gradients, and under ZeRO the weights that each rank has updated.

    ZeRO's stages reduce by all-reduce too (`use_multi_rank_bucket_allreduce`, on by default), stage 2 in every
    micro-batch.
    """
    times = size.accumulation_steps if size.zero_stage == 2 else 1
    gradients = sum(count * dtype.itemsize for dtype, count in _gradient_counts(cost, size).items())
    sent = Counter({"all_reduce": times * ring_bytes("all_reduce", gradients, size.world_size)})
    if size.zero_stage > 0:
        part = math.ceil(cost.num_parameters / size.world_size) * _FLOAT
        sent["all_gather"] = ring_bytes("all_gather", part, size.world_size)
    return sent


def _gradient_counts(cost: EncoderCost, size: EngineSize) -> dict[torch.dtype, int]:
    """Numbers of gradients by the dtype in which they are reduced."""
    if size.zero_stage == 0 or size.autocast_dtype is None:
        return {size.communication_dtype: cost.num_parameters}
    low = cost.num_low_precision
    return {size.autocast_dtype: low, torch.float32: cost.num_parameters - low}


def plan_layout(layout: Layout, cost: EncoderCost, engine: EngineSize, classifier: ClassifierSize) -> Plan:
    """Plans one layout of the same training.

    Args:
        layout: `sharded` is this code as configured, `replicated` this code with every rank holding all of W; the
            dense ones are the paper's DHP and plain DDP, with logits of all rows and own classes in memory.
        classifier: as configured.
    """
    if layout.startswith("replicated"):
        classifier = replace(classifier, group_size=1, num_replicas=engine.world_size)
    encoder = encoder_memory(cost, engine)
    if layout.endswith("dense"):
        return _dense_plan(encoder, classifier)
    memory = classifier_memory(classifier)
    gradients = {"encoder gradients": encoder.gradients}
    pending = {"features and labels": memory.pending}
    phases = {
        "forward": {
            "encoder gradients": encoder.waiting,
            "activations": encoder.kept,
            "block buffers": memory.sums_block,
            "features and labels": memory.first_pass - memory.sums_block,
        },
        "backward": gradients | pending | {"ZeRO buckets": encoder.buckets, "activations": encoder.backward_peak},
        "reduction": gradients | pending | {"gradients flattened": encoder.reduction},
        "update": {"block buffers": memory.update_block, "features and labels": memory.update - memory.update_block},
        "hardest classes": {"unit rows, keys and a tile": memory.refresh},
    }
    steps = engine.accumulation_steps
    return Plan(
        resident={
            "encoder weights": encoder.weights,
            "encoder optimizer state": encoder.optimizer,
            "W": memory.weight,
            "momentum of W": memory.momentum,
            "hard-class table": memory.hard_classes,
        }
        | ({"clock of sampled rows": memory.clock} if memory.clock else {}),
        phases={phase: parts for phase, parts in phases.items() if any(parts.values())},
        sent={"encoder": encoder_traffic(cost, engine), "classifier": classifier_traffic(classifier)},
        flops={"encoder": cost.flops * steps, "classifier": classifier_flops(classifier)},
    )


def _dense_plan(encoder: EncoderMemory, classifier: ClassifierSize) -> Plan:
    """Plans materialised logits: two float32 copies, as the paper's Table 1 implies, and a gradient of W.

    DDP's buckets hold a second copy of the gradient (`gradient_as_bucket_view` is off by default).
    """
    n, width = classifier.local_classes, classifier.embedding_dim
    rows, table = n * width * _FLOAT, n * classifier.num_hard_classes * _FLOAT
    resident = {
        "encoder weights": encoder.weights,
        "encoder optimizer state": encoder.optimizer,
        "encoder gradients": encoder.gradients,
        "W": rows,
        "momentum of W": rows,
        "gradient of W": rows,
        "hard-class table": table,
    }
    if classifier.num_replicas > 1:
        resident["DDP bucket of W"] = rows
    logits = 2 * classifier.gathered_rows * n * _FLOAT
    features = 2 * classifier.gathered_rows * width * _FLOAT
    step = {"activations": encoder.kept, "logits": logits, "features": features}
    return Plan(resident, {"forward": step})
