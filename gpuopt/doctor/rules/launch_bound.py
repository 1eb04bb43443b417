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
    None: "reduce-overhead", "default": "reduce-overhead", "freezing": "freezing-reduce-overhead", "max-autotune-no-cudagraphs": "max-autotune",
    "max-autotune-freezing-no-cudagraphs": "max-autotune-freezing",
}  # fmt: skip
"""Preset of inductor -> the same with CUDA graphs."""


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
        fix="CUDA graphs: torch.compile(mode='reduce-overhead'), or gpuopt --backend cudagraphs for eager code"
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
    if evidence.backend == "inductor" and evidence.preset in GRAPHED:
        return Change(backend=BackendSpec(name="inductor", preset=GRAPHED[evidence.preset]))
    return None


RULE = Rule(
    code="GPU404",
    name="launch-bound",
    what="The GPU finishes each kernel before the host has launched the next.",
    why="Python, dispatch and the launch take longer than the kernels: a faster GPU would change nothing.",
    before="y = model(x)",
    after="model = torch.compile(model, mode='reduce-overhead')\ny = model(x)",
    safe=True,
    needs=frozenset({"trace", "waterfall"}),
    find=find,
    source="launch gaps and Python of the waterfall; BERT-large at batch 1 on an H200: 7.1 ms eager, 1.2 ms as a graph",
    has_change=True,
)
