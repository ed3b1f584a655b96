"""Describes mistakes in a configuration in one line: the key, what was found, and what is expected."""

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

# Keys of the DeepSpeed JSON, the last being this project's own section; here, because a JSON given as the experiment is
# recognised by them.
DEEPSPEED_KEYS = (
    "train_micro_batch_size_per_gpu",
    "zero_optimization",
    "torch_autocast",
    "activation_checkpointing",
    "communication_data_type",
    "wall_clock_breakdown",
    "instance_classifier",
)
_EXPECTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}


def describe_validation_error(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Describes pydantic's first error in one line: the key, what was found, and what is expected."""
    errors = error.errors()
    location = _known_part(model, errors[0]["loc"])
    # A field of several types has one error for each.
    same = [each for each in errors if _known_part(model, each["loc"]) == location]
    rest = len(errors) - len(same)
    more = f" (and {rest} more)" if rest else ""
    key = ".".join(([prefix] if prefix else []) + location)
    if same[0]["type"] == "extra_forbidden":
        return f"{unknown_key(location, model, prefix)}{more}"
    message = ", or ".join(dict.fromkeys(_describe(each, key, model, location) for each in same))
    return f"{key}: {message}{more}" if key else f"{message}{more}"


def unknown_key(location: Sequence[str], model: type[BaseModel], prefix: str = "") -> str:
    """Describes an unknown key and suggests one of another section, or the nearest by spelling."""
    key = ".".join(([prefix] if prefix else []) + list(location))
    name, known = location[-1], fields_at(model, location[:-1])
    if not prefix and name in DEEPSPEED_KEYS:
        return f"unknown key '{key}': it belongs in the DeepSpeed JSON, the file of --deepspeed_config"
    homes = [home for home in _keys_named(name, model) if home != key]
    if homes and not difflib.get_close_matches(name, known, n=1):
        return f"unknown key '{key}'; did you mean {' or '.join(homes[:3])}?"
    return f"unknown key '{key}'{nearest(name, known)}"


def nearest(name: str, known: Sequence[str]) -> str:
    """Returns `; did you mean 'x'?`, or the known names if none is near."""
    match = difflib.get_close_matches(name, known, n=1)
    if match:
        return f"; did you mean '{match[0]}'?"
    return f"; known keys: {', '.join(known)}" if known else "; it is a value and has no keys"


def fields_at(model: type[BaseModel], names: Sequence[str]) -> list[str]:
    """Returns the keys of the section at the path `names`; none for a plain value."""
    return list(_fields(model, names))


def takes_any_key(model: type[BaseModel], names: Sequence[str]) -> bool:
    """Whether the value at the path `names` is a mapping whose keys are not this project's."""
    field = _fields(model, names[:-1]).get(names[-1]) if names else None
    return field is not None and get_origin(field.annotation) is dict


def _fields(model: type[BaseModel], names: Sequence[str]) -> dict[str, FieldInfo]:
    for name in names:
        if (inner := _section(model, name)) is None:
            return {}
        model = inner
    return model.model_fields


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Returns the section behind a key, or None."""
    field = model.model_fields.get(name)
    candidates = [] if field is None else [field.annotation, *get_args(field.annotation)]
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _keys_named(name: str, model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields dotted keys whose last part is `name`, outer ones first."""
    if name in model.model_fields:
        yield prefix + name
    for key in model.model_fields:
        if (section := _section(model, key)) is not None:
            yield from _keys_named(name, section, f"{prefix}{key}.")


def _known_part(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Returns the parts of the key; pydantic also adds a tag for each type that a field may have."""
    inner: type[BaseModel] | None = model
    parts: list[str] = []
    for part in location:
        if isinstance(part, str) and inner is None:
            break
        parts.append(str(part))
        inner = _section(inner, part) if inner is not None and isinstance(part, str) else None
    return parts


def _describe(error: Any, key: str, model: type[BaseModel], location: Sequence[str]) -> str:
    """Describes what is wrong with one value and how to fix it."""
    kind, found = error["type"], error["input"]
    if kind in _BOUNDS:
        name, word = _BOUNDS[kind]
        return f"must be {word} {error['ctx'][name]:g}, not {found}"
    if kind == "literal_error":
        choices = error["ctx"]["expected"]
        names = [choice.strip("'") for choice in choices.replace(" or ", ", ").split(", ")]
        match = difflib.get_close_matches(str(found).lower(), names, n=1)
        return f"expected {choices}, found {found!r}" + (f"; did you mean '{match[0]}'?" if match else "")
    if kind in ("tuple_type", "list_type"):
        text = str(found).strip("()[]{}")
        cure = f": write '{key}=[{text}]' after --set, or {location[-1]}: [{text}] in the YAML"
        return f"expected a list, found {found!r}{'' if found is None or isinstance(found, dict) else cure}"
    if kind == "dict_type" and takes_any_key(model, location):
        return f"expected keys and values, found {found!r}: set {key}.<name>=value, or write {{}} for none"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        keys = ", ".join(fields_at(model, location)[:4])
        where = "nothing" if found is None else repr(found)
        return f"this is a section with keys of its own ({keys}, …), found {where}: set {key}.<key>, or remove it"
    if kind in _EXPECTED:
        field = _fields(model, location[:-1]).get(location[-1]) if location else None
        nullable = field is not None and type(None) in get_args(field.annotation)
        return f"expected {_EXPECTED[kind]}, found {found!r}{_hint(kind, found, nullable=nullable)}"
    return str(error["msg"]).removeprefix("Value error, ")


def _hint(kind: str, found: Any, *, nullable: bool) -> str:
    """Guesses what the user meant."""
    if not isinstance(found, str) or not found.strip():
        return ""
    text = found.strip()
    if text.lower() == "none":
        return ": write null for none" if nullable else ""
    if "," in text:
        return ": one number, with a decimal point"
    share = re.fullmatch(r"(\d+(?:\.\d+)?) *%", text) if kind.startswith("float") else None
    if share is not None:
        return f": write {float(share[1]) / 100:g} for {text}"
    return ": leave out the unit" if re.match(r"[0-9.]+ *[A-Za-z%]+$", text) and kind[:3] in ("int", "flo") else ""
