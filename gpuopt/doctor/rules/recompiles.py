"""GPU502: torch.compile compiled a function again, because a guard failed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

WORST = 5


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for each function, with the guard that failed most; unpriced, because compile time falls on single calls and not on every one."""
    assert evidence.compiled is not None
    by_function: dict[str, Counter[str]] = {}
    for function, guard in evidence.compiled.recompiles:
        by_function.setdefault(function, Counter())[_first_line(guard)] += 1
    ranked = sorted(by_function.items(), key=lambda item: (-item[1].total(), item[0]))
    for function, guards in ranked[:WORST]:
        guard, _ = guards.most_common(1)[0]
        others = f" (and {words.number(len(guards) - 1, 'other guard')})" if len(guards) > 1 else ""
        count = guards.total()
        yield Finding(
            code="",
            severity="warning",
            message=f"{_name(function)} was compiled again {words.times(count)}: {guard}{others}",
            fix=_fix(guard),
            line=_line(function),
            count=count,
        )
    rest = ranked[WORST:]
    if rest:
        count = sum(guards.total() for _, guards in rest)
        yield Finding(
            code="",
            severity="warning",
            message=f"{words.number(count, 'more recompilation')} of {words.number(len(rest), 'other function')}",
            fix="TORCH_LOGS=recompiles names the guard of each",
            count=count,
        )


def _fix(guard: str) -> str:
    lowered = guard.lower()
    if "size mismatch" in lowered or ".size()" in lowered or "shape" in lowered or "stride mismatch" in lowered:
        return "one graph for all sizes: --dim N=1:8:64 (torch.compile(dynamic=True)), or pad inputs to a few fixed sizes"
    if "dtype" in lowered:
        return "always call it with one dtype"
    if "device" in lowered:
        return "always call it with tensors on one device"
    if "requires_grad" in lowered or "grad_mode" in lowered or "inference_mode" in lowered:
        return "compile and call under the same gradient mode: with torch.no_grad() around both"
    if "type_id" in lowered or "type match" in lowered or "type mismatch" in lowered:
        return "always pass the same types: a tensor at one call and None or a number at the next are two graphs"
    if "==" in lowered:
        return "a Python number that changes from call to call is compiled in: make it a tensor, or pass it as an input"
    return "keep what the guard names the same from call to call; TORCH_LOGS=recompiles shows each"


def _name(function: str) -> str:
    """`forward (model.py:12)` -> `forward`: the line is a field of its own."""
    return re.sub(r"\s*(?:\(|at )\S*\.py:\d+\)?$", "", function)


def _line(function: str) -> str | None:
    """`forward (model.py:12)` or `forward at model.py:12` -> `model.py:12`."""
    word = next((w.strip("()[],") for w in reversed(function.split()) if ".py:" in w), None)
    return None if word is None else word.rpartition("/")[2]


def _first_line(guard: str) -> str:
    """Without the number of the graph it belonged to (`0/2: `), which is another one each time."""
    return next(
        (re.sub(r"^\d+/\d+: ", "", line.strip(" -\t"))[:160] for line in guard.splitlines() if line.strip(" -\t")), "no guard named"
    )


RULE = Rule(
    code="GPU502",
    name="recompiles",
    what="torch.compile compiles the same function again and again.",
    why="Each recompilation takes seconds in the middle of serving, and past the limit of 8 a function runs uncompiled for good.",
    before="for batch in batches:  # 31, 32, 17, … rows\n    model(batch)",
    after="model = torch.compile(model, dynamic=True)\nfor batch in batches:\n    model(batch)",
    safe=False,
    needs=frozenset({"compiled"}),
    find=find,
    source="guards as Dynamo reports them (TORCH_LOGS=recompiles); torch._dynamo.config.recompile_limit",
)
