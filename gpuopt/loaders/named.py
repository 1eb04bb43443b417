"""What a reference names -> nothing, or the error that loading it would end with, as far as a look at names and headers tells. Runs no code of the user's, imports no torch.

For whoever is about to spend time on something else first: measuring a machine takes half a minute, a misspelt path none. What cannot be told without importing (a module that
makes its names as it runs) passes; the loader says it then.
"""

from __future__ import annotations

import ast
import difflib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

from gpuopt.core.errors import UsageError
from gpuopt.trust.policy import printable


def require(text: str, example: str, *, what: str = "factory") -> None:
    """`package.module:name` or `file.py:name`. Raises UsageError where there is no such file, module or name, in the words of `factory.named`."""
    where, _, attribute = text.rpartition(":")
    if not where or not attribute:
        raise UsageError(f"{printable(text)!r} is not of the form package.module:{what}", fix=example)
    file = Path(where) if where.endswith(".py") else _source(where)
    if file is None:
        return
    if not file.is_file():
        nearby = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise UsageError(f"there is no file {printable(str(file))}", fix=did_you_mean(file.name, nearby))
    known = _names(file)
    first = attribute.partition(".")[0]
    if known is not None and first not in known:
        raise UsageError(f"{where} has no {first!r}", fix=did_you_mean(first, [n for n in known if not n.startswith("_")]))


def did_you_mean(name: str, known: list[str]) -> str:
    """The nearest of those that are there, or a list of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there is: {', '.join(sorted(known)[:12])}" if known else "check the name; the current folder is importable"


def _source(name: str) -> Path | None:
    """The file of a module, found without importing its packages; None where that cannot be told. Raises UsageError where a part of it is nowhere."""
    path: list[str] | None = [*sys.path, *([str(Path.cwd())] if "" not in sys.path else [])]
    found: importlib.machinery.ModuleSpec | None = None
    parts = name.split(".")
    if not all(parts):
        raise UsageError(f"{printable(name)!r} is no module name", fix="package.module:factory, or file.py:factory")
    for depth, part in enumerate(parts, 1):
        whole = ".".join(parts[:depth])
        if depth == 1 and part in sys.modules:
            found = getattr(sys.modules[part], "__spec__", None)
            if found is None:  # made by hand, or the program itself
                return None
        else:
            found = importlib.machinery.PathFinder.find_spec(whole, path)
        if found is None:
            # Finders beside the path's own (editable installs, zips) and builtin modules: only the first part may be theirs.
            if depth == 1 and importlib.util.find_spec(part) is None:
                near = [p.stem for p in Path.cwd().glob("*.py")] + ["gpuopt.models"]
                raise UsageError(f"there is no module {printable(whole)!r}", fix=did_you_mean(whole, near))
            return None
        path = list(found.submodule_search_locations) if found.submodule_search_locations is not None else None
        if path is None and depth < len(parts):
            return None
    origin = found.origin if found is not None else None
    return Path(origin) if origin and origin.endswith(".py") else None


def _names(file: Path) -> set[str] | None:
    """Names that a file binds at its top level; None where it makes others as it runs, or is no Python that can be read: importing it says more."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    found: set[str] = set()
    for node in _top(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        for inner in [] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                found.add(inner.id)
            elif isinstance(inner, ast.Name) and inner.id in ("globals", "vars", "exec", "eval", "setattr", "locals"):
                return None
    lazy = _listed(tree) if "__getattr__" in found else set()
    return None if "*" in found or lazy is None else found | lazy


def _top(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements of a module, those inside `if`, `try`, `with` and loops included."""
    found: list[ast.stmt] = []
    for node in body:
        found.append(node)
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found += _top(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            found += _top(handler.body)
    return found


def _listed(tree: ast.Module) -> set[str] | None:
    """`__all__` where it is written out: of a module that makes its names on demand, these are all it offers. None where it is not."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            try:
                return set(ast.literal_eval(node.value))
            except (ValueError, TypeError):
                return None
    return None
