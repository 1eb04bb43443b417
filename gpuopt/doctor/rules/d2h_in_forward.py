"""GPU106: forward takes a tensor to the host and goes on."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

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
    steps = timeline.num_steps(trace)
    last = {k.step: k.start_ns for k in trace.kernels if k.step is not None}
    lost_ns = _lost_ns(evidence)
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
            ways = back.get((copy.step, copy.bytes), [])
            while ways and ways[-1].start_ns <= copy.start_ns:
                ways.pop()
            returned += bool(ways)
            time_ns += lost_ns(copy, ways.pop() if ways else copy)
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
        return priced(finding, place.saved_ms, low=0.75, wall_ms=evidence.wall_ms)

    yield from spread(places, say)


def _lost_ns(evidence: Evidence) -> Callable[[Copy, Copy], float]:
    """(copy to the host, the copy back or the same) -> ns from the end of the kernel before to the start of the kernel after, in which no kernel runs.

    Transfers and the host's part of them count in full, the rest as far as the untraced wall has room for it, less what a launch costs anyway.
    """
    trace = evidence.trace
    assert trace is not None
    kernels = timeline.merged(k for k in trace.kernels if k.step is not None)
    links = timeline.merged(c for c in trace.copies if c.step is not None and c.kind in ("h2d", "d2h"))
    numbers = {c.correlation for c in trace.copies if c.kind in ("h2d", "d2h") and c.correlation is not None}
    calls = timeline.merged(r for r in trace.runtime if r.correlation in numbers)
    starts, ends = [k[0] for k in kernels], [k[1] for k in kernels]
    usual, stretch = timeline.usual_gap_ns(trace), timeline.wait_stretch(evidence)

    def lost(out: Copy, back: Copy) -> float:
        before = bisect.bisect_right(ends, out.start_ns) - 1
        after = bisect.bisect_left(starts, back.start_ns + back.dur_ns)
        begin = ends[before] if before >= 0 else out.start_ns
        end = starts[after] if after < len(starts) else back.start_ns + back.dur_ns
        free = end - begin - timeline.overlap_ns(kernels, begin, end)
        moving = timeline.overlap_ns(links, begin, end)
        held = timeline.overlap_ns(calls, begin, end)
        # A copy's call waits for the kernels before it: what of it lies here is its own. The transfer runs within it, or after it.
        copying = min(free, max(moving, held))
        return copying + max(0.0, free - copying - usual) * stretch

    return lost


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
