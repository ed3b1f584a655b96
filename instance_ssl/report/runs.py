"""What run directories hold, finished or not: read leniently, for a page is wanted of whatever there is."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from instance_ssl.checkpoint_files import committed_directories
from instance_ssl.config import ExperimentConfig, flatten
from instance_ssl.errors import UserError
from instance_ssl.schedules import EpochClock

# In a result but about where it was computed, not what came out.
SURROUNDINGS = ("date", "commit", "versions", "world_size", "device", "seconds", "data", "newest_checkpoint", "stage")
# Order of the sections; what else there is follows by name.
_KNOWN_ORDER = ("initialize_classifier", "pretrain", "evaluate_knn", "evaluate_linear", "evaluate_retrieval")


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run.

    Attributes:
        status: of status.json, empty where there is none.
        result: of result.json, None where the stage is not complete.
        metrics: lines of metrics.jsonl in order; half a line at the end is left out.
    """

    name: str
    directory: Path
    status: dict[str, Any]
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]]

    def series(self, tag: str) -> list[tuple[int, float]]:
        """(step, value) of a tag, by step; of several values for a step, the last."""
        last = {line["step"]: line[tag] for line in self.metrics if tag in line and "step" in line}
        return sorted(last.items())


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        name: the directory's, with as much of its parents as tells the runs of a page apart.
        config: of the newest stage that has one, as far as it can be read.
        num_instances: N, None where it is not known yet.
    """

    name: str
    directory: Path
    config: ExperimentConfig | None
    stages: dict[str, StageRecord] = field(default_factory=dict)
    num_instances: int | None = None

    @cached_property
    def clock(self) -> EpochClock | None:
        """In which epoch each step of the training is: by its newest checkpoint, where the data set has grown."""
        if self.config is None or self.num_instances is None:
            return None
        checkpoint = self.newest_checkpoint()
        training = _read_json(checkpoint / "training.json") if checkpoint else None
        if stretches := (training or {}).get("stretches"):
            return EpochClock(tuple(tuple(stretch) for stretch in stretches))
        steps_per_epoch = self.num_instances // self.config.optimization.global_batch_size
        return EpochClock(((0, 0, steps_per_epoch),)) if steps_per_epoch else None

    @property
    def state(self) -> str:
        """How the stage that was touched last stands."""
        told = [stage.status for stage in self.stages.values() if stage.status.get("state")]
        if not told:
            return "not begun"
        last = max(told, key=lambda status: str(status.get("date", "")))
        return str(last["state"])

    def recipe(self) -> dict[str, Any]:
        """Dotted keys of the configuration."""
        return {} if self.config is None else flatten(self.config)

    def figure(self, stage: str, *keys: str) -> Any:
        """A value inside a stage's result; None where anything on the way is missing."""
        record = self.stages.get(stage)
        value: Any = None if record is None else record.result
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def newest_checkpoint(self) -> Path | None:
        """The newest one of the training, unverified."""
        return next(iter(committed_directories(self.directory / "pretrain/checkpoints")), None)


def open_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs, in order.

    Raises:
        UserError: for a directory that is none, or holds no stage.
    """
    runs = []
    for directory, name in zip(directories, _short_names(directories), strict=True):
        if not directory.is_dir():
            raise UserError(f"{directory} is no directory: give run directories (--run-dir of the stages)")
        stages = {path.name: _read_stage(path) for path in sorted(directory.iterdir()) if _is_stage(path)}
        if not stages:
            raise UserError(f"{directory} holds no stage of a run: run runners/pipeline.py --run-dir {directory} first")
        ordered = sorted(stages, key=lambda stage: (_place(stage), stage))
        data = _read_json(directory / "data.json") or {}
        config = _newest_config([stages[stage].directory for stage in ordered])
        runs.append(Run(name, directory, config, {s: stages[s] for s in ordered}, data.get("num_instances")))
    return runs


def _place(stage: str) -> int:
    return _KNOWN_ORDER.index(stage) if stage in _KNOWN_ORDER else len(_KNOWN_ORDER)


def _short_names(directories: Sequence[Path]) -> list[str]:
    """As few of the last parts of each path as tell them apart; a number where nothing does."""
    paths = [directory.resolve() for directory in directories]
    for count in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({place})" for place, path in enumerate(paths, 1)]


def _is_stage(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in ("config.yaml", "status.json", "result.json"))


def _read_stage(path: Path) -> StageRecord:
    status, result = _read_json(path / "status.json") or {}, _read_json(path / "result.json")
    return StageRecord(path.name, path, status, result, list(_read_lines(path / "metrics.jsonl")))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            yield values


def _newest_config(directories: Sequence[Path]) -> ExperimentConfig | None:
    """The configuration written last that this version can read."""
    paths = [path for directory in directories if (path := directory / "config.yaml").exists()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return ExperimentConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, yaml.YAMLError, ValidationError):
            continue
    return None
