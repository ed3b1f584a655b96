"""What surrounds the steps of a training: figures, checkpoints, requests to end, and steps that went wrong."""

import contextlib
import os
import socket
import statistics
import time

import psutil
import torch

from instance_ssl.checkpoint.directory import DirectoryWriter
from instance_ssl.checkpoint.state import Checkpoint, TrainingPosition, start_checkpoint
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.data.image_sources import FileImages
from instance_ssl.errors import UserError, escape
from instance_ssl.run import precision
from instance_ssl.run.broken_images import BrokenImages, TooManyBroken
from instance_ssl.run.identity import config_digest
from instance_ssl.run.log import Progress
from instance_ssl.run.stage import Stage
from instance_ssl.training.engine import Engine
from instance_ssl.training.meters import InputWatch, LossLevel, TrainingMeter
from instance_ssl.training.step import StepReport

# A rank is named when its own work takes so many times the median's, and so many seconds a step more.
_STRAGGLER_RATIO, _STRAGGLER_SECONDS = 1.5, 0.01
_NAMED = 3


class Rollback(Exception):
    """The training goes back to its newest checkpoint and skips one step.

    Attributes:
        step: the one to skip, counted over the whole training.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}")
        self.step = step


class TrainingSession:
    """One process's view of a training from where it starts: told of every step, it decides what follows.

    Every rank calls the same methods in the same order. What ranks decide together is either equal on all of them (the
    loss) or agreed on once a step, in one small all-reduce.

    Args:
        steps_per_epoch: global batches an epoch.
        broken: the images that cannot be read, known and met on the way.
        start: where the training starts.
        progress: counts steps.
    """

    def __init__(
        self,
        stage: Stage,
        engine: Engine,
        shard: ClassifierShard,
        steps_per_epoch: int,
        broken: BrokenImages,
        start: Checkpoint,
        progress: Progress,
    ) -> None:
        self._stage, self._engine, self._shard, self._progress = stage, engine, shard, progress
        self._steps_per_epoch, self._broken = steps_per_epoch, broken
        self._checkpoint, self._safety = stage.config.checkpoint, stage.config.safety
        self.step = self._first_step = start.position.step
        self._saved_step = self.step if start.directory.parent == stage.checkpoints_of(stage.name) else -1
        self.figures = start.position.figures
        self._skipped_in_a_row = start.position.skipped_in_a_row
        self._loss = LossLevel(self._safety.spike_nats, start.position.loss_level)
        self._was_spike = False
        self._input = InputWatch()
        self._failed_saves = 0
        self._pause_seconds: float | None = None
        self._start_seconds: float | None = None
        self._spike_loss: float | None = None
        images_per_step = stage.config.optimization.global_batch_size
        self._since_log, self._epoch = TrainingMeter(images_per_step), TrainingMeter(images_per_step)
        self._images_per_step = images_per_step
        self._writer = DirectoryWriter(
            stage.checkpoints_of(stage.name),
            stage.world,
            keep=self._checkpoint.keep,
            is_permanent=self._is_permanent,
        )

    def after_step(self, step: int, report: StepReport | None) -> None:
        """Takes the report of a step of this epoch (None: it was skipped); saves and logs where that is due.

        Raises:
            Stopped: when an end was asked for on any rank; the state has been saved.
            Rollback: at a spike of the loss, where the configuration says so.
            UserError: when too many steps in a row were skipped, too many saves failed, or too many images cannot be
                read (then the state has been saved).
        """
        if self.step == self._first_step:
            self._start_seconds = time.time() - psutil.Process().create_time()
        self.step += 1
        is_last = step + 1 == self._steps_per_epoch
        if report is not None:
            self._since_log.add(report)
            self._epoch.add(report)
            self._broken.meet(report.unreadable)
            self._judge(report)
            rate = self._progress.rate * self._images_per_step
            self._progress.advance(note=f"loss {report.loss:.3f}, {rate:.0f} images/s")
        if (step + 1) % self._stage.config.log.every_steps == 0 or is_last:
            self._log()
        if is_last:
            self.figures = self._epoch_figures()
        self._look_around()
        if self._is_due(is_last):
            self.save()

    def save(self) -> None:
        """Begins a checkpoint of the state as it is; the files are written while training goes on."""
        if self._writer.is_busy:
            self._commit()
        started = time.perf_counter()
        position = TrainingPosition(
            step=self.step,
            epoch=self.step // self._steps_per_epoch,
            num_instances=len(self._stage.source),
            embedding_dim=self._stage.config.model.embedding_dim,
            world_size=self._stage.world.size,
            figures=self.figures,
            digests=run_digests(self._stage),
            loss_scale=self._engine.loss_scale,
            skipped_in_a_row=self._skipped_in_a_row,
            loss_level=self._loss.level,
            matmul_dtype=precision.describe(self._stage.ds.matmul_dtype),
        )
        state, momentum = self._engine.full_state()
        buffers = self._engine.own_buffers()
        start_checkpoint(self._writer, position, state, momentum, buffers, self._shard, self._stage.world)
        self._saved_step = self.step
        self._pause_seconds = time.perf_counter() - started

    def finish(self) -> None:
        """Waits until the state is on the disk; what cannot be written now is lost, so a failure ends the run.

        Raises:
            UserError: when it could not be written.
        """
        self._failed_saves = self._checkpoint.tolerated_failures
        if self._writer.is_busy:
            self._commit()
        if self._saved_step != self.step:
            self.save()
            self._commit()

    def check_together(self) -> None:
        """Between steps, for long work that is not training (the search for the hardest classes).

        Raises:
            Stopped: when an end was asked for on any rank; the state has been saved.
        """
        self._stage.guard.beat()
        self._look_around()

    def _look_around(self) -> None:
        """One all-reduce: is an end asked for anywhere, is anyone still writing, has anyone met what is unreadable?"""
        flags = [self._stage.guard.reason is not None, self._writer.is_writing, self._broken.has_news]
        agreed = torch.tensor(flags, dtype=torch.int64, device=self._stage.world.device)
        stop, writing, news = self._stage.world.all_reduce_max_(agreed).tolist()
        if self._writer.is_busy and not writing:
            self._commit()
        if news:
            self._take_broken()
        if stop:
            self.finish()
            self._stage.stop_together()

    def _take_broken(self) -> None:
        """Logs and records images that any rank could not read in the last step; too many of them end the run."""
        self._broken.share()
        try:
            self._broken.check_share()
        except TooManyBroken:
            self.finish()
            raise

    def _commit(self) -> None:
        try:
            self._writer.commit()
            self._failed_saves = 0
        except UserError as error:
            self._failed_saves += 1
            self._saved_step = -1
            if self._failed_saves > self._checkpoint.tolerated_failures:
                raise
            self._stage.log.say(f"warning: {error}; training goes on and tries again")

    def _is_due(self, is_last: bool) -> bool:
        every_steps = self._checkpoint.every_steps
        if every_steps is not None and self.step % every_steps == 0:
            return True
        return is_last and self.step // self._steps_per_epoch % self._checkpoint.every_epochs == 0

    def _is_permanent(self, step: int) -> bool:
        every, (epochs, rest) = self._checkpoint.keep_every_epochs, divmod(step, self._steps_per_epoch)
        return every is not None and rest == 0 and epochs % every == 0

    def _judge(self, report: StepReport) -> None:
        if not report.applied:
            self._skipped_in_a_row += 1
            self._stage.log.say(
                f"warning: step {self.step} has numbers that are not finite: skipped, nothing has moved"
            )
            if self._skipped_in_a_row >= self._safety.max_skipped_steps:
                self._give_up(report)
            return
        self._skipped_in_a_row = 0
        level = self._loss.level
        is_spike = self._loss.add(report.loss)
        if is_spike and not self._was_spike:
            self._stage.log.say(f"warning: step {self.step}: the loss is {report.loss:.3f} after a mean of {level:.3f}")
            self._spike_loss = report.loss
            if self._safety.rollback:
                if self._writer.is_busy:
                    self._commit()
                raise Rollback(self.step - 1)
        self._was_spike = is_spike

    def _give_up(self, report: StepReport) -> None:
        """Writes down the batch that cannot be trained on, and ends the run."""
        rank = self._stage.world.rank
        path = self._stage.directory / f"not_finite_step_{self.step:09d}_rank_{rank:05d}.pt"
        if report.embeddings is not None:
            embeddings, ids = report.embeddings
            with contextlib.suppress(OSError, RuntimeError):  # a full disk must not hide what the run ends of
                torch.save({"embeddings": embeddings.cpu(), "instance_ids": ids.cpu()}, path)
        if self._writer.is_busy:
            self._commit()
        raise UserError(
            f"{self._skipped_in_a_row} steps in a row had numbers that are not finite; neither the encoder nor the "
            f"classifier has moved, and the last batch lies in {path.parent}/not_finite_*. Lower "
            "optimization.learning_rate or lengthen optimization.warmup_epochs, with another --run-dir"
        )

    def _log(self) -> None:
        figures = self._since_log.read(self._stage.world.device)
        figures["speed/checkpoint_pause_seconds"], self._pause_seconds = self._pause_seconds, None
        figures["train/loss_spike"], self._spike_loss = self._spike_loss, None
        figures["speed/seconds_to_first_step"], self._start_seconds = self._start_seconds, None
        own, waited = figures["speed/own_seconds"] or 0.0, figures["speed/data_wait_share"] or 0.0
        by_rank = self._stage.world.all_gather_objects((own, waited, socket.gethostname()))
        figures["speed/data_wait_share"] = self._judge_waiting([(waited, host) for _, waited, host in by_rank])
        median = statistics.median(value for value, _, _ in by_rank)
        slowest = max(range(len(by_rank)), key=lambda rank: by_rank[rank][0])
        worst, _, host = by_rank[slowest]
        figures["speed/slowest_rank_seconds"] = worst
        if worst > _STRAGGLER_RATIO * median and worst - median > _STRAGGLER_SECONDS:
            self._stage.log.say(
                f"warning: rank {slowest} on {host} takes {worst:.3f} s a step for its own work, the median rank "
                f"{median:.3f} s: all wait for it"
            )
            figures["speed/straggler_rank"] = float(slowest)
        if num_broken := len(self._broken.ids):
            figures["data/broken_images"] = float(num_broken)
        self._stage.log.metrics(self.step, figures)

    def _judge_waiting(self, shares: list[tuple[float, str]]) -> float:
        """The largest share of the time that a rank waited for images; says aloud when it is large."""
        rank = max(range(len(shares)), key=lambda rank: shares[rank][0])
        share, host = shares[rank]
        if self._input.is_worth_a_word(share):
            cures = self._cures_of_waiting()
            self._stage.log.say(
                f"warning: input-bound: rank {rank} on {host} waits for images {share:.0%} of the time; "
                f"{', or '.join(cures) or 'all cores here are at work'}"
            )
        return share

    def _cures_of_waiting(self) -> list[str]:
        data, cores = self._stage.config.data, len(os.sched_getaffinity(0))
        on_gpu = self._stage.world.device.type != "cpu"
        processes = (len(self._stage.guard.local_peers) + 1) * (data.num_workers + (0 if on_gpu else 1))
        cures = [f"raise data.num_workers ({data.num_workers} a rank, {cores} cores here)"] * (processes < cores)
        cures += ["set data.augment_on=device"] if on_gpu and data.augment_on == "cpu" else []
        return cures + ["pack the images (runners/pack_dataset.py)"] * isinstance(self._stage.source, FileImages)

    def _epoch_figures(self) -> dict[str, float | None]:
        """The epoch's means, by plain name; says aloud what should not have been."""
        figures = self._epoch.read(self._stage.world.device)
        if figures["train/zero_features"]:
            self._stage.log.say(
                f"warning: {figures['train/zero_features']:.0f} embeddings of this epoch were 0 and got no gradient"
            )
        return {name.split("/")[1]: value for name, value in figures.items()}


def run_digests(stage: Stage) -> dict[str, str]:
    """What a checkpoint is bound to."""
    return {"configuration": config_digest(stage.config), "images": stage.source.digest}


def require_same_run(checkpoint: Checkpoint, stage: Stage) -> None:
    """Refuses a checkpoint of another run.

    Raises:
        UserError: saying which of configuration and images differs.
    """
    for name, digest in run_digests(stage).items():
        if checkpoint.position.digests.get(name, digest) != digest:
            raise UserError(f"{checkpoint.directory} is of a run with other {name}: give that run's own --run-dir")


def say_what_was_passed_over(stage: Stage, checkpoint: Checkpoint) -> None:
    """Logs that newer checkpoints are damaged, and that what somebody has put into this one is ignored."""
    for problem in checkpoint.passed_over:
        stage.log.say(f"warning: damaged checkpoint {problem}; going back to {checkpoint.directory.name}")
    if checkpoint.foreign:
        names = ", ".join(escape(name) for name in checkpoint.foreign[:_NAMED])
        more = f" and {len(checkpoint.foreign) - _NAMED} more" if len(checkpoint.foreign) > _NAMED else ""
        stage.log.say(f"ignored in {checkpoint.directory}, written by something else: {names}{more}")
