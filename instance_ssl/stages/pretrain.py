"""Stage 2: epochs of instance classification, with the hardest classes refreshed before each."""

import gc
from collections.abc import Mapping
from typing import Any

import torch

from instance_ssl.checkpoint.directory import clear_leftovers, content_bytes
from instance_ssl.checkpoint.state import Checkpoint, checkpoint_bytes, load_encoder, load_own_buffers, load_rows
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.data.loaders import view_loader
from instance_ssl.data.sampler import GlobalBatchSampler
from instance_ssl.errors import UserError, reason
from instance_ssl.files.atomic import write_json
from instance_ssl.files.structured import MalformedError, read_json
from instance_ssl.run.broken_images import BrokenImages
from instance_ssl.run.build import classifier_shard, seeded_encoder, training_shards, training_views
from instance_ssl.run.directory import require_space
from instance_ssl.run.precision import say_if_changed
from instance_ssl.run.stage import Stage
from instance_ssl.run.training_session import Rollback, TrainingSession
from instance_ssl.stages import update_images
from instance_ssl.training.engine import Engine
from instance_ssl.training.optimizers import OptimizerOptions, learning_rate_scales, state_size
from instance_ssl.training.schedules import warmup_cosine
from instance_ssl.training.step import train_epoch

_SKIPPED = "left_out_steps.json"


def run(stage: Stage) -> dict[str, Any]:
    """Trains from the newest checkpoint of this stage, or else from the initialised classifier, to the last epoch."""
    if stage.world.rank == 0:
        clear_leftovers(stage.checkpoints_of(stage.name))
    while True:
        start = _starting_checkpoint(stage)
        skipped = _skipped_steps(stage)
        try:
            if (result := _train(stage, start, skipped)) is not None:
                return result
            stage.log.say("the backbone is trained from now on")
        except Rollback as rollback:
            stage.log.say(f"going back to the newest checkpoint; step {rollback.step} is skipped from now on")
            if stage.world.rank == 0:
                write_json(stage.directory / _SKIPPED, {"steps": sorted({*skipped, rollback.step})})
        gc.collect()  # the old engine refers to itself, and holds the encoder's memory


def _train(stage: Stage, start: Checkpoint, skipped_steps: frozenset[int]) -> dict[str, Any] | None:
    """Trains to the last epoch, or with a frozen backbone to its last frozen epoch (None).

    Training then resumes from the checkpoint of that epoch, with another engine: the thaw is a resume.
    """
    config, optimization = stage.config, stage.config.optimization
    sampler = GlobalBatchSampler(
        len(stage.source),
        optimization.global_batch_size,
        stage.ds.micro_batch_size,
        stage.world.rank,
        stage.world.size,
        config.seed,
        training_shards(stage),
    )
    if sampler.num_dropped:
        stage.log.say(
            f"{sampler.num_dropped} of {len(stage.source)} images, other ones each epoch, do not fill a global batch "
            f"of {sampler.global_batch_size} and are dropped"
        )
    skips = config.data.on_broken == "skip"
    loader = view_loader(training_views(config, stage.source), sampler, config.data.num_workers, skip_broken=skips)
    shard = classifier_shard(stage)
    stage.together(lambda: load_rows(start, shard))
    broken = BrokenImages(stage)
    broken.check_share()
    engine = _build_engine(stage, start, sampler.steps_per_epoch)
    _require_space(stage, engine, shard)
    total_steps = optimization.epochs * sampler.steps_per_epoch
    last_step = config.model.freeze_epochs * sampler.steps_per_epoch if _is_frozen(stage, start) else total_steps
    stage.log.forget_after(start.position.step)
    with stage.log.progress("pretrain", total_steps, "steps", initial=start.position.step) as progress:
        session = TrainingSession(stage, engine, shard, sampler.steps_per_epoch, broken, start, progress)
        while session.step < last_step:
            sampler.epoch, sampler.start_step = divmod(session.step, sampler.steps_per_epoch)
            first_step = session.step - sampler.start_step
            if sampler.start_step == 0:
                _refresh_hard_classes(stage, shard, session)
            train_epoch(
                engine,
                shard,
                loader,
                steps=range(sampler.start_step, sampler.steps_per_epoch),
                accumulation_steps=sampler.accumulation_steps,
                positives_of=sampler.global_batch,
                measure_every_steps=config.log.every_steps,
                on_step=session.after_step,
                skipped={step - first_step for step in skipped_steps},
            )
        session.finish()
    if last_step < total_steps:
        return None
    counts = {"epochs": optimization.epochs, "steps": total_steps, "broken_images": len(broken.ids)}
    return {**counts, **session.figures}


def _starting_checkpoint(stage: Stage) -> Checkpoint:
    found = update_images.newest_of_these_images(stage)
    if found.directory.parent == stage.checkpoints_of(stage.name):
        position = found.position
        stage.log.say(f"resuming from {found.directory}: {position.epoch} epochs done, {position.step} steps in all")
        say_if_changed(found, stage.ds.matmul_dtype, stage.log)
    return found


def _build_engine(stage: Stage, start: Checkpoint, steps_per_epoch: int) -> Engine:
    """The engine with the checkpoint's encoder and optimizer state."""
    optimization = stage.config.optimization
    encoder = seeded_encoder(stage.config, recompute_stages=stage.ds.recompute_stages)
    state, optimizer_state = stage.together(lambda: load_encoder(start))
    encoder.load_state_dict(state)
    if _is_frozen(stage, start):
        stage.log.say(f"the backbone is frozen for the first {stage.config.model.freeze_epochs} epochs")
        encoder.freeze_backbone()

    def schedule(step: int) -> float:
        return warmup_cosine(
            step,
            peak=optimization.peak_learning_rate,
            warmup_steps=optimization.warmup_epochs * steps_per_epoch,
            total_steps=optimization.epochs * steps_per_epoch,
        )

    options = OptimizerOptions(
        optimization.optimizer,
        optimization.momentum,
        optimization.weight_decay,
        optimization.backbone_learning_rate_multiplier,
        optimization.layer_decay,
    )
    stage.log.say(_describe_rates(stage.config, learning_rate_scales(encoder, options)))
    engine = Engine(encoder, schedule, stage.ds, stage.world, options, first_step=start.position.step)
    engine.load_optimizer(optimizer_state)
    engine.loss_scale = start.position.loss_scale
    own_buffers = stage.together(lambda: load_own_buffers(start, stage.world))
    if own_buffers is not None:
        engine.encoder.load_state_dict(own_buffers, strict=False)
    return engine


def _describe_rates(config: ExperimentConfig, scales: Mapping[str, float]) -> str:
    """The log line of the optimizers and their learning rates at the end of the warm-up."""
    peak, lowest = config.optimization.peak_learning_rate, min(scales.values())
    backbone = f", down to {lowest * peak:.2g} in the backbone" if lowest < 1 else ""
    own = config.classifier_peak_learning_rate * config.classifier.learning_rate_multiplier
    return f"optimizer: {config.optimization.optimizer}, learning rate {peak:.3g}{backbone}; W: sgd, {own:.3g}"


def _is_frozen(stage: Stage, start: Checkpoint) -> bool:
    return start.position.epoch < stage.config.model.freeze_epochs


def _require_space(stage: Stage, engine: Engine, shard: ClassifierShard) -> None:
    state_bytes = torch.float32.itemsize * state_size(engine.encoder, stage.config.optimization.optimizer)
    encoder_bytes = content_bytes(engine.encoder.state_dict()) + state_bytes
    size = checkpoint_bytes(shard, stage.config.classifier.num_hard_classes, encoder_bytes)
    stage.on_rank_0(lambda: require_space(stage.checkpoints_of(stage.name), size, stage.config.checkpoint.keep))


def _refresh_hard_classes(stage: Stage, shard: ClassifierShard, session: TrainingSession) -> None:
    """At the start of an epoch; a stop in it repeats it on resume."""
    num_hard_classes = stage.config.classifier.num_hard_classes
    with stage.log.progress("hardest classes", 1, "passes") as progress:

        def on_block(done: int, blocks: int) -> None:
            progress.set(done, blocks)
            session.check_together()

        def on_not_finite(count: int) -> None:
            stage.log.say(f"warning: {count} classes have rows that are not finite: excluded from the hardest classes")

        shard.refresh_hard_classes(num_hard_classes, on_block, on_not_finite)


def _skipped_steps(stage: Stage) -> frozenset[int]:
    """Steps of the whole training that earlier rollbacks skip."""
    path = stage.directory / _SKIPPED

    def read() -> list[int]:
        try:
            steps = read_json(path).get("steps") if path.exists() else []
            if not isinstance(steps, list) or any(type(step) is not int or step < 0 for step in steps):
                raise MalformedError("it must hold a list of steps")
            return steps
        except (OSError, MalformedError) as error:
            raise UserError(
                f"{path} is damaged ({reason(error)}): restore it, or remove it to train on the steps that were "
                "skipped after a spike of the loss"
            ) from None

    return frozenset(stage.on_rank_0(read))
