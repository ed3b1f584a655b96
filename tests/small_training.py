"""A few steps of the real encoder, engine and shard on images made up on the spot, for tests that compare settings."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.deepspeed import DeepSpeedSettings, load_ds_config
from instance_ssl.data.sampler import GlobalBatchSampler
from instance_ssl.data.views import ViewBatch
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.models.encoder import Encoder, build_encoder
from instance_ssl.training.engine import Engine
from instance_ssl.training.optimizers import OptimizerOptions
from instance_ssl.training.step import train_step

N, D, K, V, SIZE, GLOBAL_BATCH, STEPS = 96, 16, 5, 2, 16, 32, 4
TEMPERATURE = 0.15


@dataclass(frozen=True)
class Trained:
    """What a run was like and what it left.

    Attributes:
        losses: of every step.
        state, momentum: the encoder's, whole.
        weight: this rank's rows of W.
    """

    losses: list[float]
    state: dict[str, Tensor]
    momentum: dict[str, Tensor]
    weight: Tensor


def settings_from(path: Path, world_size: int) -> DeepSpeedSettings:
    return load_ds_config(path, global_batch_size=GLOBAL_BATCH, max_grad_norm=0.0, world_size=world_size)


def make_encoder(*, recompute_stages: bool = False) -> Encoder:
    torch.manual_seed(3)
    return build_encoder(
        backbone="small_cnn", stem="auto", image_size=SIZE, projection="mlp", projection_hidden_dim=None,
        embedding_dim=D, recompute_stages=recompute_stages,
    )  # fmt: skip


def views_of(ids: Tensor) -> Tensor:
    """(b, V, 3, S, S): a pattern of each id's own under noise of each view's own."""
    views = []
    for index in ids.tolist():
        generator = torch.Generator().manual_seed(index)
        pattern = torch.randn(3, SIZE, SIZE, generator=generator)
        views.append(pattern + torch.randn(V, 3, SIZE, SIZE, generator=generator))
    return torch.stack(views)


def micro_batches(group: Group, settings: DeepSpeedSettings) -> list[ViewBatch]:
    """Those of `STEPS` steps."""
    sampler = GlobalBatchSampler(N, GLOBAL_BATCH, settings.micro_batch_size, group.rank, group.size, seed=0)
    batches = []
    while len(batches) < STEPS * settings.accumulation_steps:
        ids = [torch.tensor([index for _, index in keys]) for keys in sampler]
        batches += [ViewBatch(views_of(ids_b), ids_b) for ids_b in ids]
        sampler.epoch += 1
    return batches


def train(group: Group, settings: DeepSpeedSettings) -> Trained:
    """`STEPS` steps from the same start, whatever the settings."""
    options = SoftmaxOptions(
        temperature=TEMPERATURE, form="mixture", block_bytes=settings.block_bytes, matmul_dtype=settings.matmul_dtype
    )
    own_group, replicas = comm.split(group, settings.group_size(group.size))
    shard = ClassifierShard(
        N, D, own_group, options, replicas=replicas, smoothing_factor=0.2, momentum=0.9, weight_decay=1e-4,
        row_dtype=settings.row_dtype, momentum_dtype=settings.momentum_dtype,
    )  # fmt: skip
    weight_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(4))
    shard.weight.copy_(weight_ND[shard.start : shard.stop])
    shard.refresh_hard_classes(K)
    encoder = make_encoder(recompute_stages=settings.recompute_stages)
    engine = Engine(encoder, lambda step: 0.5, settings, group, OptimizerOptions(momentum=0.9, weight_decay=1e-4))
    engine.encoder.train()
    batches = iter(micro_batches(group, settings))
    not_sampled = torch.empty(0, dtype=torch.int64)
    losses = [train_step(engine, shard, batches, settings.accumulation_steps, not_sampled).loss for _ in range(STEPS)]
    state, optimizer = engine.full_state()
    momentum = {name: slots["momentum_buffer"] for name, slots in optimizer.items()}
    return Trained(losses, state, momentum, shard.weight)
