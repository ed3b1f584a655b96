"""Decides after each step of a training: what to log, when to checkpoint, when to stop, which step to skip."""

import contextlib
import socket
import statistics
import time

import psutil
import torch

from instance_ssl.checkpoint.directory import DirectoryWriter
from instance_ssl.checkpoint.state import Checkpoint, TrainingPosition, start_checkpoint
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.data.image_sources import FileImages
from instance_ssl.distributed import launched
from instance_ssl.errors import UserError
from instance_ssl.run import precision
from instance_ssl.run.broken_images import BrokenImages, TooManyBroken
from instance_ssl.run.log import Progress
from instance_ssl.run.resumption import run_digests
from instance_ssl.run.stage import Stage
from instance_ssl.training.engine import Engine
from instance_ssl.training.meters import InputWatch, LossLevel, TrainingMeter
from instance_ssl.training.step import StepReport

# A rank is a straggler when its own work takes so many times the median's, and so many seconds a step more.
_STRAGGLER_RATIO, _STRAGGLER_SECONDS = 1.5, 0.01


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
        """Takes the report of a step of this epoch (None: it was skipped); logs and saves where that is due.

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
        state, optimizer = self._engine.full_state()
        buffers = self._engine.own_buffers()
        start_checkpoint(self._writer, position, state, optimizer, buffers, self._shard, self._stage.world)
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
        """Agrees in one all-reduce whether any rank has to stop, is still writing or has met unreadable images."""
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


class TrainingLog:
    """Collects the reports of a training's steps. Every rank calls the same methods in the same order."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        images_per_step = stage.config.optimization.global_batch_size
        self._interval, self._epoch = TrainingMeter(images_per_step), TrainingMeter(images_per_step)
        self._input = InputWatch()
        self._noted: dict[str, float] = {}

    def add(self, report: StepReport) -> None:
        """Counts one step."""
        self._interval.add(report)
        self._epoch.add(report)

    def note(self, name: str, value: float) -> None:
        """Adds a value to the next metrics, by TensorBoard tag."""
        self._noted[name] = value

    def write(self, step: int) -> None:
        """Logs the metrics since the last call, with what was noted. Collective."""
        metrics = self._interval.read(self._stage.world.device) | self._noted
        self._noted = {}
        own, waited = metrics["speed/own_seconds"] or 0.0, metrics["speed/data_wait_share"] or 0.0
        by_rank = self._stage.world.all_gather_objects((own, waited, socket.gethostname()))
        metrics["speed/data_wait_share"] = self._check_waiting([(waited, host) for _, waited, host in by_rank])
        metrics |= self._check_stragglers([(own, host) for own, _, host in by_rank])
        self._stage.log.metrics(step, metrics)

    def epoch_means(self) -> dict[str, float | None]:
        """Returns the epoch's means by plain name and resets them; warns of embeddings that were 0."""
        metrics = self._epoch.read(self._stage.world.device)
        if metrics["train/zero_features"]:
            self._stage.log.say(
                f"warning: {metrics['train/zero_features']:.0f} embeddings of this epoch were 0 and got no gradient"
            )
        return {name.split("/")[1]: value for name, value in metrics.items()}

    def _check_stragglers(self, seconds: list[tuple[float, str]]) -> dict[str, float]:
        """The slowest rank's own seconds a step; warns, and gives its number, where all others wait for it."""
        median = statistics.median(value for value, _ in seconds)
        slowest = max(range(len(seconds)), key=lambda rank: seconds[rank][0])
        worst, host = seconds[slowest]
        if worst <= _STRAGGLER_RATIO * median or worst - median <= _STRAGGLER_SECONDS:
            return {"speed/slowest_rank_seconds": worst}
        self._stage.log.say(
            f"warning: rank {slowest} on {host} takes {worst:.3f} s a step for its own work, the median rank "
            f"{median:.3f} s: all wait for it"
        )
        return {"speed/slowest_rank_seconds": worst, "speed/straggler_rank": float(slowest)}

    def _check_waiting(self, shares: list[tuple[float, str]]) -> float:
        """The largest share of the time that a rank waited for images; warns when it is large."""
        rank = max(range(len(shares)), key=lambda rank: shares[rank][0])
        share, host = shares[rank]
        if self._input.should_warn(share):
            cures = self._cures_of_waiting()
            self._stage.log.say(
                f"warning: input-bound: rank {rank} on {host} waits for images {share:.0%} of the time; "
                f"{', or '.join(cures) or 'all cores here are at work'}"
            )
        return share

    def _cures_of_waiting(self) -> list[str]:
        data, cores = self._stage.config.data, launched.usable_cores()
        on_gpu = self._stage.world.device.type != "cpu"
        processes = (len(self._stage.guard.local_peers) + 1) * (data.num_workers + (0 if on_gpu else 1))
        cures = [f"raise data.num_workers ({data.num_workers} a rank, {cores} cores here)"] * (processes < cores)
        cures += ["set data.augment_on=device"] if on_gpu and data.augment_on == "cpu" else []
        return cures + ["pack the images (runners/pack_dataset.py)"] * isinstance(self._stage.source, FileImages)
