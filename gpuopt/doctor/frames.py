"""A frame in which an op raised -> the tensors that its expression names, without running any of its code.

Python 3.11 and later keep the columns of every instruction (PEP 657): the source of the failing expression is parsed, and its names and attributes are looked up, never called.
torch is imported by the functions that need it: the table of rules loads without it.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    import torch
    from torch import nn

FACTORIES = frozenset(
    "arange as_tensor empty eye from_numpy full hann_window linspace logspace ones rand randint randn randperm tensor tril_indices triu_indices zeros".split()
)
"""Functions of torch that make a tensor on the default device unless `device=` is given."""
_CALLS = frozenset({"_call_impl", "_wrapped_call_impl", "__call__"})


@dataclass(frozen=True, slots=True)
class Place:
    """One entry of a traceback."""

    frame: FrameType
    lasti: int
    lineno: int

    @property
    def module(self) -> nn.Module | None:
        """The module whose method this is, or whose call."""
        found = self.frame.f_locals.get("self")
        return found if is_module(found) else None

    @property
    def is_torchs(self) -> bool:
        """Code of torch itself."""
        return self.frame.f_code.co_filename.startswith(_torchs_folder())

    @property
    def is_installed(self) -> bool:
        """Code of an installed package, not the user's own."""
        return any(part in ("site-packages", "dist-packages") for part in Path(self.frame.f_code.co_filename).parts)

    @property
    def is_call(self) -> bool:
        """nn.Module's own machinery around forward()."""
        return self.is_torchs and self.frame.f_code.co_name in _CALLS

    @property
    def line(self) -> str:
        """`model.py:12`."""
        return f"{Path(self.frame.f_code.co_filename).name}:{self.lineno}"


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor with the words the source has for it; `tensor` is None for one made inside the expression, which no variable holds."""

    text: str
    tensor: torch.Tensor | None


def is_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    """Fake and meta tensors too."""
    import torch

    return isinstance(value, torch.Tensor)


def is_module(value: Any) -> TypeGuard[nn.Module]:
    """An nn.Module, scripted ones too."""
    from torch import nn

    return isinstance(value, nn.Module)


@cache
def _torchs_folder() -> str:
    import torch

    return str(Path(torch.__file__).parent)


def places(traceback: TracebackType | None) -> list[Place]:
    """Outermost first."""
    found = []
    while traceback is not None:
        found.append(Place(traceback.tb_frame, traceback.tb_lasti, traceback.tb_lineno))
        traceback = traceback.tb_next
    return found


def expression(place: Place) -> ast.expr | None:
    """What was being evaluated; None without its source."""
    positions = next((p for i, p in enumerate(place.frame.f_code.co_positions()) if i == place.lasti // 2), None)
    if positions is None or any(p is None for p in positions):
        return None
    first, last, start, end = (p or 0 for p in positions)
    lines = [line.encode() for line in linecache.getlines(place.frame.f_code.co_filename, place.frame.f_globals)[first - 1 : last]]
    if not lines or len(lines) < last - first + 1:
        return None
    lines[-1] = lines[-1][:end]  # columns count bytes; the end first, because one line may be both
    lines[0] = lines[0][start:]
    try:
        return ast.parse("(" + b"".join(lines).decode() + "\n)", mode="eval").body
    except (SyntaxError, ValueError):
        return None


def operands(place: Place) -> list[Named]:
    """Tensors of the failing expression, in order, each once; calls inside it that make one count as their text."""
    tree = expression(place)
    return [] if tree is None else _named(tree, place.frame)


def operands_of(text: str, frame: FrameType) -> list[Named]:
    """The same of an expression evaluated earlier in a frame; variables bound anew since then have their newest values."""
    try:
        return _named(ast.parse(text, mode="eval").body, frame)
    except SyntaxError:
        return []


def _named(tree: ast.expr, frame: FrameType) -> list[Named]:
    found: dict[str, Named] = {}
    for node in _walk(tree, frame, is_op=True):
        text = ast.unparse(node)
        if isinstance(node, ast.Call):
            found[text] = Named(text, None)
        else:
            for name, tensor in tensors(text, _value(node, frame)):
                found[name] = Named(name, tensor)
    return list(found.values())


def variables(place: Place) -> dict[str, torch.Tensor]:
    """Local tensors by name, lists and tuples of them opened."""
    return {name: tensor for key, value in place.frame.f_locals.items() for name, tensor in tensors(key, value)}


def tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A value that is a tensor, or tensors in a list, tuple or mapping, with their names: `past[0]`."""
    if is_tensor(value):
        yield name, value
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value[:64]):
            if is_tensor(item):
                yield f"{name}[{index}]", item
    elif isinstance(value, Mapping) and len(value) <= 64:
        for key, item in value.items():
            if is_tensor(item):
                yield f"{name}[{key!r}]", item


def made_at(place: Place, variable: str) -> tuple[str, str] | None:
    """(`model.py:12`, right-hand side) of the last assignment to a local variable above the failing line."""
    try:
        lines, first = inspect.getsourcelines(place.frame.f_code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, or a lambda cut out of its line
        return None
    best: tuple[int, str] | None = None
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets: list[ast.expr] = node.targets
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
            targets = [node.target]
        else:
            continue
        lineno = first + node.lineno - 1
        names = {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        if variable in names and node.value is not None and lineno <= place.lineno and (best is None or lineno >= best[0]):
            best = (lineno, ast.unparse(node.value))
    return None if best is None else (f"{Path(place.frame.f_code.co_filename).name}:{best[0]}", best[1])


def factory(text: str) -> str | None:
    """The factory of torch that an expression calls without `device=`: `arange` for `torch.arange(n)[None]`."""
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return None
    return next((_factory_name(node) for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_factory(node)), None)


def _walk(node: ast.AST, frame: FrameType, *, is_op: bool = False) -> Iterator[ast.expr]:
    """Longest names and attribute chains, and calls of factories. The object of a method is an operand (`x.view(2)`); what a layer was called with is not, its result is."""
    if isinstance(node, ast.Call):
        if _is_factory(node):
            yield node
            return
        if not is_op and is_module(_value(node.func, frame)):
            return
        if isinstance(node.func, ast.Attribute):
            yield from _walk(node.func.value, frame)
        for child in (*node.args, *(keyword.value for keyword in node.keywords)):
            yield from _walk(child, frame)
    elif isinstance(node, ast.Name | ast.Attribute):
        yield node
    else:
        for part in ast.iter_child_nodes(node):
            yield from _walk(part, frame)


def _is_factory(node: ast.Call) -> bool:
    return _factory_name(node) in FACTORIES and all(keyword.arg != "device" for keyword in node.keywords)


def _factory_name(node: ast.Call) -> str | None:
    func = node.func
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id in ("torch", "th"):
        return func.attr
    return None


def _value(node: ast.AST, frame: FrameType) -> Any:
    """What a name or chain of attributes holds, by plain look-up: no property and no __getattr__ of the user's is run."""
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id, frame.f_globals.get(node.id))
    if not isinstance(node, ast.Attribute):
        return None
    owner = _value(node.value, frame)
    if is_tensor(owner):
        return owner  # x.T, x.shape: of x
    if is_module(owner):
        for table in (owner._parameters, owner._buffers, owner._modules):
            if node.attr in table:
                return table[node.attr]
    return getattr(owner, "__dict__", {}).get(node.attr)


__all__ = [
    "FACTORIES",
    "Named",
    "Place",
    "expression",
    "factory",
    "is_module",
    "is_tensor",
    "made_at",
    "operands",
    "places",
    "tensors",
    "variables",
]
