"""Measured ceilings <-> a file in the user's cache. A cache that is broken, foreign or read-only costs a new measurement and a note, never more."""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gpuopt.core import codec
from gpuopt.core.errors import BadInput
from gpuopt.core.result import Ceilings


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a file holds: the machine it was measured on, written out, and the figures."""

    key: dict[str, str]
    ceilings: Ceilings


def folder() -> Path:
    """`$XDG_CACHE_HOME/gpuopt/ceilings`; a relative XDG_CACHE_HOME is ignored, as its specification says."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "gpuopt" / "ceilings"


def read(key: dict[str, str]) -> tuple[Ceilings | None, str | None]:
    """(what was measured before, None), (None, why it cannot be used), or (None, None) where nothing was."""
    path = _path(key)
    problem = _foreign(path.parent)
    if problem is not None:
        return None, problem
    if not path.exists():
        return None, None
    try:
        entry = codec.read_json(Entry, path)
    except BadInput as error:
        return None, f"the cached ceilings were unreadable and were measured again: {error.message.splitlines()[0]}"
    rows = entry.ceilings.rows
    if entry.key != key or not rows or any(row.kind != "measured" or not row.value > 0 for row in rows):
        return None, "the cached ceilings were not of this machine and were measured again"
    return entry.ceilings, None


def write(key: dict[str, str], ceilings: Ceilings) -> str | None:
    """Publish by one rename; None when written, else why not."""
    path = _path(key)
    problem = _foreign(path.parent)
    if problem is not None:
        return problem
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(codec.to_json(Entry(key=key, ceilings=ceilings), indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return f"the ceilings could not be cached in {path.parent}: {error.strerror or error}"
    return None


def _path(key: dict[str, str]) -> Path:
    return folder() / f"{codec.digest(key)[:32]}.json"


def _foreign(path: Path) -> str | None:
    """Why figures from this folder are not to be believed: somebody else owns it or may write into it."""
    try:
        found = path.stat()
    except OSError:
        return None
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        return f"{path} belongs to another user: the ceilings are not cached"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write into {path}: the ceilings are not cached"
    return None
