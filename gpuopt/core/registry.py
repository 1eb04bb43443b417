"""Name -> object, imported late, with a did-you-mean and a reason when it cannot be."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from gpuopt.core.errors import Unavailable, UsageError


def resolve(table: Mapping[str, str], name: str, *, kind: str, extra: str | None = None) -> Any:
    """`table[name]` is `package.module:attribute`; import it and return the attribute.

    `kind` names the table in messages and is the entry-point group `gpuopt.<kind>s`. `extra` is the pip extra that brings the library.
    Raises UsageError for an unknown name, Unavailable when its library is missing or broken. An ImportError inside gpuopt itself is our bug and is re-raised.
    """
    target = table.get(name)
    if target is None:
        for point in entry_points(group=f"gpuopt.{kind}s"):
            if point.name == name:
                target = point.value
    if target is None:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"no {kind} is called {name!r}", fix=f"{hint}one of: {', '.join(table)}")
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "gpuopt":
            raise
        if not missing:  # raised by hand, as numpy and others do when their native part does not fit
            first = (str(error).splitlines() or [""])[0]
            raise Unavailable(
                f"{kind} {name!r} has a package that does not import: {first}", fix="reinstall its package for this platform"
            ) from error
        raise Unavailable(
            f"{kind} {name!r} needs the package {missing!r}: {error}",
            fix=f"pip install 'gpuopt[{extra}]'" if extra else f"pip install {missing}",
        ) from error
    except OSError as error:  # a native library that does not load
        raise Unavailable(
            f"{kind} {name!r} has a library that does not load: {error}", fix="reinstall its package for this platform"
        ) from error
    return getattr(module, attribute) if attribute else module
