"""Brings a run to a list of images that has changed: rewrites its newest checkpoint and its manifest.

A training starts with this when its images have changed; `runners/update_images.py` does it alone, and then also drops
the images that could not be read. Rows and momentum of the images that stay keep their bits. A new image's row is the
embedding of its evaluation view by the current encoder, scaled to the mean norm of the old rows so that a step moves it
as far as them; its momentum is 0. Ids are contiguous: images that stay keep their order, new ones follow. The epoch in
progress starts again, and steps are renumbered as if all epochs had the new length.

D/instances_map_<number>.npy maps each old id to its new one, (N,) int64, -1 where removed; D/data_changes.jsonl gains a
line. Earlier checkpoints move to D/pretrain/checkpoints_before_update_<number>.
"""

import json
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instance_ssl.checkpoint.directory import DirectoryWriter, clear_leftovers, retain, write_file
from instance_ssl.checkpoint.identity import require_same_run
from instance_ssl.checkpoint.state import (
    Checkpoint,
    TrainingPosition,
    load_encoder,
    load_own_buffers,
    load_rows,
    newest_checkpoint,
    start_checkpoint,
)
from instance_ssl.classifier.prior import fill_unread_rows, initialize_from_features, mean_row_norm
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import normalise_rows
from instance_ssl.data.augmentations import centre_view
from instance_ssl.data.image_sources import digest_of
from instance_ssl.data.list_changes import places_of
from instance_ssl.errors import UserError
from instance_ssl.evaluation.frozen_encoder import stoppable_progress
from instance_ssl.files.disk_space import saving
from instance_ssl.files.structured import read_json_lines
from instance_ssl.run import manifest, pending_update
from instance_ssl.run.broken_images import BrokenImages, readable_batches
from instance_ssl.run.broken_record import Broken, append_broken, left_out_path, read_broken, read_left_out
from instance_ssl.run.build import classifier_shard, own_parts, seeded_encoder
from instance_ssl.run.checks import absent_checkpoint
from instance_ssl.run.directory import locked
from instance_ssl.run.resumption import log_oddities, run_digests
from instance_ssl.run.stage import Stage


def run(stage: Stage) -> dict[str, Any]:
    """Updates the run now, rather than when its training starts next.

    Raises:
        UserError: when a training of the run is running, and as `newest_of_these_images`.
    """
    training = stage.run_directory / "pretrain"
    with ExitStack() as held:

        def enter() -> None:
            training.mkdir(exist_ok=True)
            held.enter_context(locked(training))
            clear_leftovers(training / "checkpoints")

        stage.on_rank_0(enter)
        found = newest_of_these_images(stage)
    stage.log.say(f"{found.directory} is of these {len(stage.source)} images")
    return {"num_instances": len(stage.source), "step": found.position.step}


def newest_of_these_images(stage: Stage) -> Checkpoint:
    """The run's newest checkpoint, rewritten if it is of other images. Collective.

    The caller has the training's directory locked.

    Raises:
        UserError: when there is none, it is of another run, too many images cannot be read, or it cannot be written.
        RankError: when a new image cannot be read and `data.on_broken` is `error`.
    """
    found = newest_checkpoint(stage.checkpoints_of("pretrain"), stage.world)
    found = found or newest_checkpoint(stage.checkpoints_of("initialize_classifier"), stage.world)
    if found is None:
        raise UserError(absent_checkpoint(stage.run_directory, "initialize_classifier"))
    log_oddities(found, stage)
    is_other = found.position.digests.get("images", stage.source.digest) != stage.source.digest
    # Earlier versions had excluded classes, and epochs of several lengths.
    has_left_out = stage.on_rank_0(left_out_path(stage.run_directory).exists)
    if is_other or has_left_out or len(found.position.stretches) > 1:
        _rewrite(stage, found)
        found = newest_checkpoint(stage.checkpoints_of("pretrain"), stage.world)
        assert found is not None
    require_same_run(found, run_digests(stage))
    return found


def _rewrite(stage: Stage, start: Checkpoint) -> None:
    """Rewrites `start` for the current images and makes it the run's newest checkpoint."""
    old_ids_N = stage.on_rank_0(lambda: _old_ids(stage, start))
    num_kept, old = int((old_ids_N >= 0).sum()), start.position
    removed, added = old.num_instances - num_kept, len(old_ids_N) - num_kept
    how = f" (classes {num_kept} to {len(old_ids_N) - 1}, their rows from their features)" if added else ""
    stage.log.say(f"updating the images: {removed} of {old.num_instances} removed, {added} added{how}")
    if old.step != old.epoch * _epoch_length(stage, old.num_instances):
        stage.log.say(f"the training was in the middle of epoch {old.epoch + 1}, which begins again")
    shard = classifier_shard(stage)
    stage.together(lambda: load_rows(start, shard, torch.from_numpy(old_ids_N[shard.start : shard.stop])))
    if shard.sampler is not None:
        new_ids = torch.from_numpy(_new_ids(old_ids_N, old.num_instances))[shard.sampler.recent_classes]
        shard.sampler.recent_classes = new_ids[new_ids >= 0]
    new = torch.from_numpy((old_ids_N < 0).nonzero()[0])
    state, optimizer = stage.together(lambda: load_encoder(start))
    _add_rows(stage, shard, state, new)
    folder = stage.on_rank_0(lambda: _begin(stage))
    writer = DirectoryWriter(folder / "checkpoints", stage.world, keep=1, is_permanent=lambda step: False)
    own_buffers = stage.together(lambda: load_own_buffers(start, stage.world))
    if own_buffers is None:
        own_buffers = {name: state[name] for name, _ in seeded_encoder(stage.config).named_buffers()}
    start_checkpoint(writer, _position(stage, start), state, optimizer, own_buffers, shard, stage.world)
    writer.commit()
    stage.on_rank_0(lambda: _commit(stage, start, old_ids_N, folder))


def _old_ids(stage: Stage, start: Checkpoint) -> np.ndarray:
    """(N,) int64: the id that each image has in the checkpoint, -1 for a new one."""
    position, source = start.position, stage.source
    if position.digests.get("images") == source.digest:
        return np.arange(len(source))
    names, sizes = manifest.known_images(stage.run_directory, position.num_instances)
    if sizes is None or position.digests.get("images") != digest_of(names, sizes, source.rendering):
        raise UserError(f"{start.directory} is of a run with other images: give that run's own --run-dir")
    places = places_of(names, source.names)
    is_there = places >= 0
    is_there[is_there] = source.columns["sizes"][places[is_there]] == sizes[is_there]  # else a repaired, new image
    old_ids_N = np.full(len(source), -1, np.int64)
    old_ids_N[places[is_there]] = is_there.nonzero()[0]
    return old_ids_N


def _new_ids(old_ids_N: np.ndarray, num_old: int) -> np.ndarray:
    """(num_old,) int64: the new id of each old one, -1 where it is removed."""
    new_ids = np.full(num_old, -1, np.int64)
    kept = (old_ids_N >= 0).nonzero()[0]
    new_ids[old_ids_N[kept]] = kept
    return new_ids


class _ScaledRows:
    """Takes embeddings as rows of a shard, all of one norm."""

    def __init__(self, shard: ClassifierShard, norm: float) -> None:
        self._shard, self._norm = shard, norm

    def assign(self, x_BD: Tensor, instance_id_B: Tensor) -> None:
        """Writes those of (B, D) that the shard has."""
        self._shard.assign(normalise_rows(x_BD.float())[0] * self._norm, instance_id_B)


def _add_rows(stage: Stage, shard: ClassifierShard, state: dict[str, Tensor], new: Tensor) -> None:
    """Fills the rows of these images, (m,) int64 on the CPU."""
    broken = BrokenImages(stage)
    if len(new):
        encoder = seeded_encoder(stage.config)
        encoder.load_state_dict(state)
        rows = _ScaledRows(shard, mean_row_norm(shard))
        parts = own_parts(new, stage.config.classifier.initialization_batch_size, stage.world)
        batches = readable_batches(stage, parts, broken, centre_view(stage.config.data.image_size))
        encoder = encoder.to(stage.world.device)
        with stoppable_progress(stage, "new rows", len(new), "images") as on_batch, stage.autocast():
            initialize_from_features(rows, encoder, batches, "frozen", stage.world, on_batch=on_batch)
    if broken.anyone_has_news():
        broken.share()
    broken.check_share()
    fill_unread_rows(shard, broken.ids, stage.config.seed)


def _position(stage: Stage, start: Checkpoint) -> TrainingPosition:
    """The beginning of the epoch that the checkpoint is in."""
    return replace(
        start.position,
        step=start.position.epoch * _epoch_length(stage, len(stage.source)),
        num_instances=len(stage.source),
        world_size=stage.world.size,
        digests=run_digests(stage),
        stretches=[],
    )


def _epoch_length(stage: Stage, num_instances: int) -> int:
    return num_instances // stage.config.optimization.global_batch_size


def _begin(stage: Stage) -> Path:
    """The folder of the new state. First records as broken what an earlier version excluded for that reason."""
    run_directory = stage.run_directory
    left_out = {index: why for index, why in read_left_out(run_directory).items() if why is not None}
    if left_out:
        names, sizes = manifest.known_images(run_directory, max(left_out) + 1)
        known = read_broken(run_directory)
        found = {
            names[index]: Broken(0 if sizes is None else int(sizes[index]), why) for index, why in left_out.items()
        }
        append_broken(run_directory, {name: broken for name, broken in found.items() if name not in known})
    with saving(run_directory / "update"):
        return pending_update.begin(run_directory)


def _commit(stage: Stage, start: Checkpoint, old_ids_N: np.ndarray, folder: Path) -> None:
    run_directory, old = stage.run_directory, start.position
    changes = run_directory / "data_changes.jsonl"
    with saving(changes):
        manifest.write_manifest(stage.source, folder)
        retired = pending_update.retired_checkpoints(run_directory)
        number = int(retired.name.rpartition("_")[2])
        map_name = f"instances_map_{number}.npy"
        manifest.write_array(_new_ids(old_ids_N, old.num_instances), folder / map_name)
        change = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "before": {"num_instances": old.num_instances, "digest": old.digests.get("images")},
            "now": {"num_instances": len(stage.source), "digest": stage.source.digest},
            "epoch": old.epoch,
            "step_before": old.step,
            "step_now": _position(stage, start).step,
            "map": map_name,
        }
        text = changes.read_text() if changes.exists() else ""
        write_file(folder / changes.name, text + json.dumps(change) + "\n")
        metrics = run_directory / "pretrain/metrics.jsonl"
        if metrics.exists():
            write_file(folder / metrics.name, _renumbered_metrics(stage, start, metrics))
        pending_update.commit(run_directory)
    if retired.exists():
        every = stage.config.checkpoint.keep_every_epochs
        length = _epoch_length(stage, old.num_instances)
        retain(retired, 1, lambda step: every is not None and step % (every * length) == 0)
        stage.log.say(f"the checkpoint of before is kept in {retired}: remove it once nothing needs it")


def _renumbered_metrics(stage: Stage, start: Checkpoint, path: Path) -> str:
    """The metrics of whole epochs, at the steps of epochs of the new length."""
    position, lines = start.position, []
    stretches = position.stretches or [(0, 0, _epoch_length(stage, position.num_instances))]
    per_epoch = _epoch_length(stage, len(stage.source))
    for line in read_json_lines(path)[0]:
        if type(step := line.get("step")) is not int or step > position.step:
            continue
        first_step, first_epoch, length = next((part for part in reversed(stretches) if part[0] < step), stretches[0])
        epochs = first_epoch + (step - first_step) / length
        if epochs <= position.epoch:
            lines.append(json.dumps({**line, "step": round(epochs * per_epoch)}) + "\n")
    return "".join(lines)
