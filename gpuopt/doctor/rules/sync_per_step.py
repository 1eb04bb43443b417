"""GPU105: the host waits for the GPU between the launches of one call, from outside any op."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all waits with work of the same call before and after them; the one that closes a call is no defect."""
    trace = evidence.trace
    assert trace is not None
    steps, stretch = timeline.num_steps(trace), timeline.wait_stretch(evidence)
    launches: dict[int, tuple[int, int]] = {}
    for call in trace.runtime:
        if call.kind in ("launch", "graph", "copy") and call.step is not None:
            first, last = launches.get(call.step, (call.start_ns, call.start_ns))
            launches[call.step] = (min(first, call.start_ns), max(last, call.start_ns))
    idle, names = [], set()
    for call, idle_ns in timeline.waits(trace):
        if call.op is not None or call.kind != "sync" or call.step is None:
            continue
        first, last = launches.get(call.step, (call.start_ns, call.start_ns))
        if first < call.start_ns and last >= call.start_ns + call.dur_ns:
            idle.append(idle_ns)
            names.add(call.name)
    if not idle:
        return
    idle_ms = sum(idle) * stretch / steps / 1e6
    finding = Finding(
        code="",
        severity="info",
        message=f"{', '.join(sorted(names))} is called {words.times(len(idle) / steps)} within a call, outside any op: the GPU then idles {words.ms(idle_ms)}",
        fix="remove torch.cuda.synchronize(), print and timing code from the loop; time with CUDA events, and synchronise once at the end",
        op=min(names),
        count=max(1, round(len(idle) / steps)),
        time_ms=idle_ms or None,
    )
    yield priced(finding, idle_ms, low=0.6, high=1.1, wall_ms=evidence.wall_ms)


RULE = Rule(
    code="GPU105",
    name="sync-per-step",
    what="The program waits for the GPU in the middle of a call.",
    why="While the host waits it launches nothing: the GPU runs dry, and everything the host does next is on the critical path.",
    before="for layer in model.layers:\n    x = layer(x)\n    torch.cuda.synchronize()",
    after="for layer in model.layers:\n    x = layer(x)\ntorch.cuda.synchronize()",
    safe=True,
    needs=frozenset({"trace"}),
    find=find,
    source="idle times of the trace, scaled to the untraced wall time",
)
