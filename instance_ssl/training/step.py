"""The training loop: the paper's eight steps, and an epoch of them."""

import math
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from instance_ssl import faults
from instance_ssl.classifier.shard import ClassifierShard, ShardOutput
from instance_ssl.data.colour import apply_colours
from instance_ssl.data.views import ViewBatch
from instance_ssl.models.backbones import channels_last
from instance_ssl.training.engine import Engine
from instance_ssl.training.stopwatch import Stopwatch


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step found.

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
        instance_accuracy: of the last micro-batch against all N classes, a fraction, where it was measured.
        positive_cosine: mean cos(w_i, x_i) of the last micro-batch, where it was measured.
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
    """One optimizer step of encoder and classifier: the eight steps of the paper's "Hybrid Parallelism".

    `positives` are the instance ids of the whole global batch, int64 on the CPU.
    """
    learning_rate, rank = engine.learning_rate, engine.group.rank
    outputs: list[ShardOutput] = []
    unreadable: dict[int, str] = {}
    data_wait_seconds, applied, watch = 0.0, False, Stopwatch(engine.group.device)
    shard.begin_step(positives)
    for micro_step in range(accumulation_steps):
        watch.start()
        started = time.perf_counter()
        batch = next(micro_batches)
        data_wait_seconds += time.perf_counter() - started
        unreadable |= batch.unreadable or {}
        images, ids = flatten_views(batch, shard.group.device)
        if faults.reach("step", rank, engine.steps_taken) == "nan":
            images = torch.full_like(images, torch.nan)
        total_rows = len(ids) * shard.world_size * accumulation_steps
        x_bD = engine(images)  # 1: features of own rows
        watch.stop()
        outputs.append(shard.forward(x_bD.detach(), ids, total_rows=total_rows))  # 2-7: gather … own features' gradient
        if micro_step == accumulation_steps - 1:
            # Summed from all-reduced Z and Y, the loss is the same number on every rank: so is this decision.
            loss, log_z, num_zero_features = _read(outputs)
            if faults.reach("loss", rank, engine.steps_taken) == "spike":
                loss *= 1e4
            if not math.isfinite(loss):
                break
        engine.backward(x_bD, outputs[-1].feature_gradient_bD)
        applied = engine.end_micro_batch()
    if not (finite := math.isfinite(loss)):
        engine.abandon_step(x_bD)
    accuracy, cosine = shard.measure(x_bD.detach(), ids) if measure and finite else (None, None)
    if applied:  # 8: the engine has updated encoder and head; now the rows of W
        shard.step(learning_rate)
    else:
        shard.discard()
    return StepReport(
        loss,
        log_z,
        num_zero_features,
        learning_rate,
        applied,
        data_wait_seconds,
        watch.seconds(),
        unreadable,
        embeddings=None if finite else (x_bD.detach(), ids),
        instance_accuracy=accuracy,
        positive_cosine=cosine,
    )


def _read(outputs: list[ShardOutput]) -> tuple[float, float, int]:
    """Loss, mean log Z and zero features of a step, read together: each reading makes the host wait for its GPU."""
    figures = [torch.stack([output.loss, output.log_z, output.num_zero_features]) for output in outputs]
    loss, log_z, zero_features = torch.stack(figures).sum(dim=0).tolist()
    return loss, log_z / len(outputs), 0 if math.isnan(zero_features) else int(zero_features)


def flatten_views(batch: ViewBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """The views as images (V·b, 3, S, S) and their ids (V·b,), on the device, which does the colours left to it.

    Laid out as the backbone wants them, which would keep a second copy otherwise.
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
    """These optimizer steps of one epoch, whose micro-batches begin with the first of them.

    `positives_of(step)` are the instance ids of a whole global batch. `on_step(step, report)` follows each step. A step
    in `skipped` reads its data but moves nothing, and its report is None.
    Instance accuracy and positive cosine are measured every `measure_every_steps` steps and at the last.
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
