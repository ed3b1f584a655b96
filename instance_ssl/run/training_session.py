"""Decides after each step of a training: what to log, when to checkpoint, when to stop, which step to skip."""

import contextlib
import time

import psutil
import torch

from instance_ssl.checkpoint.directory import DirectoryWriter
from instance_ssl.checkpoint.state import Checkpoint, TrainingPosition, start_checkpoint
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.errors import UserError
from instance_ssl.run import precision
from instance_ssl.run.broken_images import BrokenImages, TooManyBroken
from instance_ssl.run.log import Progress
from instance_ssl.run.resumption import run_digests
from instance_ssl.run.stage import Stage
from instance_ssl.run.training_log import TrainingLog
from instance_ssl.training.engine import Engine
from instance_ssl.training.meters import LossLevel
from instance_ssl.training.step import StepReport


class Rollback(Exception):
    """Sends the training back to its newest checkpoint, from which it skips `step`, counted over the whole training."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}")
        self.step = step


class TrainingSession:
    """One process's part of a training, from where it starts to its end or stop.

    Every rank calls the same methods in the same order. What the ranks decide together is either equal on all of them
    (the loss) or agreed on once a step, in one small all-reduce.

    Args:
        broken: the images that cannot be read, known and met on the way.
        start: the checkpoint that the training starts from.
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
        self._failed_saves = 0
        self._log = TrainingLog(stage)
        self._writer = DirectoryWriter(
            stage.checkpoints_of(stage.name), stage.world, keep=self._checkpoint.keep, is_permanent=self._is_permanent
        )

    def after_step(self, step: int, report: StepReport | None) -> None:
        """Takes the report of a step of this epoch, None for one that was skipped; logs and saves where that is due.

        Raises:
            Stopped: a stop was requested on any rank; the state has been saved.
            Rollback: the loss has a spike, and the configuration asks for a rollback.
            UserError: too many steps in a row were not finite, too many saves failed, or too many images cannot be
                read (then the state has been saved).
        """
        if self.step == self._first_step:
            self._log.note("speed/seconds_to_first_step", time.time() - psutil.Process().create_time())
        self.step += 1
        is_last = step + 1 == self._steps_per_epoch
        if report is not None:
            self._log.add(report)
            self._broken.meet(report.unreadable)
            self._check_numbers(report)
            images_per_second = self._progress.rate * self._stage.config.optimization.global_batch_size
            self._progress.advance(note=f"loss {report.loss:.3f}, {images_per_second:.0f} images/s")
        if (step + 1) % self._stage.config.log.every_steps == 0 or is_last:
            if num_broken := len(self._broken.ids):
                self._log.note("data/broken_images", float(num_broken))
            self._log.write(self.step)
        if is_last:
            self.figures = self._log.epoch_means()
        self._look_around()
        if self._is_due(is_last):
            self.save()

    def save(self) -> None:
        """Starts a checkpoint of the state as it is; the files are written while training continues."""
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
        self._log.note("speed/checkpoint_pause_seconds", time.perf_counter() - started)

    def finish(self) -> None:
        """Waits until the state is on the disk. There is no later save to try again: a failure raises a `UserError`."""
        self._failed_saves = self._checkpoint.tolerated_failures
        self._commit()
        if self._saved_step != self.step:
            self.save()
            self._commit()

    def check_together(self) -> None:
        """Saves and raises `Stopped` on request, in long work between steps (the search for the hardest classes)."""
        self._stage.guard.beat()
        self._look_around()

    def _look_around(self) -> None:
        """One all-reduce: is a stop requested anywhere, is anyone still writing, has anyone met what is unreadable?"""
        flags = [self._stage.guard.reason is not None, self._writer.is_writing, self._broken.has_news]
        agreed = torch.tensor(flags, dtype=torch.int64, device=self._stage.world.device)
        stop, writing, news = self._stage.world.all_reduce_max_(agreed).tolist()
        if not writing:
            self._commit()
        if news:  # images that any rank could not read in the last step
            self._broken.share()
            try:
                self._broken.check_share()
            except TooManyBroken:
                self.finish()
                raise
        if stop:
            self.finish()
            self._stage.stop_together()

    def _commit(self) -> None:
        """Commits the checkpoint that is being written, if there is one; tolerates some failures in a row."""
        if not self._writer.is_busy:
            return
        try:
            self._writer.commit()
            self._failed_saves = 0
        except UserError as error:
            self._failed_saves += 1
            self._saved_step = -1
            if self._failed_saves > self._checkpoint.tolerated_failures:
                raise
            self._stage.log.say(f"warning: {error}; training continues and retries")

    def _is_due(self, is_last: bool) -> bool:
        every_steps = self._checkpoint.every_steps
        is_nth_step = every_steps is not None and self.step % every_steps == 0
        return is_nth_step or (is_last and self.step // self._steps_per_epoch % self._checkpoint.every_epochs == 0)

    def _is_permanent(self, step: int) -> bool:
        every, (epochs, rest) = self._checkpoint.keep_every_epochs, divmod(step, self._steps_per_epoch)
        return every is not None and rest == 0 and epochs % every == 0

    def _check_numbers(self, report: StepReport) -> None:
        """Warns of steps that were not finite and of spikes of the loss; ends the run or rolls it back where due."""
        if not report.applied:
            self._skipped_in_a_row += 1
            problem = "has numbers that are not finite: skipped, nothing was updated"
            self._stage.log.say(f"warning: step {self.step} {problem}")
            if self._skipped_in_a_row >= self._safety.max_skipped_steps:
                self._give_up(report)
            return
        self._skipped_in_a_row = 0
        level = self._loss.level
        is_spike = self._loss.add(report.loss)
        if is_spike and not self._was_spike:
            self._stage.log.say(f"warning: step {self.step}: the loss is {report.loss:.3f} after a mean of {level:.3f}")
            self._log.note("train/loss_spike", report.loss)
            if self._safety.rollback:
                self._commit()
                raise Rollback(self.step - 1)
        self._was_spike = is_spike

    def _give_up(self, report: StepReport) -> None:
        """Writes the batch that cannot be trained on, and ends the run."""
        name = f"not_finite_step_{self.step:09d}_rank_{self._stage.world.rank:05d}.pt"
        if report.embeddings is not None:
            embeddings, ids = report.embeddings
            with contextlib.suppress(OSError, RuntimeError):  # a full disk must not hide why the run ends
                torch.save({"embeddings": embeddings.cpu(), "instance_ids": ids.cpu()}, self._stage.directory / name)
        self._commit()
        raise UserError(
            f"{self._skipped_in_a_row} steps in a row had numbers that are not finite; neither the encoder nor the "
            f"classifier was updated, and the last batch is in {self._stage.directory}/not_finite_*. Lower "
            "optimization.learning_rate or lengthen optimization.warmup_epochs, with another --run-dir"
        )
