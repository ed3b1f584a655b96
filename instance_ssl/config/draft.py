"""An experiment that leaves keys to `auto`: they are chosen when the images and the machine are known.

`auto` is a value of the keys whose type is marked with `types.AUTO`. It stands in files and after `--set` alone:
an `ExperimentConfig` never holds it, and the stages record what was chosen.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from instance_ssl.config.experiment import ExperimentConfig, read_values, validated
from instance_ssl.config.types import AUTO

STEM = "model.stem"
# Stand in for values that are not chosen yet, so that the others can be checked: they contradict none.
_PROVISIONAL = {
    "data.kind": "folder",
    "classifier.num_hard_classes": 1,
    "optimization.epochs": 10**9,
    "optimization.warmup_epochs": 0,
    "optimization.global_batch_size": 1,
}


@dataclass(frozen=True)
class Draft:
    """An experiment as it was asked for.

    Attributes:
        values: what the file and `overrides` say, without the keys that are left to choose.
        auto: dotted keys that are left to choose.
        path: the file.
        overrides: of the command line.
    """

    values: dict[str, Any]
    auto: tuple[str, ...]
    path: Path
    overrides: tuple[str, ...]

    def completed(self, choices: Mapping[str, Any]) -> ExperimentConfig:
        """Returns the experiment with these choices, by dotted key; others are provisional and mean nothing.

        Raises:
            UserError: a value is out of range, or contradicts another.
        """
        values = self.values
        for key in self.auto:
            if key in choices:
                values = _with(values, key.split("."), choices[key])
            elif key in _PROVISIONAL:
                values = _with(values, key.split("."), _PROVISIONAL[key])
        return validated(values, self.path, self.overrides)

    def settled(self, choices: Mapping[str, Any]) -> "Draft":
        """Returns the draft with these choices made for good."""
        values, made = self.values, [key for key in self.auto if key in choices]
        for key in made:
            values = _with(values, key.split("."), choices[key])
        return replace(self, values=values, auto=tuple(key for key in self.auto if key not in made))

    def describe(self) -> str:
        """Returns the experiment and what is left to choose as JSON."""
        return json.dumps([self.completed({}).model_dump(mode="json"), self.auto], sort_keys=True)


def load_draft(path: Path, overrides: Sequence[str] = ()) -> Draft:
    """Reads a YAML file and applies `--set a.b=value` overrides, as `load_config` does, with values that are `auto`.

    Raises:
        UserError: the file is missing or malformed, a key or path is unknown, or a value is out of range.
    """
    values = read_values(path, overrides)
    auto = [key for key in automatic_keys() if _at(values, key.split(".")) == AUTO]
    for key in auto:
        values = _without(values, key.split("."))
    # Beside other choices, the stem is one: its cost decides, where `auto` alone goes by the image size.
    if auto and _at(values, STEM.split(".")) in (None, AUTO):
        auto.append(STEM)
    draft = Draft(values, tuple(auto), path, tuple(overrides))
    draft.completed({})
    return draft


def automatic_keys(model: type[BaseModel] = ExperimentConfig, prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys that may be `auto`."""
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from automatic_keys(section, f"{prefix}{name}.")
        elif AUTO in field.metadata:
            yield prefix + name


def _at(values: Any, names: Sequence[str]) -> Any:
    """The value at a path; None where there is none."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _with(values: Any, names: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy with the value at a path."""
    section = values if isinstance(values, dict) else {}
    first, *rest = names
    return {**section, first: _with(section.get(first), rest, value) if rest else value}


def _without(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A copy without the value at a path that is there."""
    first, *rest = names
    if not rest:
        return {name: value for name, value in values.items() if name != first}
    return {**values, first: _without(values[first], rest)}
