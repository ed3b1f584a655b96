"""Runs one stage in its directory: lock, records of what is run, the work, result.json."""

import contextlib
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml

from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.files.atomic import write_json, write_text
from instance_ssl.files.disk_space import saving, why_not_written
from instance_ssl.run import checks, images, records
from instance_ssl.run.directory import locked, write_status
from instance_ssl.run.process import Process
from instance_ssl.run.stage import Stage
from instance_ssl.training import engine


def run_stage(stage: Stage, function: Callable[[Stage], dict[str, Any]], process: Process) -> None:
    """Runs one stage in its directory and writes result.json; a complete stage is skipped. Collective."""
    result_path = stage.directory / "result.json"
    known = stage.directory, stage.config
    if stage.on_rank_0(lambda: records.is_complete(*known, _newest_checkpoint(stage), stage.source.digest, stage.log)):
        stage.log.say(f"{stage.name}: already complete, see {result_path}")
        return
    with contextlib.ExitStack() as held:
        _enter(stage, process.run, held)
        process.directory = stage.directory
        held.enter_context(process.guard.hangs_after(stage.config.safety.hang_seconds, stage.directory))
        held.enter_context(stage.log.metrics_in(stage.directory))
        started = time.perf_counter()
        # Before an evaluation: a training that runs beside it may commit a newer one meanwhile.
        newest = _newest_checkpoint(stage)
        figures = function(stage)
        if stage.name in records.BOUND_STAGES:
            newest = _newest_checkpoint(stage)
        seconds = round(time.perf_counter() - started, 3)
        record = {"stage": stage.name, **figures, "newest_checkpoint": newest, "seconds": seconds}
        stage.on_rank_0(lambda: _conclude(stage, record, process.run))
        process.directory = None


def _conclude(stage: Stage, record: dict[str, Any], run: str | None) -> None:
    data: dict[str, Any] = {
        "kind": stage.config.data.kind,
        "num_instances": len(stage.source),
        "digest": stage.source.digest,
    }
    if stage.evaluation_sources is not None and images.holds_out(stage.config):
        compared, tested = map(len, stage.evaluation_sources)
        data["held_out"] = {"compared_with": compared, "tested_on": tested, "seed": stage.config.seed}
    path = stage.directory / "result.json"
    with saving(path):
        write_json(path, {**record, "data": data, **_environment(stage.world)})
    write_status(stage.directory, "complete", run=run)


def _newest_checkpoint(stage: Stage) -> str | None:
    return checks.what_is_evaluated(stage.config.evaluation, stage.checkpoints_of("pretrain"))


def _enter(stage: Stage, run: str | None, held: contextlib.ExitStack) -> None:
    """Locks the stage's directory and records what is run in it."""

    def enter() -> None:
        try:
            stage.directory.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(stage.directory))
            # A result belongs to config.yaml, which is about to change.
            (stage.directory / "result.json").unlink(missing_ok=True)
            config = yaml.safe_dump(stage.config.model_dump(mode="json"), sort_keys=False)
            write_text(stage.directory / "config.yaml", config)
            section = stage.ds.classifier.model_dump()
            write_json(stage.directory / "ds_config.json", {**stage.ds.engine, "instance_classifier": section})
            write_json(stage.directory / "environment.json", _environment(stage.world))
            write_status(stage.directory, "running", run=run)
        except OSError as error:
            raise UserError(f"{stage.directory}: {why_not_written(error, stage.directory, 0)}") from error

    stage.on_rank_0(enter)


def _environment(world: Group) -> dict[str, Any]:
    on_cuda = world.device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **engine.versions(), "torchvision": torchvision.__version__},
        "world_size": world.size,
        "threads_per_rank": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(world.device) if on_cuda else platform.machine() + " cpu",
    }


def _commit() -> str | None:
    """Returns the checkout's commit, with `+` if files differ from it; None outside a checkout."""
    root = str(Path(__file__).resolve().parents[2])

    def git(*arguments: str) -> str:
        command = ["git", "-C", root, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
