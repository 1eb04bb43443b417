"""A rule: its page and the function that finds it. The table is the folder: a file with a RULE is a rule."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from gpuopt.core.result import Finding
from gpuopt.doctor.evidence import Evidence

Find = Callable[[Evidence], Iterable[Finding]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One page of the handbook. Texts are plain sentences; `before` and `after` are code."""

    code: str
    """`GPU101`: stable, never reused."""
    name: str
    """In words, for people and configuration: `pageable-h2d`."""
    what: str
    """What is wrong, in one sentence."""
    why: str
    """Why it costs time, memory or correctness."""
    before: str
    after: str
    safe: bool
    """Whether the fix keeps results within the accuracy gate by its nature; only those are applied by --fix."""
    needs: frozenset[str]
    """Fields of Evidence that must be there for this rule to look: `module`, `trace`, …; without them it is silent."""
    find: Find
    source: str = ""
    """Where the threshold or estimate comes from."""
    has_change: bool = False
    """Whether gpuopt can make the change itself, at least in some cases: then findings carry it."""
    explains: frozenset[str] = frozenset()
    """Codes of symptoms of this cause: their findings about the same place are dropped where this rule found something."""


@cache
def rules() -> dict[str, Rule]:
    """code -> rule, in order of codes. Raises RuntimeError for a code used twice: a bug."""
    from gpuopt.doctor import rules as folder

    found: dict[str, Rule] = {}
    for info in pkgutil.iter_modules(folder.__path__):
        rule = getattr(importlib.import_module(f"{folder.__name__}.{info.name}"), "RULE", None)
        if rule is None:
            continue
        if rule.code in found:
            raise RuntimeError(f"{rule.code} is used by {found[rule.code].name} and {rule.name}")
        found[rule.code] = rule
    return dict(sorted(found.items()))
