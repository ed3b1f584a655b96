"""Stage 1: the classifier's weights from a fixed random network (the contrastive prior)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from instance_ssl.checkpoint import TrainingPosition, save_checkpoint
from instance_ssl.classifier.initialization import initialize_from_features, initialize_gaussian
from instance_ssl.data.augmentations import centre_view
from instance_ssl.data.loaders import epoch_order, image_loader
from instance_ssl.stages.build import classifier_shard, describe_encoder, own_parts, seeded_encoder
from instance_ssl.stages.context import Stage


def run(stage: Stage) -> dict[str, Any]:
    """Writes checkpoint 0: the random encoder, with the batch-norm statistics of the pass, and W."""
    config = stage.config
    stage.log.say(describe_encoder(config))
    encoder = seeded_encoder(config).to(stage.world.device)
    shard = classifier_shard(stage)
    mode = config.classifier.initialization
    if mode == "gaussian":
        initialize_gaussian(shard, config.seed)
    else:
        batches = _own_batches(stage)
        with stage.log.progress(f"initialise ({mode})", len(stage.source), "images") as progress, stage.autocast():
            initialize_from_features(shard, encoder, batches, mode, stage.world, on_batch=progress.advance)
    position = TrainingPosition(0, 0, len(stage.source), config.model.embedding_dim)
    state = {name: value.cpu() for name, value in encoder.state_dict().items()}
    momentum = {name: torch.zeros_like(value, device="cpu") for name, value in encoder.named_parameters()}
    path = save_checkpoint(stage.checkpoints_of(stage.name), position, state, momentum, shard, stage.world, keep=1)
    norms = torch.linalg.vector_norm(shard.weight.float(), dim=1)
    mean_norm = (shard.group.all_reduce_sum_(norms.sum()) / len(stage.source)).item()
    checkpoint = str(path.relative_to(stage.run_directory))
    return {"initialization": mode, "mean_row_norm": mean_norm, "checkpoint": checkpoint}


def _own_batches(stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of every global batch, in an order shuffled by the seed.

    Folders come sorted by class, and a batch's statistics should not.
    """
    data = stage.config.data
    order = epoch_order(len(stage.source), stage.config.seed, epoch=0)
    parts = own_parts(order, stage.config.classifier.initialization_batch_size, stage.world)
    view = centre_view(data.image_size)
    loaded = iter(image_loader(stage.source, view, [part for part in parts if part], data.num_workers))
    nothing = torch.empty(0, 3, data.image_size, data.image_size), torch.empty(0, dtype=torch.int64)
    for part in parts:
        yield next(loaded) if part else nothing
