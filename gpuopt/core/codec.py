"""Values <-> JSON and YAML, and the JSON schema. The only file that imports pydantic and yaml."""

from __future__ import annotations

import hashlib
import json
import math
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from gpuopt.core.errors import BadInput, UsageError

T = TypeVar("T")


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


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
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader subclass
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UsageError(f"{what}{line}: {problem}", fix="recipes are plain YAML without aliases or repeated keys") from error


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
    """SafeLoader that refuses aliases (bombs) and duplicate keys (silent overwrites)."""

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
