"""The YAML of an ablation, and the runs it asks for."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, ValidationError, field_validator

from instance_ssl.config.draft import load_draft
from instance_ssl.config.experiment import read_yaml
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
        name: label of the row.
        group: the table it belongs to.
        set: overrides by dotted key.
        epochs: lengths to train, each with its own schedule; None: the ablation's.
        stages: stages of each run; None: the ablation's.
        seeds: seeds, one run each; None: the ablation's.
    """

    name: str
    group: str = ""
    set: dict[str, Any] = Field(default_factory=dict)
    epochs: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    stages: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None


class Ablation(Section):
    """An ablation: which variants are compared, and by which figures.

    Attributes:
        title: heading of the table.
        config: experiment YAML, relative to the current directory.
        deepspeed_config: DeepSpeed JSON, relative to the current directory.
        runner: path below runners/ without .py, of a runner that has `--stages`.
        stages: stages of each run, in one process.
        seeds: seeds, one run each.
        set: overrides of all runs, by dotted key.
        epochs: see `Variant`; None: what config and overrides say.
        reference: variant with which the others of its group are compared, seed by seed; None: none.
        figures: columns, as `stage:key.key` in that stage's result.json. `*` as a key is the first key; as the stage,
            the first stage that has the keys. Keys of lists are 0, 1 …, or `name=x`, which interpolates between the two
            entries whose `name` encloses x.
        drawn: figures that are drawn and compared with the reference.
        jobs: runs at a time, each with its share of the cores.
        variants: rows of the table.
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
                    raise ValueError(f"figure '{name}': what follows = in '{where}' must be a whole number")
        return value

    @field_validator("variants")
    @classmethod
    def _names_differ(cls, value: tuple[Variant, ...]) -> tuple[Variant, ...]:
        names = [(variant.group, variant.name) for variant in value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"variant '{twice[1]}' is listed twice")
        return value


@dataclass(frozen=True)
class Row:
    """A variant at one length of training; `epochs` is None if the ablation does not set it."""

    group: str
    variant: str
    epochs: int | None


@dataclass(frozen=True)
class Run:
    """One training with its evaluations. Rows that ask for the same run share it.

    Attributes:
        name: name of its directory: a digest of everything that decides it, stages excluded.
        overrides: `key=value` arguments.
        stages: stages to run, in one process.
        label: name in messages.
    """

    name: str
    overrides: tuple[str, ...]
    stages: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Plan:
    """All runs, and which of them make up each row.

    Attributes:
        runs: runs by name, in the order of their start: seed by seed, so that every row has a first figure early.
        rows: names of each row's runs, by seed.
    """

    runs: dict[str, Run]
    rows: dict[Row, dict[int, str]]


def read_ablation(path: Path) -> Ablation:
    """Reads the YAML of an ablation.

    Raises:
        UserError: a missing or malformed file, an unknown key, a value out of range.
    """
    try:
        ablation = Ablation.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"--config {path}: {describe_validation_error(error, Ablation)}") from None
    if not (RUNNERS / f"{ablation.runner}.py").exists():
        raise UserError(
            f"--config {path}: runner '{ablation.runner}' is not in {RUNNERS}: give its path there, such as "
            "pipeline or benchmarks/peers"
        )
    names = [variant.name for variant in ablation.variants]
    if ablation.reference is not None and ablation.reference not in names:
        raise UserError(
            f"--config {path}: reference '{ablation.reference}' is not one of the variants {', '.join(names)}"
        )
    unknown = [name for name in ablation.drawn if name not in ablation.figures]
    if unknown:
        raise UserError(
            f"--config {path}: drawn '{unknown[0]}' is not one of the figures {', '.join(ablation.figures)}"
        )
    return ablation


def plan_runs(ablation: Ablation, overrides: Sequence[str] = ()) -> Plan:
    """Plans all runs of an ablation. Reads every configuration, so that a mistake shows before anything runs.

    Args:
        overrides: `key=value` for all runs, applied before the variants' own.

    Raises:
        UserError: a mistake in a variant's configuration; names the variant and the key.
    """
    if not ablation.config.exists():
        raise UserError(f"config {tried(ablation.config)} does not exist")
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
        draft = load_draft(ablation.config, words)
    except UserError as error:
        raise UserError(f"variant '{where}': {error}") from None
    try:
        engine = ablation.deepspeed_config.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"deepspeed_config {ablation.deepspeed_config}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"deepspeed_config {ablation.deepspeed_config}: not UTF-8 text") from None
    decisive = json.dumps(
        [ablation.runner, engine, draft.completed({}).model_dump(mode="json"), *draft.auto], sort_keys=True
    )
    name = hashlib.sha256(decisive.encode()).hexdigest()[:16]
    length = "" if epochs is None else f", {epochs} epochs"
    return Run(name, tuple(words), variant.stages or ablation.stages, f"{where}{length}, seed {seed}")


def _words(values: dict[str, Any]) -> list[str]:
    """Returns overrides as runners take them; the values are JSON, which is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
