"""The YAML file of an ablation, and the runs it asks for."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, ValidationError, field_validator

from instance_ssl.config.experiment import load_config, read_yaml
from instance_ssl.config.messages import describe_validation_error
from instance_ssl.config.types import NonNegativeInt, PositiveInt, Section
from instance_ssl.errors import UserError, tried

RUNNERS = Path(__file__).resolve().parents[1]
_FIGURES: Final = {
    "k-NN": "evaluate_knn:figures.*.top1",
    "linear": "evaluate_linear:figures.*.top1",
    "seconds": "pretrain:seconds",
    "images/s": "pretrain:images_per_second",
    "peak GiB": "pretrain:peak_gib",
}
_STAGES = ("initialize_classifier", "pretrain", "evaluate_knn", "evaluate_linear")


class Variant(Section):
    """One row of a table, or one for each of its `epochs`.

    Attributes:
        group: the table it belongs to.
        set: overrides by dotted key.
        epochs: trainings of so many epochs, each with a schedule of its own; None: the ablation's.
        stages, seeds: None: the ablation's.
    """

    name: str
    group: str = ""
    set: dict[str, Any] = Field(default_factory=dict)
    epochs: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    stages: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None


class Ablation(Section):
    """What is compared, and by which figures.

    Attributes:
        title: over the table.
        config: experiment YAML, a path from where the command is given, as the next.
        deepspeed_config: DeepSpeed JSON.
        runner: its name in runners/; it must offer `--stages`.
        stages: of each run, in one process.
        set: overrides of all runs, by dotted key.
        epochs: see `Variant`; None: what config and overrides say.
        reference: the variant that each other of its group is subtracted from, seed by seed; None: none.
        figures: columns: `stage:key.key`, in that stage's result.json. A `*` is the first key there is; as the stage,
            the first of the run's stages that has the keys. Keys of lists are 0, 1 …, or `name=x` for the place
            between two entries at which their `name` would be x.
        drawn: figures that the picture shows, and that are compared with the reference.
        jobs: runs at once, each with its share of the cores.
    """

    title: str
    config: Path
    deepspeed_config: Path
    runner: str = "pipeline"
    stages: Annotated[tuple[str, ...], Field(min_length=1)] = _STAGES
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    set: dict[str, Any] = Field(default_factory=dict)
    epochs: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    reference: str | None = None
    figures: Annotated[dict[str, str], Field(min_length=1, default_factory=lambda: dict(_FIGURES))]
    drawn: tuple[str, ...] = ("k-NN", "linear")
    jobs: PositiveInt = 1
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]

    @field_validator("figures")
    @classmethod
    def _figures_name_a_stage(cls, value: dict[str, str]) -> dict[str, str]:
        for name, where in value.items():
            if where.count(":") != 1:
                raise ValueError(f"figure '{name}' must be stage:key.key, not '{where}'")
            for key, following in pairwise([*where.split("."), ""]):
                place = key.partition("=")[2]
                if "=" in key and (not place.isdecimal() or following.isdecimal()):
                    raise ValueError(f"figure '{name}': what stands behind = in '{where}' must be a whole number")
        return value

    @field_validator("variants")
    @classmethod
    def _names_differ(cls, value: tuple[Variant, ...]) -> tuple[Variant, ...]:
        names = [(variant.group, variant.name) for variant in value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"variant '{twice[1]}' is there twice")
        return value


@dataclass(frozen=True)
class Row:
    """A variant at one length of training; `epochs` is None where the ablation does not say."""

    group: str
    variant: str
    epochs: int | None


@dataclass(frozen=True)
class Run:
    """One training and its evaluation. Rows that ask for the very same one share it.

    Attributes:
        name: of its directory, a digest of everything that decides it but the stages.
        overrides: `key=value` arguments.
        label: for messages.
    """

    name: str
    overrides: tuple[str, ...]
    stages: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Plan:
    """All runs, and which of them a row consists of.

    Attributes:
        runs: by name, in the order in which they are started: seed by seed, so that all rows have their first early.
        rows: the names of each row's runs by seed.
    """

    runs: dict[str, Run]
    rows: dict[Row, dict[int, str]]


def read_ablation(path: Path) -> Ablation:
    """Reads the file.

    Raises:
        UserError: for a missing or malformed file, an unknown key, a value out of range.
    """
    try:
        ablation = Ablation.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"--config {path}: {describe_validation_error(error, Ablation)}") from None
    if not (RUNNERS / f"{ablation.runner}.py").exists():
        raise UserError(f"--config {path}: runner '{ablation.runner}' is not in {RUNNERS}")
    names = [variant.name for variant in ablation.variants]
    if ablation.reference is not None and ablation.reference not in names:
        raise UserError(f"--config {path}: reference '{ablation.reference}' is none of the variants {', '.join(names)}")
    unknown = [name for name in ablation.drawn if name not in ablation.figures]
    if unknown:
        raise UserError(f"--config {path}: drawn '{unknown[0]}' is none of the figures {', '.join(ablation.figures)}")
    return ablation


def plan_runs(ablation: Ablation, overrides: Sequence[str] = ()) -> Plan:
    """All runs of an ablation; every configuration is read once, so that a mistake shows before anything runs.

    Args:
        overrides: `key=value`, for all runs, before the variants' own.

    Raises:
        UserError: naming the variant and the key.
    """
    if not ablation.config.exists():
        raise UserError(f"config {tried(ablation.config)}: there is none")
    runs: dict[str, Run] = {}
    rows: dict[Row, dict[int, str]] = {}
    seeds = list(dict.fromkeys(seed for v in ablation.variants for seed in v.seeds or ablation.seeds))
    for seed in seeds:
        for variant in ablation.variants:
            if seed not in (variant.seeds or ablation.seeds):
                continue
            for epochs in variant.epochs or ablation.epochs or (None,):
                run = _run(ablation, variant, epochs, seed, overrides)
                known = runs.get(run.name)
                if known is not None:
                    run = replace(known, stages=tuple(dict.fromkeys(known.stages + run.stages)))
                runs[run.name] = run
                rows.setdefault(Row(variant.group, variant.name, epochs), {})[seed] = run.name
    return Plan(runs, rows)


def _run(ablation: Ablation, variant: Variant, epochs: int | None, seed: int, overrides: Sequence[str]) -> Run:
    values: dict[str, Any] = {**variant.set, "seed": seed}
    if epochs is not None:
        values["optimization.epochs"] = epochs
    words = [*_words(ablation.set), *overrides, *_words(values)]
    where = " / ".join(part for part in (variant.group, variant.name) if part)
    try:
        config = load_config(ablation.config, words)
    except UserError as error:
        raise UserError(f"variant '{where}': {error}") from None
    try:
        engine = ablation.deepspeed_config.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"deepspeed_config {ablation.deepspeed_config}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"deepspeed_config {ablation.deepspeed_config}: not UTF-8 text") from None
    decisive = json.dumps([ablation.runner, engine, config.model_dump(mode="json")], sort_keys=True)
    name = hashlib.sha256(decisive.encode()).hexdigest()[:16]
    length = "" if epochs is None else f", {epochs} epochs"
    return Run(name, tuple(words), variant.stages or ablation.stages, f"{where}{length}, seed {seed}")


def _words(values: dict[str, Any]) -> list[str]:
    """Overrides as the runners take them, values in JSON, which is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
