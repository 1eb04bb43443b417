"""gpuopt.toml, or [tool.gpuopt] in pyproject.toml, of the folder gpuopt runs in -> settings. The command line adds to them."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

from gpuopt.core.errors import UsageError

KNOWN = {"ignore": list}
"""Setting -> what it holds."""


def ignored(asked: list[str] | None) -> tuple[str, ...]:
    """Rules to leave out: those of the configuration, then those of the command line. Raises UsageError for a file that cannot be read, and for what is no rule."""
    return tuple(dict.fromkeys(_rule(word) for word in [*_read().get("ignore", []), *(asked or [])]))


def _rule(word: str) -> str:
    """A code or name as the rules have it: with a slip of the pen the rule would speak, and nobody would know why."""
    from gpuopt.doctor.rule import rules  # only where one is left out: there are many

    table = rules()
    names = [*table, *(rule.name for rule in table.values())]
    found = next((name for name in names if name.lower() == word.strip().lower()), None)
    if found is None:
        near = difflib.get_close_matches(word, names, n=1)
        raise UsageError(f"there is no rule {word!r} to ignore", fix=f"did you mean {near[0]}?" if near else "gpuopt doctor --explain all")
    return found


def _read() -> dict[str, Any]:
    for name, table in (("gpuopt.toml", ()), ("pyproject.toml", ("tool", "gpuopt"))):
        path = Path(name)
        if not path.is_file():
            continue
        try:
            found: Any = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            if table:  # somebody else's file: what it says of gpuopt cannot be known, and need not be
                continue
            raise UsageError(f"{name} cannot be read: {error}", fix="mend it, or run elsewhere") from error
        for key in table:
            found = found.get(key, {}) if isinstance(found, dict) else {}
        if not found:
            continue
        for key, value in found.items():
            if key not in KNOWN:
                raise UsageError(f"{name} sets {key!r}, which gpuopt does not know", fix="it knows: " + ", ".join(KNOWN))
            if not isinstance(value, KNOWN[key]) or not all(isinstance(item, str) for item in value):
                raise UsageError(f"{name}: {key} is {value!r}", fix=f"{key} = ['GPU307', 'small-batch']")
        return dict(found)
    return {}
