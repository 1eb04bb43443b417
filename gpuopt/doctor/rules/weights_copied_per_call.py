"""GPU108: the weights travel to the GPU in every call."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor import streamed, transfers, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule
from gpuopt.doctor.timeline import module_of, num_steps


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all copies that carry weights: what they take now would be gone, for weights that stay are copied once."""
    trace = evidence.trace
    assert trace is not None
    copies = transfers.sent(evidence).weights
    steps = num_steps(trace)
    num_bytes = sum(c.bytes for c in copies) / steps
    whole = transfers.parameter_bytes(evidence)
    if not copies:
        return
    # A pageable copy holds the host in the whole of its op; nothing is launched meanwhile.
    time_ms = max(transfers.held_ms(trace, copies), transfers.op_ms(trace, tuple(c for c in copies if c.memory == "pageable")))
    share = f" ({words.share(num_bytes / whole)} of the parameters)" if whole else ""
    of_call = f", {words.share(time_ms / evidence.wall_ms)} of the call" if evidence.wall_ms else ""
    streaming = streamed.streamed(evidence)
    if streaming is not None and not streamed.is_waited_for(streaming):
        return  # they have to travel, and nobody waits for them
    where = list(dict.fromkeys(m for c in copies if (m := module_of(trace, c.op))))
    finding = Finding(
        code="",
        severity="info",
        message=f"{units.format_bytes(num_bytes)} of weights{share} are copied to the GPU in every call: {words.ms(time_ms)} in {words.number(len(copies) / steps, 'copy', 'copies')}{of_call}"
        + (f", in {words.listed(where)}" if where else "")
        + (f"; the GPU waits {words.ms(streaming.stall.total_ms)} for them: {streaming.stall}" if streaming is not None else ""),
        fix="the weights do not fit: gpuopt stream keeps them pinned and copies each layer while the one before it runs. By hand: stop reloading, pin once, copy large, "
        "wait for nothing, overlap, keep resident, in this order (GPU112 to GPU117 price the steps)"
        if streaming is not None
        else "load and move the model once, before the loop: model = model.to('cuda'); leave no .to()/load_state_dict() in the call",
        module=where[0] if len(where) == 1 else None,
        op="Memcpy HtoD",
        count=round(len(copies) / steps),
        bytes=num_bytes,
        time_ms=time_ms,
    )
    # What streaming well gives back is told step by step, by rules of their own.
    yield finding if streaming is not None else priced(finding, time_ms, low=0.8, high=1.2, wall_ms=evidence.wall_ms)


RULE = Rule(
    code="GPU108",
    name="weights-copied-per-call",
    what="Parameters are copied from the host to the GPU inside every call.",
    why="Weights do not change between calls: over a link of tens of gigabytes a second their copy takes longer than the model itself.",
    before="for x in batches:\n    model.to('cuda')\n    y = model(x)\n    model.to('cpu')",
    after="model.to('cuda')\nfor x in batches:\n    y = model(x)",
    safe=False,
    needs=frozenset({"trace"}),
    find=find,
    source="copies of the trace whose sizes are the parameters'",
)
