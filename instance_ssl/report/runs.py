"""Reads run directories, finished or not, leniently: whatever is there is shown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from instance_ssl.checkpoint.committed import committed_directories, find_other_step
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.errors import UserError
from instance_ssl.files.structured import parse_yaml, read_json_lines
from instance_ssl.run.directory import read_json

# Order of the sections; other stages follow by name.
_KNOWN_ORDER = ("initialize_classifier", "pretrain", "evaluate_knn", "evaluate_linear", "evaluate_retrieval")


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run.

    Attributes:
        status: of status.json, empty where there is none.
        result: of result.json, None where the stage is not complete.
        metrics: lines of metrics.jsonl in order, without a half-written one at the end.
    """

    status: dict[str, Any]
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]]

    def series(self, tag: str) -> list[tuple[int, float]]:
        """Finite (step, value) of a tag, by step; of several values for a step, the last."""
        last = {
            line["step"]: line[tag]
            for line in self.metrics
            if type(line.get("step")) is int and _is_drawable(line["step"]) and _is_drawable(line.get(tag))
        }
        return sorted(last.items())


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        name: the directory's, with as much of its parents as tells the runs of a page apart.
        config: of the newest stage that has a readable one.
        num_instances: N, None where it is not known yet.
    """

    name: str
    directory: Path
    config: ExperimentConfig | None
    stages: dict[str, StageRecord] = field(default_factory=dict)
    num_instances: int | None = None

    @cached_property
    def steps_per_epoch(self) -> int | None:
        """Global batches an epoch; None where that is not known."""
        if self.config is None or self.num_instances is None:
            return None
        return self.num_instances // self.config.optimization.global_batch_size or None

    @property
    def state(self) -> str:
        """The status of the stage that wrote its own last."""
        told = [stage.status for stage in self.stages.values() if stage.status.get("state")]
        last = max(told, key=lambda status: str(status.get("date", "")), default={"state": "not begun"})
        return str(last["state"])

    def figure(self, stage: str, *keys: str) -> Any:
        """A value inside a stage's result; None where anything on the way is missing."""
        value: Any = self.stages[stage].result if stage in self.stages else None
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def newest_checkpoint(self) -> Path | None:
        """The training's newest checkpoint that holds the step in its name; its hashes are not verified."""
        found = committed_directories(self.directory / "pretrain/checkpoints")
        return next((path for path in found if find_other_step(path) is None), None)


def open_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs, in order.

    Raises:
        UserError: when a path is not a directory or holds no stage.
    """
    runs = []
    for directory, name in zip(directories, _short_names(directories), strict=True):
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory: give run directories (--run-dir of the stages)")
        paths = {path.name: path for path in directory.iterdir() if _is_stage(path)}
        if not paths:
            raise UserError(f"{directory} holds no stage of a run: run runners/pipeline.py --run-dir {directory} first")
        ordered = [*(stage for stage in _KNOWN_ORDER if stage in paths), *sorted(set(paths) - set(_KNOWN_ORDER))]
        num_instances = (read_json(directory / "data.json") or {}).get("num_instances")
        num_instances = num_instances if type(num_instances) is int else None
        stages = {stage: _read_stage(paths[stage]) for stage in ordered}
        config = _newest_config([paths[stage] for stage in ordered])
        runs.append(Run(name, directory, config, stages, num_instances))
    return runs


def _short_names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ, or numbers where the paths are equal."""
    paths = [directory.resolve() for directory in directories]
    for count in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({place})" for place, path in enumerate(paths, 1)]


def _is_stage(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in ("config.yaml", "status.json", "result.json"))


def _read_stage(path: Path) -> StageRecord:
    status, result = read_json(path / "status.json") or {}, read_json(path / "result.json")
    try:
        metrics, _ = read_json_lines(path / "metrics.jsonl")
    except OSError:
        metrics = []
    return StageRecord(status, result, metrics)


def _is_drawable(value: Any) -> bool:
    """Whether a value is a finite number that a chart's axes can span."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def _newest_config(directories: Sequence[Path]) -> ExperimentConfig | None:
    """The newest configuration that this version can read."""
    paths = [path for directory in directories if (path := directory / "config.yaml").exists()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return ExperimentConfig.model_validate(parse_yaml(path.read_bytes()))
        except (OSError, ValueError):
            continue
    return None
