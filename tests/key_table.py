"""Writes the tables of all configuration keys into runners/configs/README.md and ds_configs/README.md.

python tests/key_table.py
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from instance_ssl.config.deepspeed import InstanceClassifierSection
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.config.types import AUTO

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- keys: written by tests/key_table.py -->", "<!-- keys: end -->"
_NAMES = {
    dict[str, Any]: "keys and values",
    int: "int",
    float: "float",
    str: "text",
    bool: "true, false",
    Path: "path",
    NoneType: "null",
}
_BOUNDS = {annotated_types.Ge: ("ge", "≥"), annotated_types.Gt: ("gt", ">"), annotated_types.Le: ("le", "≤")}
_BOUNDS[annotated_types.Lt] = ("lt", "<")
_LONGEST_DEFAULT = 48


def tables() -> dict[Path, str]:
    """The text between the markers of each page."""
    experiment = "\n\n".join(_section_tables())
    return {
        ROOT / "runners/configs/README.md": experiment,
        ROOT / "ds_configs/README.md": _table(_rows(InstanceClassifierSection, "instance_classifier.")),
    }


def replaced(page: str, table: str) -> str:
    """The page with the text between its markers replaced."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


def _section_tables() -> Iterator[str]:
    plain = [row for row in _rows(ExperimentConfig) if "." not in row[0]]
    if plain:
        yield _table(plain)
    for name, field in ExperimentConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield f"**`{name}`**: {_summary(section)}\n\n{_table(_rows(section, f'{name}.'))}"


def _rows(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and meaning of every key, sections inside included."""
    meanings = _meanings(model)
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            if prefix:
                yield from _rows(section, f"{prefix}{name}.")
            continue
        types = ("`auto`, " if AUTO in field.metadata else "") + _describe_type(section, field.metadata)
        yield prefix + name, types, _describe_default(field), meanings.get(name, "")


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """First sentence of each entry below `Attributes:` of the docstring."""
    text = (model.__doc__ or "").partition("Attributes:")[2]
    entries = re.split(r"\n        (?=[a-z])", text)
    found: dict[str, str] = {}
    for entry in entries[1:]:
        names, _, meaning = entry.partition(":")
        for name in names.split(","):
            found[name.strip()] = _first_sentence(meaning)
    return found


def _summary(model: type[BaseModel]) -> str:
    return _first_sentence((model.__doc__ or "").partition("Attributes:")[0]).rstrip(".") + "."


def _first_sentence(text: str) -> str:
    return re.split(r"\. (?=[A-Z`])", " ".join(text.split()))[0].rstrip(".")


def _describe_type(annotation: Any, metadata: Any = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for each in arguments[1:] for m in (each.metadata if isinstance(each, FieldInfo) else [each])]
        return _describe_type(arguments[0], inner)
    if origin in (Union, UnionType):
        return ", ".join(_describe_type(each, metadata) for each in arguments)
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if origin is tuple:
        return f"list of {_describe_type(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    bounds = [f" {sign} {getattr(m, key)}" for m in metadata for k, (key, sign) in _BOUNDS.items() if isinstance(m, k)]
    return _NAMES[annotation] + (" and".join(bounds) if annotation in (int, float) else "")


def _describe_default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    value = list(value) if isinstance(value, tuple) else value
    text = json.dumps(value).strip('"')
    return f"`{text}`" if len(text) <= _LONGEST_DEFAULT else f"{len(value)} values"


def _table(rows: Any) -> str:
    lines = [("key", "values", "default", "meaning"), ("---",) * 4, *((f"`{key}`", *rest) for key, *rest in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    for path, table in tables().items():
        path.write_text(replaced(path.read_text(), table))
