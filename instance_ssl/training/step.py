"""The training loop: one optimizer step in the paper's eight steps, and an epoch of them."""

import math
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from instance_ssl.classifier.shard import ClassifierShard, ShardOutput
from instance_ssl.data.colour import apply_colours
from instance_ssl.data.views import ViewBatch
from instance_ssl.models.backbones import channels_last
from instance_ssl.training.engine import Engine


@dataclass(frozen=True)
class StepReport:
    """The outcome of one optimizer step.

    Attributes:
        loss: J, the mean over the global batch, equal on all ranks.
        log_z: mean of log Z.
        num_zero_features: rows of the global batch whose embedding was 0 and got no gradient.
        learning_rate: of this step.
        applied: False when a number was not finite on any rank (or overflowed float16's loss scale): then neither
            optimizer has moved.
        data_wait_seconds: time this rank waited for its loader.
        own_seconds: time of this rank's own work before the collectives: loading and the encoder's forward passes.
        unreadable: id → why, of this rank's images that were found unreadable.
        embeddings: this rank's last micro-batch (b, D) and its ids (b,), where the loss is not finite.
        instance_accuracy: fraction of the last micro-batch that is classified right among all N classes, if measured.
        positive_cosine: mean cos(w_i, x_i) of the last micro-batch, if measured.
    """

    loss: float
    log_z: float
    num_zero_features: int
    learning_rate: float
    applied: bool
    data_wait_seconds: float
    own_seconds: float
    unreadable: dict[int, str] = field(default_factory=dict)
    embeddings: tuple[Tensor, Tensor] | None = None
    instance_accuracy: float | None = None
    positive_cosine: float | None = None


def train_step(
    engine: Engine,
    shard: ClassifierShard,
    micro_batches: Iterator[ViewBatch],
    accumulation_steps: int,
    positives: Tensor,
    *,
    measure: bool = False,
) -> StepReport:
    """One optimizer step of encoder and classifier, in the eight steps of the paper's "Hybrid Parallelism".

        1  features of the local images              engine(images)
        2  gather the features of all ranks          ┐
        3  partial cosine logits, local rows of W    │
        4  sum their exponentials over the ranks     │ shard.forward, for every micro-batch
        5  probabilities and loss                    │
        6  gradients of features and local rows      │ (∂J/∂w is deferred to shard.step)
        7  sum the feature gradients over the ranks  ┘
        8  update encoder and head; then local rows  engine.end_micro_batch; shard.step

    `positives` are the instance ids of the whole global batch, int64 on the CPU; `measure`: the accuracy, too.
    """
    learning_rate, views = engine.learning_rate, _LocalViews(micro_batches, shard.group.device)
    outputs: list[ShardOutput] = []
    applied, watch = False, _Stopwatch(engine.group.device)
    shard.begin_step(positives)
    for micro_step in range(accumulation_steps):
        watch.start()
        images, ids = views.next()
        x_bD = engine(images)  # 1
        watch.stop()
        total_rows = len(ids) * shard.world_size * accumulation_steps
        outputs.append(shard.forward(x_bD.detach(), ids, total_rows=total_rows))  # 2 to 7
        if micro_step == accumulation_steps - 1:
            # Summed from all-reduced Z and Y, the loss is the same number on every rank: so is this decision.
            loss, log_z, num_zero_features = _read(outputs)
            if not math.isfinite(loss):
                break
        engine.backward(x_bD, outputs[-1].feature_gradient_bD)
        applied = engine.end_micro_batch()  # 8, encoder and head
    if not (finite := math.isfinite(loss)):
        engine.abandon_step(x_bD)
    accuracy, cosine = shard.measure(x_bD.detach(), ids) if measure and finite else (None, None)
    if applied:
        shard.step(learning_rate)  # 8, local rows of W
    else:
        shard.discard()
    return StepReport(
        loss,
        log_z,
        num_zero_features,
        learning_rate,
        applied,
        views.wait_seconds,
        watch.seconds(),
        views.unreadable,
        embeddings=None if finite else (x_bD.detach(), ids),
        instance_accuracy=accuracy,
        positive_cosine=cosine,
    )


class _LocalViews:
    """This rank's micro-batches on the device, the seconds waited for them, and unreadable images (id → why)."""

    def __init__(self, micro_batches: Iterator[ViewBatch], device: torch.device) -> None:
        self._micro_batches, self._device = micro_batches, device
        self.wait_seconds = 0.0
        self.unreadable: dict[int, str] = {}

    def next(self) -> tuple[Tensor, Tensor]:
        """Images (V·b, 3, S, S) and ids (V·b,) of the next micro-batch."""
        started = time.perf_counter()
        batch = next(self._micro_batches)
        self.wait_seconds += time.perf_counter() - started
        self.unreadable |= batch.unreadable or {}
        return flatten_views(batch, self._device)


class _Stopwatch:
    """Times this rank's work between collectives; on a GPU by events in its stream, so that the host need not wait."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda, self._seconds, self._began = device.type == "cuda", 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        if self._on_cuda:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        self._began = time.perf_counter()

    def stop(self) -> None:
        self._seconds += time.perf_counter() - self._began
        if self._on_cuda:
            self._events[-1][1].record()

    def seconds(self) -> float:
        """The longer of host and GPU time; call it once the GPU has reached the last stop."""
        return max(self._seconds, sum(start.elapsed_time(stop) for start, stop in self._events) / 1e3)


def _read(outputs: list[ShardOutput]) -> tuple[float, float, int]:
    """Reads loss, mean log Z and zero features of a step at once: each read makes the host wait for its GPU."""
    sums = [torch.stack([output.loss, output.log_z, output.num_zero_features]) for output in outputs]
    loss, log_z, zero_features = torch.stack(sums).sum(dim=0).tolist()
    return loss, log_z / len(outputs), 0 if math.isnan(zero_features) else int(zero_features)


def flatten_views(batch: ViewBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Moves views to the device, as images (V·b, 3, S, S) and ids (V·b,), and applies the colours left to the device.

    The images have the backbone's memory layout; it would keep a second copy otherwise.
    """
    images = batch.views.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
    if batch.colours is not None:
        images = apply_colours(images, batch.colours.transpose(0, 1).flatten(0, 1))
    return channels_last(images), batch.ids.to(device, non_blocking=True).repeat(batch.views.shape[1])


def train_epoch(
    engine: Engine,
    shard: ClassifierShard,
    micro_batches: Iterable[ViewBatch],
    *,
    steps: range,
    accumulation_steps: int,
    positives_of: Callable[[int], Tensor],
    measure_every_steps: int,
    on_step: Callable[[int, StepReport | None], None],
    skipped: Container[int] = (),
) -> None:
    """Trains some steps of one epoch.

    Args:
        micro_batches: begin with those of the first of these steps.
        steps: within the epoch.
        positives_of: step → instance ids of its whole global batch, int64 on the CPU.
        measure_every_steps: instance accuracy and positive cosine are measured so often, and at the last step.
        on_step: called with each step and its report; None for a step that was skipped.
        skipped: steps whose data are read while nothing moves.
    """
    engine.encoder.train()
    iterator = iter(micro_batches)
    for step in steps:
        if step in skipped:
            for _ in range(accumulation_steps):
                next(iterator)
            engine.steps_taken += 1
            shard.discard()
            on_step(step, None)
            continue
        measure = (step + 1) % measure_every_steps == 0 or step == steps[-1]
        on_step(step, train_step(engine, shard, iterator, accumulation_steps, positives_of(step), measure=measure))
