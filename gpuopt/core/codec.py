"""Values <-> JSON and YAML, and the JSON schema. The only file that imports pydantic and yaml."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from gpuopt.core.errors import BadInput, UsageError

T = TypeVar("T")


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _adapter(cls: Any) -> TypeAdapter[Any]:
    if cls not in _ADAPTERS:  # building one costs milliseconds
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def dump(value: Any) -> Any:
    """A dataclass -> plain JSON types. Raises ValueError on NaN or Inf: what is missing is None, never a float that JSON cannot carry."""
    plain = _adapter(type(value)).dump_python(value, mode="json")
    _refuse_nonfinite(plain, "$")
    return plain


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Sorted keys, one trailing newline when indented: the same value gives the same bytes."""
    text = json.dumps(dump(value), sort_keys=True, indent=indent, allow_nan=False, ensure_ascii=False)
    return text + "\n" if indent else text


def from_plain(cls: type[T], plain: Any, *, what: str = "value") -> T:
    """Plain JSON types -> a dataclass; extra keys and wrong types are refused. Raises UsageError naming the key."""
    return from_json(cls, json.dumps(plain), what=what)


def from_json(cls: type[T], text: str | bytes, *, what: str = "value") -> T:
    """JSON text -> a dataclass, strictly. Raises UsageError naming the key path."""
    try:
        value: T = _adapter(cls).validate_json(text, extra="forbid", strict=True)
        return value
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(p) for p in first["loc"]) or "$"
        raise UsageError(f"{what}: {where}: {first['msg']}", fix="see docs/report.schema.json and docs/recipes.md") from error


def read_json(cls: type[T], path: Path) -> T:
    """A report or manifest file -> its value. Raises BadInput when it is not one."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}", fix="name a file that gpuopt wrote with --json") from error
    try:
        return from_json(cls, text, what=str(path))
    except UsageError as error:
        raise BadInput(error.message, fix="name a file that this version of gpuopt wrote with --json") from error


def load_yaml(text: str, *, what: str) -> Any:
    """YAML text -> plain types. Duplicate keys, aliases and custom tags are refused. Raises UsageError with the line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except RecursionError as error:
        raise UsageError(f"{what}: nested too deeply", fix="recipes are flat") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UsageError(f"{what}{line}: {problem}", fix="recipes are plain YAML without aliases or repeated keys") from error


def from_yaml(cls: type[T], text: str, *, what: str) -> T:
    """YAML text -> a dataclass, as strictly as JSON. Raises UsageError naming the key path and its line."""
    plain = load_yaml(text, what=what)
    lines = yaml_lines(text)
    if not isinstance(plain, dict):
        raise UsageError(f"{what}: not a mapping of keys to values", fix="see docs/recipes.md")
    _refuse_odd(plain, (), lines, what)
    try:
        value: T = _adapter(cls).validate_json(json.dumps(plain), extra="forbid", strict=True)
        return value
    except ValidationError as error:
        raise _located(error, cls, lines, what) from error


def yaml_lines(text: str) -> dict[tuple[Any, ...], int]:
    """Path of every key and item of a YAML text that `from_yaml` accepts -> its line, from 1."""
    return _key_lines(yaml.compose(text, Loader=_StrictLoader), ())


def _located(error: ValidationError, cls: Any, lines: dict[tuple[Any, ...], int], what: str) -> UsageError:
    """The deepest complaint, at the place in the file it is about: of a union, pydantic names every branch."""
    details = error.errors(include_url=False)

    def place(loc: tuple[Any, ...]) -> tuple[Any, ...]:
        while loc and loc not in lines:
            loc = loc[:-1]
        return loc

    chosen = max(details, key=lambda d: (d["type"] == "unexpected_keyword_argument", len(place(d["loc"]))))
    path = place(chosen["loc"])
    at = f"{what}{f' line {lines[path]}' if path else ''}: {'.'.join(str(p) for p in path) or 'the top'}"
    if chosen["type"] == "unexpected_keyword_argument":
        name = str(chosen["loc"][-1])
        known = [f.name for f in fields(cls)] if len(chosen["loc"]) == 1 and is_dataclass(cls) else []
        close = difflib.get_close_matches(name, known, n=1)
        what_key = at if path and path[-1] == name else f"{at}: {name!r}"
        return UsageError(f"{what_key} is not a key here", fix=f"did you mean {close[0]}?" if close else "see docs/recipes.md")
    wanted = list(dict.fromkeys(d["msg"] for d in details if place(d["loc"]) == path))
    return UsageError(f"{at}: {' or '.join(wanted)}", fix="see docs/recipes.md")


def _key_lines(node: Any, path: tuple[Any, ...]) -> dict[tuple[Any, ...], int]:
    """Path of every key and item -> its line, from 1."""
    found: dict[tuple[Any, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            found[(*path, key.value)] = key.start_mark.line + 1
            found |= _key_lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found[(*path, index)] = value.start_mark.line + 1
            found |= _key_lines(value, (*path, index))
    return found


def _refuse_odd(plain: Any, path: tuple[Any, ...], lines: dict[tuple[Any, ...], int], what: str) -> None:
    """NaN, infinities, dates, sets and keys that are no text: what YAML can say and JSON cannot."""
    at = f"{what}{f' line {lines[path]}' if path in lines else ''}: {'.'.join(str(p) for p in path)}"
    if isinstance(plain, float) and not math.isfinite(plain):
        raise UsageError(f"{at} is {plain}", fix="a finite number, or leave the key out")
    if isinstance(plain, dict):
        for key, item in plain.items():
            if not isinstance(key, str):
                raise UsageError(
                    f"{what}: the key {key!r} under {'.'.join(str(p) for p in path) or 'the top'} is not text", fix="put it in quotes"
                )
            _refuse_odd(item, (*path, key), lines, what)
    elif isinstance(plain, list):
        for index, item in enumerate(plain):
            _refuse_odd(item, (*path, index), lines, what)
    elif plain is not None and not isinstance(plain, str | int | float | bool):
        raise UsageError(f"{at} is a {type(plain).__name__}", fix="put it in quotes")


def digest(value: Any) -> str:
    """sha256 of a value's JSON: the cache key of anything frozen."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()


def schema(cls: Any) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a dataclass as it is written."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_adapter(cls).json_schema(mode="serialization")}


def _refuse_nonfinite(plain: Any, path: str) -> None:
    if isinstance(plain, float) and not math.isfinite(plain):
        raise ValueError(f"{path} is {plain}: a value that may be missing is None")
    if isinstance(plain, dict):
        for key, item in plain.items():
            _refuse_nonfinite(item, f"{path}.{key}")
    elif isinstance(plain, list):
        for index, item in enumerate(plain):
            _refuse_nonfinite(item, f"{path}[{index}]")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses aliases (bombs) and duplicate keys (silent overwrites), with YAML 1.2's scalars.

    YAML 1.1, PyYAML's default, reads `1:8:16` as 4096, `010` as 8, `no` as false and `5e-3` as text.
    """

    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("null", r"(?:null|Null|NULL|~|)$", ["n", "N", "~", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$",
        list("-+.0123456789"),
    ),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
