"""GPU711: a script loads or moves its weights again for every call."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.core.script import Load
from gpuopt.doctor import words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

OFTEN = 3
"""Loads at one line: a few models may be loaded in one loop, each once."""
PER_CALL = 0.5
"""Loads a call of the model from which it is the same weights again, not another model."""
WORST = 5


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a line, priced as all but the first load, spread over the calls."""
    script = evidence.script
    assert script is not None
    calls = sum(m.num_calls for m in script.modules)
    # As many loads as models, each called more often than loaded, is a program with several models.
    repeated = [load for load in script.loads if _again(load) >= OFTEN and calls and _again(load) >= PER_CALL * calls]
    for load in sorted(repeated, key=lambda one: -one.seconds)[:WORST]:
        each_ms = load.seconds / calls * 1e3
        spent = sum(m.wall_s for m in script.modules) + load.seconds
        moved = f", {units.format_bytes(load.bytes)} in all" if load.bytes else ""
        finding = Finding(
            code="",
            severity="warning" if load.seconds >= 0.05 * spent else "info",
            message=f"{load.what} ran {words.times(load.count)} for {words.number(calls, 'call')} of the model: {units.format_seconds(load.seconds)}{moved}, "
            f"{words.share(load.seconds / spent)} of loading and calling together",
            fix="load once, before the loop, and keep the model on the GPU between calls",
            line=load.line,
            op=load.what,
            count=load.count,
            bytes=load.bytes or None,
            time_ms=each_ms or None,
        )
        yield priced(finding, each_ms * min(_again(load), load.count - 1) / load.count, low=0.9, high=1.0)


def _again(load: Load) -> int:
    """Loads after a model was first called: before that, weights come in as many pieces as they have."""
    return load.count - load.at_start


RULE = Rule(
    code="GPU711",
    name="reload-per-call",
    what="The script loads the weights again for every call.",
    why="Reading, unpickling and copying weights takes seconds where a call takes milliseconds; the time shows up as copies and hides its cause.",
    before="def answer(x):\n    model = torch.load('m.pt').to('cuda')\n    return model(x)",
    after="model = torch.load('m.pt').to('cuda')\ndef answer(x):\n    return model(x)",
    safe=False,
    needs=frozenset({"script"}),
    find=find,
    source="loads and calls counted while the script ran",
)
