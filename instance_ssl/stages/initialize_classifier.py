"""Stage 1: the classifier's weights from a fixed random network (the contrastive prior)."""

import hashlib
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from instance_ssl.checkpoint.directory import DirectoryWriter, clear_leftovers, content_bytes
from instance_ssl.checkpoint.state import (
    TrainingPosition,
    checkpoint_bytes,
    load_encoder,
    load_rows,
    newest_checkpoint,
    start_checkpoint,
)
from instance_ssl.classifier.prior import fill_unread_rows, initialize_from_features, initialize_gaussian
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.data.augmentations import centre_view
from instance_ssl.data.sampler import epoch_order
from instance_ssl.errors import UserError
from instance_ssl.files.disk_space import find_no_space
from instance_ssl.models.encoder import Encoder
from instance_ssl.run.broken_images import BrokenImages, TooManyBroken, readable_batches
from instance_ssl.run.build import (
    classifier_shard,
    describe_encoder,
    describe_stem_cost,
    moving_statistics,
    own_parts,
    training_shards,
    training_view,
)
from instance_ssl.run.given_weights import initial_encoder
from instance_ssl.run.resumption import accept, run_digests
from instance_ssl.run.stage import Stage
from instance_ssl.run.watchdog import Stopped

# Above all seeds of experiments, so that training never sees a random view of this pass.
_VIEW_SEEDS = 2**31


def run(stage: Stage) -> dict[str, Any]:
    """Writes checkpoint 0: the encoder to start from, with the batch-norm statistics of the pass, and W."""
    config = stage.config
    stage.log.say(describe_encoder(config))
    if stage.log.is_main and (stem_cost := describe_stem_cost(config)) is not None:
        stage.log.say(stem_cost)
    encoder, origin = initial_encoder(stage)
    shard = classifier_shard(stage)
    mode = config.classifier.initialization
    broken = BrokenImages(stage)
    broken.check_share()
    if stage.world.rank == 0:
        clear_leftovers(stage.checkpoints_of(stage.name))

    def require_space() -> None:
        size = checkpoint_bytes(shard, 0, content_bytes(encoder.state_dict()))
        if problem := find_no_space(stage.directory, size):
            raise UserError(f"{problem}, for the classifier: make room, or give a --run-dir on another disk")

    stage.on_rank_0(require_space)  # before the pass, which may take hours
    if mode == "gaussian":
        initialize_gaussian(shard, config.seed)
    else:
        _pass_over_images(stage, encoder, shard, broken)
        fill_unread_rows(shard, broken.ids, config.seed)
    path = _save(stage, encoder, shard, "checkpoints", 0)
    if stage.world.rank == 0:
        shutil.rmtree(stage.directory / "partial", ignore_errors=True)
    norms = torch.linalg.vector_norm(shard.weight.float(), dim=1)
    mean_norm = (shard.group.all_reduce_sum_(norms.sum()) / len(stage.source)).item()
    record = {"initialization": mode, "mean_row_norm": mean_norm, "broken_images": len(broken.ids), "checkpoint": path}
    return record if origin is None else {**record, "initial_weights": origin}


def _pass_over_images(stage: Stage, encoder: Encoder, shard: ClassifierShard, broken: BrokenImages) -> None:
    """Makes the pass, resuming from what an earlier stop saved.

    Its `step` is the number of global batches done, which are the same on any number of ranks.
    """
    mode, skips = stage.config.classifier.initialization, stage.config.data.on_broken == "skip"
    done = 0
    partial = newest_checkpoint(stage.directory / "partial", stage.world)
    digests = {} if partial is None else partial.position.digests
    known = digests.get("order", ""), digests.get("images")
    if partial is not None and known != (_order_digest(stage), stage.source.digest):
        stage.log.say("the images have changed, or lie in other shards than before: the pass begins again")
        stage.on_rank_0(lambda: shutil.rmtree(stage.directory / "partial"))
        partial = None
    if partial is not None:
        accept(partial, stage)
        stage.together(lambda: load_rows(partial, shard))
        encoder.load_state_dict(stage.together(lambda: load_encoder(partial))[0])
        done = partial.position.step
        stage.log.say(f"resuming from {partial.directory}: {done} batches done")
    size = stage.config.classifier.initialization_batch_size
    images_done = min(done * size, len(stage.source))
    progress = stage.log.progress(f"initialise ({mode})", len(stage.source), "images", initial=images_done)

    def on_batch(num_images: int) -> None:
        nonlocal done
        done += 1
        progress.advance(num_images)
        if skips and broken.anyone_has_news():
            broken.share()
            broken.check_share()
        stage.check_together()

    batches = _own_batches(stage, done, broken)
    try:
        with progress, stage.autocast():
            initialize_from_features(
                shard, encoder, batches, mode, stage.world,
                batches_done=done, moving=moving_statistics(encoder, stage.config), on_batch=on_batch,
            )  # fmt: skip
    except (Stopped, TooManyBroken):
        _save(stage, encoder, shard, "partial", done)
        raise


def _save(stage: Stage, encoder: Encoder, shard: ClassifierShard, folder: str, step: int) -> str:
    digests = run_digests(stage) | {"order": _order_digest(stage)}
    width = stage.config.model.embedding_dim
    position = TrainingPosition(step, 0, len(stage.source), width, stage.world.size, digests=digests)
    state = {name: value.cpu() for name, value in encoder.state_dict().items()}
    buffers = {name: value.cpu() for name, value in encoder.named_buffers()}
    writer = DirectoryWriter(stage.directory / folder, stage.world, keep=1, is_permanent=lambda step: False)
    start_checkpoint(writer, position, state, {}, buffers, shard, stage.world)
    return str(writer.commit().relative_to(stage.run_directory))


def _order_digest(stage: Stage) -> str:
    """What the order of the images depends on beside the configuration: a pass resumes in that order alone."""
    starts = stage.source.shard_starts
    return "" if starts is None else hashlib.sha256(starts.tobytes()).hexdigest()


def _own_batches(stage: Stage, first: int, broken: BrokenImages) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of every global batch from `first` on, without what cannot be read.

    The order is shuffled by the seed: folders come sorted by class, and a batch's statistics should not.
    """
    order = epoch_order(len(stage.source), stage.config.seed, 0, training_shards(stage))
    parts = own_parts(order, stage.config.classifier.initialization_batch_size, stage.world)[first:]
    if stage.config.classifier.initialization_view == "training":
        view = training_view(stage.config.augmentation, stage.config.data)
    else:
        view = centre_view(stage.config.data.image_size)
    return readable_batches(stage, parts, broken, view, seed=stage.config.seed + _VIEW_SEEDS)
