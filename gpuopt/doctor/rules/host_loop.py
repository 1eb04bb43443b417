"""GPU714: a script calls a model thousands of times with one sample."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor.evidence import Evidence, ModelCalls
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

MANY = 1000
"""Calls: fewer are over soon anyway."""
SHORT_S = 0.02
"""A call shorter than this is mostly launches; a longer one has work enough for a GPU."""
BATCH = 32
"""What is suggested where no batch was measured."""
_SHAPE = re.compile(r"(?P<dtype>[a-z0-9_]+)\[(?P<dims>[^\]]*)\]")


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a model; priced, a call, where two batches were measured. Token-by-token decoding is left alone: its calls depend on each other."""
    assert evidence.script is not None
    for model in evidence.script.modules:
        each = model.wall_s / model.num_calls if model.num_calls else 0.0
        if model.num_calls < MANY or not 0 < each < SHORT_S or not _is_single(model):
            continue
        one, larger = evidence.batch_curve.get(1), [b for b in evidence.batch_curve if b > 1]
        best = min(larger, key=lambda b: evidence.batch_curve[b] / b) if larger else None
        finding = Finding(
            code="",
            severity="warning",
            message=f"{model.name or 'the model'} ({model.module_class}) was called {model.num_calls} times with one sample, {units.format_seconds(each)} each: "
            f"{units.format_seconds(model.wall_s)} in all",
            fix=f"stack the samples: model(torch.stack(samples[:{best or BATCH}])), or a DataLoader(batch_size={best or BATCH})",
            module=model.name or None,
            line=model.line or None,
            count=model.num_calls,
            time_ms=each * 1e3,
        )
        saved = (1 - evidence.batch_curve[best] / best / one) * each * 1e3 if best is not None and one else 0.0
        yield priced(finding, saved, low=0.75, high=1.0)


def _is_single(model: ModelCalls) -> bool:
    """Every input has one sample, and it is no decoding step: ids of one token, or a cache among the inputs."""
    shapes = [(m["dtype"], [d.strip() for d in m["dims"].split(",") if d.strip()]) for text in model.inputs if (m := _SHAPE.search(text))]
    shaped = [(dtype, dims) for dtype, dims in shapes if dims]
    if not shaped or any(dims[0] != "1" for _, dims in shaped):
        return False
    return not any(dtype.startswith("int") and dims == ["1", "1"] for dtype, dims in shaped)


RULE = Rule(
    code="GPU714",
    name="host-loop",
    what="The script gives the model one sample at a time, thousands of times.",
    why="A small call is bound by launches and by reading the weights: a batch of 32 often takes hardly longer than one sample.",
    before="for row in rows:\n    out.append(model(row[None]))",
    after="for part in rows.split(32):\n    out.append(model(part))",
    safe=False,
    needs=frozenset({"script"}),
    find=find,
    source="calls counted while the script ran; batches measured by gpuopt bench --dim N=1,32",
)
