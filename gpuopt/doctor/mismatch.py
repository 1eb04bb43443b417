"""A forward that raised -> the one finding about it: the frame that the rules about mismatched tensors share. Each says which tensors are odd, and what brings them home."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from gpuopt.core.result import Finding
from gpuopt.doctor import failure
from gpuopt.doctor.evidence import Evidence

SHOWN = 3
"""Tensors named in a message, and repaired in a fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a rule says of a failure whose place is known."""

    message: str
    fix: str
    num_tensors: int = 0
    """That are not as the others; 0 where that is no question."""


def finding(
    evidence: Evidence, kind: str, judge: Callable[[failure.Failed, BaseException], Verdict], *, otherwise: str
) -> Iterator[Finding]:
    """The finding about a failure of this kind (`failure.kind`); with the fix `otherwise` where no module can be named. None for any other failure."""
    error = evidence.failure
    if error is None or failure.kind(error) != kind:
        return
    failed = failure.locate(evidence.module, evidence.inputs, error)
    if failed is None:
        yield Finding(code="", severity="error", message=f"forward() raised: {failure.first_line(error)}", fix=otherwise)
        return
    verdict = judge(failed, error)
    yield Finding(
        code="",
        severity="error",
        message=verdict.message,
        fix=verdict.fix,
        module=failed.module_name,
        line=failed.line,
        op=failed.code or None,
        count=verdict.num_tensors or None,
    )


def named(tensors: Iterable[failure.Seen], error: BaseException) -> str:
    """The first few with where they come from; the exception's own words where none is known."""
    return "; ".join(t.text for t in list(tensors)[:SHOWN]) or failure.first_line(error)


def each(tensors: Iterable[failure.Seen], fix: Callable[[failure.Seen], str]) -> str:
    """Their fixes, the same one once; "" where there are none."""
    return "; ".join(dict.fromkeys(fix(t) for t in list(tensors)[:SHOWN]))


def causes(failed: failure.Failed, is_odd: Callable[[failure.Seen], bool]) -> list[failure.Seen]:
    """Where each odd tensor of the failing line comes from, each once."""
    return list(dict.fromkeys(t.cause(is_odd) for t in failed.tensors if is_odd(t)))
