"""Reads JSON and YAML that may be damaged or hostile: whatever is wrong becomes one error of one line."""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from instance_ssl.errors import printable

_MAX_DEPTH, _MAX_VALUES, _MAX_INTEGER, _MAX_LINE = 100, 200_000, 2**63, 300
_TOO_DEEP = f"it nests more than {_MAX_DEPTH} levels"


class MalformedError(ValueError):
    """What is wrong with a text, in one printable line."""

    def __init__(self, problem: str) -> None:
        super().__init__(printable(" ".join(problem[:_MAX_LINE].split())))


def read_json(path: Path, *, by_hand: bool = False) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Args:
        by_hand: also refuse what no program writes: a duplicate key, a number that is not finite.

    Raises:
        OSError: the file cannot be read.
        MalformedError: it does not hold exactly one valid object.
    """
    values = parse_json(path.read_bytes(), by_hand=by_hand)
    if not isinstance(values, dict):
        raise MalformedError(f"expected an object of keys and values, found a {type(values).__name__}")
    return values


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the objects of a file that holds one a line, and the number of broken lines."""
    *lines, rest = path.read_bytes().split(b"\n")
    found = []
    for line in lines:
        with suppress(MalformedError):
            found.append(parse_json(line))
    sound = [values for values in found if isinstance(values, dict)]
    return sound, len(lines) - len(sound) + bool(rest)


def parse_json(text: str | bytes, *, by_hand: bool = False, is_large: bool = False) -> Any:
    """Parses any JSON value.

    Args:
        is_large: skip the check of every value, which takes longer than parsing.

    Raises:
        MalformedError: it is not JSON, nests more than 100 levels, or holds integers beyond 64 bits or broken text.
    """
    try:
        values = json.loads(text, object_pairs_hook=_without_repetition if by_hand else None)
    except RecursionError:
        raise MalformedError(_TOO_DEEP) from None
    except UnicodeDecodeError:
        raise MalformedError("not UTF-8 text") from None
    except ValueError as error:
        raise MalformedError(f"not JSON: {error}") from None
    if not is_large:
        _check(values, finite=by_hand)
    return values


def parse_yaml(text: str | bytes) -> Any:
    """Parses any value of safe YAML; raises as `parse_json`, and for a duplicate key."""
    try:
        loader = _Loader(text)
        try:
            values = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise MalformedError(f"not YAML{where}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise MalformedError(f"not YAML: {error}") from None  # PyYAML's constructors let all of these through
    _check(values)
    return values


class _Loader(yaml.SafeLoader):
    """Refuses deep nesting early, because the scanner takes quadratic time in depth, and duplicate keys."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        self._refuse_depth(self.flow_level)
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        self._refuse_depth(len(self.indents))
        return bool(super().add_indent(column))

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def _refuse_depth(self, depth: int) -> None:
        if depth >= _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.get_mark())


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key '{next(key for key in keys if keys.count(key) > 1)}' is given twice")
    return values


def _check(values: Any, *, finite: bool = False) -> None:
    """Refuses deep nesting, alias bombs, and numbers and text that no reader can hold."""
    left, count = [(values, 1)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if depth > _MAX_DEPTH + 1:
            raise MalformedError(_TOO_DEEP)
        if count > _MAX_VALUES:
            raise MalformedError(f"it holds more than {_MAX_VALUES:,} values")
        if isinstance(value, str):
            try:
                value.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                raise MalformedError(f"it holds half a character, in '{value[:40]}'") from None
            if "\0" in value:
                raise MalformedError(f"it holds a zero character, in '{value[:40]}'")
        elif isinstance(value, int):
            if not -_MAX_INTEGER <= value < _MAX_INTEGER:
                raise MalformedError("it holds an integer beyond 64 bits")
        elif isinstance(value, float) and finite and not math.isfinite(value):
            raise MalformedError("it holds a number that is not finite")
        elif isinstance(value, dict | list | set | tuple):
            inner: Iterable[Any] = (*value, *value.values()) if isinstance(value, dict) else value
            left += [(item, depth + 1) for item in inner]
