"""nn.Module + attribute -> the lines of its forward that use `self.attribute`, read from the source; None where there is none to read."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

_HARMLESS = frozenset({"shape", "size", "dim", "ndim", "numel", "dtype", "device", "is_cuda", "stride"})
"""What may be asked of a tensor wherever it lies."""
_MOVES = frozenset({"to", "cuda", "type_as", "item", "tolist", "cpu", "numpy"})
"""Methods that bring a tensor along, or take its values to the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One read of `self.attribute` in code that forward reaches."""

    line: str
    """`model.py:12`."""
    is_moved: bool
    """It is brought to another device there and then, or only its shape is read."""


def uses(part: Any, attribute: str) -> tuple[Use, ...] | None:
    """Reads of `self.attribute` in the module's `forward` and in the methods it calls on `self`; None where the source cannot be read."""
    cls: Any = type(part)
    return _uses(cls, attribute)


@lru_cache(maxsize=4096)
def _uses(cls: Any, attribute: str) -> tuple[Use, ...] | None:
    methods = _methods(cls)
    if "forward" not in methods:
        return None
    found = []
    for name in _reached(methods):
        file, tree = methods[name]
        above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in _reads(tree, attribute):
            found.append(Use(line=f"{file}:{node.lineno}", is_moved=_is_moved(node, above)))
    return tuple(found)


def _methods(cls: Any) -> dict[str, tuple[str, ast.AST]]:
    """name -> (file, tree with the file's own line numbers), nearest class first; torch's own classes are left out."""
    found: dict[str, tuple[str, ast.AST]] = {}
    for base in cls.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        for name, member in vars(base).items():
            function = member.fget if isinstance(member, property) else member
            if name in found or name == "__init__" or not callable(function):
                continue
            try:
                plain = inspect.unwrap(function)
                lines, start = inspect.getsourcelines(plain)
                tree = ast.parse(textwrap.dedent("".join(lines)))
                file = Path(inspect.getsourcefile(plain) or "?").name
            except (OSError, TypeError, SyntaxError, ValueError):
                continue
            found[name] = (file, ast.increment_lineno(tree, start - 1))
    return found


def _reached(methods: dict[str, tuple[str, ast.AST]]) -> list[str]:
    queue, found = ["forward"], []
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found.append(name)
        queue += [node.attr for node in ast.walk(methods[name][1]) if _is_self(node) and node.attr in methods]  # type: ignore[attr-defined]
    return found


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _reads(tree: ast.AST, attribute: str) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_self(node) and node.attr == attribute and isinstance(node.ctx, ast.Load):
            yield node


def _is_moved(node: ast.AST, above: dict[ast.AST, ast.AST]) -> bool:
    """`self.a.to(x.device)`, `self.a[:n].to(…)`, `torch.as_tensor(self.a, device=…)`, `self.a.shape`, `self.a is None`."""
    while True:
        parent = above.get(node)
        if isinstance(parent, ast.Attribute):
            return parent.attr in _HARMLESS | _MOVES
        if isinstance(parent, ast.Call):
            return any(keyword.arg == "device" for keyword in parent.keywords)
        if isinstance(parent, ast.Compare):
            return any(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
        if not (isinstance(parent, ast.Subscript) and parent.value is node):
            return False
        node = parent
