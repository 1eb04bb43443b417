"""GPU110: the GPU waits for the next batch."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

MIN_SHARE = 0.05
"""Of the call: where torch_tb_profiler began to warn of the data loader."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: the device's idle time while a loader is asked for a batch."""
    trace = evidence.trace
    assert trace is not None
    asked = timeline.fetches(trace)
    if not asked or not trace.on_device:
        return
    steps = timeline.num_steps(trace)
    busy = timeline.merged((*trace.kernels, *trace.copies))  # of other steps, too: whatever runs meanwhile
    idle_ns, at = 0, 0
    for fetch in asked:
        start, stop = max(fetch.start_ns, at), fetch.start_ns + fetch.dur_ns
        if stop > start:
            idle_ns += stop - start - timeline.overlap_ns(busy, start, stop)
            at = stop
    idle_ms = idle_ns / steps / 1e6
    span_ms = (evidence.wall_ms or 0.0) or sum(s.dur_ns for s in trace.steps) / steps / 1e6
    if not span_ms or idle_ms < MIN_SHARE * span_ms:
        return
    is_alone = any("SingleProcess" in fetch.name for fetch in asked)
    finding = Finding(
        code="",
        severity="info",
        message=f"the GPU idles {words.ms(idle_ms)} a call ({words.share(idle_ms / span_ms)}) while the data loader makes the next batch"
        + (", in this process" if is_alone else ""),
        fix="DataLoader(num_workers=8, pin_memory=True, persistent_workers=True, prefetch_factor=4)"
        + ("" if is_alone else "; it has workers already: more of them, or decode and augment on the GPU"),
        op=asked[0].name,
        count=max(1, round(len(asked) / steps)),
        time_ms=idle_ms,
    )
    yield priced(finding, idle_ms, low=0.6, high=1.0, wall_ms=span_ms)


RULE = Rule(
    code="GPU110",
    name="input-pipeline-bound",
    what="The GPU idles while the host prepares the next batch.",
    why="Decoding and augmenting on one core takes longer than the model does on the GPU, and nothing of it overlaps.",
    before="loader = DataLoader(data, batch_size=64)",
    after="loader = DataLoader(data, batch_size=64, num_workers=8, pin_memory=True, persistent_workers=True)",
    safe=False,
    needs=frozenset({"trace"}),
    find=find,
    source="torch_tb_profiler 0.4.3 warns above 5% of a step",
)
