"""GPU404: the GPU waits for the host to launch the next kernel."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.core.spec import BackendSpec, Change
from gpuopt.doctor import timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

MIN_SHARE = 0.15
"""Of the call in gaps: below, a graph gives back little for the freedom it takes."""
MIN_KERNELS = 10
"""A call: one kernel does not wait for another's launch."""
GRAPH_NS = 500
"""Between two kernels of one graph: ResNet-50 at batch 1, its replay against what its kernels take (recipes/predictions/h200.json, resnet50-launch-bound)."""
REPLAY_NS = 20_000
"""For the host to replay a graph."""
GRAPHED = {
    None: "graphed", "default": "graphed", "freezing": "freezing-graphed", "max-autotune-no-cudagraphs": "max-autotune-graphed",
    "max-autotune-freezing-no-cudagraphs": "max-autotune-freezing-graphed",
}  # fmt: skip
"""Preset of inductor -> the same with the whole call recorded as one CUDA graph."""
TREES = {
    None: "reduce-overhead", "default": "reduce-overhead", "freezing": "freezing-reduce-overhead", "max-autotune-no-cudagraphs": "max-autotune",
    "max-autotune-freezing-no-cudagraphs": "max-autotune-freezing",
}  # fmt: skip
"""The same with torch's own CUDA graphs, one for each graph that it compiled, chosen in Python at each call: for programs whose calls take different ways."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: priced as the untraced time in which the host is on its way from one launch to the next, less what a graph's own launches take."""
    trace = evidence.trace
    assert trace is not None and evidence.waterfall is not None
    wall_ms = evidence.waterfall.wall_ms
    own_ms = timeline.between_ms(evidence, *timeline.LAUNCHING) or 0.0
    num_kernels = sum(k.step is not None for k in trace.kernels) / timeline.num_steps(trace)
    if not trace.on_device or num_kernels < MIN_KERNELS or own_ms < MIN_SHARE * wall_ms:
        return
    waits_ms = evidence.waterfall.ms("synchronisation")
    graphed = [k for k in trace.kernels if k.graph_id is not None]
    left_ms = (num_kernels * GRAPH_NS + REPLAY_NS) / 1e6
    # Gaps before kernels that were queued in time shrink too: a graph's launches are the device's own.
    gaps_ms = timeline.between_ms(evidence, *timeline.LAUNCHING, "idle") or 0.0
    must_sync = any(call.op is not None for call, ns in timeline.waits(trace) if ns)
    change = None if must_sync or graphed else _change(evidence)
    finding = Finding(
        code="",
        severity="info",
        message=f"the GPU idles {words.ms(own_ms)} a call ({words.share(own_ms / wall_ms)}) waiting for the host to launch {words.number(num_kernels, 'kernel')}"
        + (f", another {words.ms(waits_ms)} for the host's own waits" if waits_ms > 0.01 * wall_ms else ""),
        fix=_fix(evidence)
        if not must_sync
        else "first take the waits out of forward (GPU104, GPU106), then CUDA graphs: torch.compile(mode='reduce-overhead')",
        op="cudaLaunchKernel",
        count=round(num_kernels),
        time_ms=max(own_ms, gaps_ms),
        change=change,
    )
    if graphed:
        share = len(graphed) / max(1, len(trace.kernels))
        yield priced(finding, (gaps_ms - left_ms) * (1 - share), low=0.5, high=1.0, wall_ms=wall_ms)
        return
    yield priced(finding, gaps_ms - left_ms, low=0.7, high=1.1, wall_ms=wall_ms)


def _change(evidence: Evidence) -> Change | None:
    if evidence.backend == "eager":
        return Change(backend=BackendSpec(name="cudagraphs"))
    presets = TREES if _takes_ways(evidence) else GRAPHED
    if evidence.backend == "inductor" and evidence.preset in presets:
        return Change(backend=BackendSpec(name="inductor", preset=presets[evidence.preset]))
    return None


def _takes_ways(evidence: Evidence) -> bool:
    """Whether calls may take different ways through compiled code: it was compiled in parts, or for several sizes."""
    found = evidence.compiled
    return found is not None and (found.num_graphs > 1 or bool(found.graph_breaks) or bool(found.recompiles))


def _fix(evidence: Evidence) -> str:
    if evidence.backend == "inductor" and _takes_ways(evidence):
        return "CUDA graphs: torch.compile(mode='reduce-overhead'), one for each part that was compiled"
    own = "gpuopt --backend cudagraphs for eager code, " if evidence.backend == "eager" else ""
    return f"one CUDA graph of the whole call: {own}gpuopt --backend inductor:graphed for compiled code; in code of your own torch.compile(mode='reduce-overhead'), which decides in Python at each call what to replay"


RULE = Rule(
    code="GPU404",
    name="launch-bound",
    what="The GPU finishes each kernel before the host has launched the next.",
    why="Python, dispatch and the launch take longer than the kernels: a faster GPU would change nothing.",
    before="y = model(x)",
    after="model = torch.compile(model, mode='reduce-overhead')  # or gpuopt --backend inductor:graphed: one graph for the whole call\ny = model(x)",
    safe=True,
    needs=frozenset({"trace", "waterfall"}),
    find=find,
    source="launch gaps and Python of the waterfall; BERT-large at batch 1 on an H200: 7.1 ms eager, 1.2 ms as a graph",
    has_change=True,
)
