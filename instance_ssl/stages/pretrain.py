"""Stage 2: epochs of instance classification, with the hardest classes found anew before each."""

from typing import Any

from instance_ssl.checkpoint import (
    Checkpoint,
    TrainingPosition,
    load_encoder,
    load_rows,
    newest_checkpoint,
    save_checkpoint,
)
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.data.loaders import GlobalBatchSampler, ViewDataset, view_loader
from instance_ssl.engine import Engine
from instance_ssl.errors import UserError
from instance_ssl.metrics import TrainingMeter
from instance_ssl.pretraining import StepReport, train_epoch
from instance_ssl.run_log import Progress
from instance_ssl.schedules import warmup_cosine
from instance_ssl.stages.build import classifier_shard, seeded_encoder, training_view
from instance_ssl.stages.context import Stage


def run(stage: Stage) -> dict[str, Any]:
    """Trains from the newest checkpoint of this stage, or else from the initialised classifier, to the last epoch."""
    config = stage.config
    optimization = config.optimization
    sampler = GlobalBatchSampler(
        len(stage.source),
        optimization.global_batch_size,
        stage.ds.micro_batch_size,
        stage.world.rank,
        stage.world.size,
        config.seed,
    )
    _describe(stage, sampler)
    start = _starting_checkpoint(stage)
    shard = classifier_shard(stage)
    load_rows(start, shard)
    engine = _build_engine(stage, start, sampler.steps_per_epoch)
    view = training_view(config.augmentation, config.data)
    dataset = ViewDataset(stage.source, view, config.augmentation.num_views, config.seed)
    loader = view_loader(dataset, sampler, config.data.num_workers)
    total_steps = optimization.epochs * sampler.steps_per_epoch
    figures = start.position.figures
    with stage.log.progress("pretrain", total_steps, "steps", initial=start.position.step) as progress:
        for epoch in range(start.position.epoch, optimization.epochs):
            _refresh_hard_classes(stage, shard)
            sampler.epoch = epoch
            writer = _EpochWriter(stage, epoch, sampler.steps_per_epoch, progress)
            train_epoch(
                engine,
                shard,
                loader,
                steps=sampler.steps_per_epoch,
                accumulation_steps=sampler.accumulation_steps,
                positives_of=sampler.global_batch,
                measure_every_steps=config.log.every_steps,
                on_step=writer.write,
            )
            figures = writer.summary()
            if (epoch + 1) % config.log.checkpoint_every_epochs == 0 or epoch + 1 == optimization.epochs:
                steps_done = (epoch + 1) * sampler.steps_per_epoch
                _save(stage, engine, shard, steps_done, epoch + 1, figures)
    return {"epochs": optimization.epochs, "steps": total_steps, **figures}


def _describe(stage: Stage, sampler: GlobalBatchSampler) -> None:
    if sampler.num_dropped:
        stage.log.say(
            f"{sampler.num_dropped} of {len(stage.source)} images, other ones each epoch, do not fill a global batch "
            f"of {sampler.global_batch_size} and are left out"
        )


def _starting_checkpoint(stage: Stage) -> Checkpoint:
    found = newest_checkpoint(stage.checkpoints_of(stage.name), stage.world)
    if found is not None:
        stage.log.say(f"resuming from {found.directory}: {found.position.epoch} epochs done")
        return found
    found = newest_checkpoint(stage.checkpoints_of("initialize_classifier"), stage.world)
    if found is None:
        raise UserError(
            f"{stage.run_directory} has no initialised classifier: run runners/initialize_classifier.py "
            "with the same flags first, or runners/pipeline.py for all stages"
        )
    return found


def _build_engine(stage: Stage, start: Checkpoint, steps_per_epoch: int) -> Engine:
    optimization = stage.config.optimization
    encoder = seeded_encoder(stage.config, recompute_stages=stage.ds.recompute_stages)
    state, momentum = load_encoder(start)
    encoder.load_state_dict(state)

    def schedule(step: int) -> float:
        return warmup_cosine(
            step,
            peak=optimization.peak_learning_rate,
            warmup_steps=optimization.warmup_epochs * steps_per_epoch,
            total_steps=optimization.epochs * steps_per_epoch,
        )

    engine = Engine(
        encoder,
        schedule,
        stage.ds,
        stage.world,
        momentum=optimization.momentum,
        weight_decay=optimization.weight_decay,
        first_step=start.position.step,
    )
    engine.load_momentum(momentum)
    return engine


def _refresh_hard_classes(stage: Stage, shard: ClassifierShard) -> None:
    num_hard_classes = stage.config.classifier.num_hard_classes
    with stage.log.progress("hardest classes", 1, "passes") as progress:
        shard.refresh_hard_classes(num_hard_classes, on_block=lambda done, blocks: progress.set(done, blocks))


def _save(
    stage: Stage,
    engine: Engine,
    shard: ClassifierShard,
    steps_done: int,
    epochs_done: int,
    figures: dict[str, float | None],
) -> None:
    # Averaged in place, so that a run that goes on and one that resumes hold the same statistics.
    engine.average_buffers()
    state, momentum = engine.full_state()
    embedding_dim = stage.config.model.embedding_dim
    position = TrainingPosition(steps_done, epochs_done, len(stage.source), embedding_dim, figures)
    directory = stage.checkpoints_of(stage.name)
    save_checkpoint(directory, position, state, momentum, shard, stage.world, keep=stage.config.log.keep_checkpoints)


class _EpochWriter:
    """Carries each step's report to metrics, progress bar and the epoch's summary."""

    def __init__(self, stage: Stage, epoch: int, steps_per_epoch: int, progress: Progress) -> None:
        self._stage, self._progress = stage, progress
        self._first_step = epoch * steps_per_epoch
        self._steps_per_epoch = steps_per_epoch
        images_per_step = stage.config.optimization.global_batch_size
        self._images_per_step = images_per_step
        self._since_log, self._epoch = TrainingMeter(images_per_step), TrainingMeter(images_per_step)

    def write(self, step: int, report: StepReport) -> None:
        """Takes the report of a step of this epoch."""
        self._since_log.add(report)
        self._epoch.add(report)
        rate = self._progress.rate * self._images_per_step
        self._progress.advance(note=f"loss {report.loss:.3f}, {rate:.0f} images/s")
        if (step + 1) % self._stage.config.log.every_steps == 0 or step + 1 == self._steps_per_epoch:
            self._stage.log.metrics(self._first_step + step + 1, self._since_log.read(self._stage.world.device))

    def summary(self) -> dict[str, float | None]:
        """The epoch's means, by plain name; says aloud what should not have been."""
        figures = self._epoch.read(self._stage.world.device)
        if figures["train/zero_features"]:
            self._stage.log.say(
                f"warning: {figures['train/zero_features']:.0f} embeddings of this epoch were 0 and got no gradient"
            )
        return {name.split("/")[1]: value for name, value in figures.items()}
