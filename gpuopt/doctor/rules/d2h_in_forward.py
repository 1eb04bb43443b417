"""GPU106: forward takes a tensor to the host and goes on."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.core.trace import Copy
from gpuopt.doctor import modules, timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.places import Place, spread
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule
from gpuopt.doctor.rules.sync_in_forward import SMALL_BYTES, read_of


def find(evidence: Evidence) -> Iterator[Finding]:
    """A finding for each module that copies more than a value to the host with kernels of the same call still to come: the copy, the idle time after it and the way back."""
    trace = evidence.trace
    assert trace is not None
    steps, stretch = timeline.num_steps(trace), timeline.stretch(evidence)
    last = {k.step: k.start_ns for k in trace.kernels if k.step is not None}
    idle = {call.correlation: ns for call, ns in timeline.waits(trace) if call.correlation is not None}
    after = _idle_after(evidence)
    taken: dict[tuple[str | None, str], list[Copy]] = {}
    for copy in trace.copies:
        is_early = copy.step in last and copy.start_ns + copy.dur_ns <= last[copy.step]
        if (
            copy.kind != "d2h"
            or copy.step is None
            or copy.op is None
            or copy.bytes <= SMALL_BYTES
            or not is_early
            or read_of(trace, copy.op)
        ):
            continue
        names = timeline.op_path(trace, copy.op)
        taken.setdefault((timeline.module_of(trace, copy.op), names[-1]), []).append(copy)
    if not taken:
        return
    back: dict[tuple[int | None, int], list[Copy]] = {}
    for copy in reversed(trace.copies):  # the earliest last, to be taken first
        if copy.kind == "h2d" and copy.step is not None:
            back.setdefault((copy.step, copy.bytes), []).append(copy)
    places, returned = [], 0
    for (module, op), copies in taken.items():
        time_ns = 0.0
        for copy in copies:
            gap = max(idle.get(copy.correlation, 0.0), after.get(copy.correlation, 0.0)) if copy.correlation is not None else 0.0
            time_ns += copy.dur_ns + gap * stretch
            ways = back.get((copy.step, copy.bytes), [])
            while ways and ways[-1].start_ns <= copy.start_ns:
                ways.pop()
            if ways:
                returned += 1
                time_ns += ways.pop().dur_ns
        places.append(
            Place(
                module=module, op=op, count=len(copies) / steps, time_ms=time_ns / steps / 1e6, saved_ms=time_ns / steps / 1e6,
                bytes=sum(c.bytes for c in copies) / steps,
            )
        )  # fmt: skip
    trips = f", {words.number(returned / steps, 'copy comes', 'copies come')} back" if returned and len(places) == 1 else ""

    def say(place: Place) -> Finding:
        finding = Finding(
            code="",
            severity="info",
            message=f"{units.format_bytes(place.bytes)} go to the host {words.times(place.count)} a call{place.where}, before the last kernel{trips}: {words.ms(place.time_ms)} with the idle time after it",
            fix="keep the tensor on the GPU: the torch op instead of .cpu()/.numpy()/.tolist(), and what is only logged after the call",
            module=None if place.module == "?" else place.module,
            line=modules.line(evidence.module, place.module) if evidence.module is not None and place.module not in (None, "?") else None,
            op=place.op,
            count=max(1, round(place.count)),
            bytes=place.bytes,
            time_ms=place.time_ms,
        )
        return priced(finding, place.saved_ms, low=0.6, high=1.05, wall_ms=evidence.wall_ms)

    yield from spread(places, say)


def _idle_after(evidence: Evidence) -> dict[int, float]:
    """Correlation of a copy to the host -> idle ns of the device between it and the next work, less a usual gap."""
    trace = evidence.trace
    assert trace is not None
    usual = timeline.usual_gap_ns(trace)
    ends = {c.start_ns + c.dur_ns: c.correlation for c in trace.copies if c.kind == "d2h" and c.correlation is not None}
    return {
        correlation: max(0.0, gap.dur_ns - usual) for gap in timeline.gaps(trace) if (correlation := ends.get(gap.start_ns)) is not None
    }


RULE = Rule(
    code="GPU106",
    name="d2h-in-forward",
    what="A tensor is copied to the host in the middle of forward.",
    why="The host waits for all work before the copy, computes alone, and often sends the result back: three waits where the GPU idles.",
    before="probs = logits.cpu().numpy()\nidx = torch.from_numpy(probs.argsort()).cuda()",
    after="idx = logits.argsort()",
    safe=False,
    needs=frozenset({"trace"}),
    find=find,
    source="copies and idle times of the trace, scaled to the untraced wall time",
)
