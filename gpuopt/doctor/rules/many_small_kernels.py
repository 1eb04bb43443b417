"""GPU403: the call is made of very many very short kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from gpuopt.core import kernels
from gpuopt.core.result import Finding
from gpuopt.core.spec import BackendSpec, Change
from gpuopt.doctor import timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

SMALL_NS = 10_000
"""Shorter than a launch takes on the host: such a kernel waits for it."""
MIN_COUNT = 100
"""A call: fewer are soon launched, whatever their length."""
MIN_SHARE = 0.3
"""Of the call, in short kernels and the gaps between them."""
FUSABLE = frozenset({"pointwise", "cast", "strided copy", "batch norm", "norm", "reduction", "softmax", "cat"})
FUSED = 0.5
"""Of their kernels' time is left once element-wise chains, norms and reductions are fused: about every second pass goes."""
ROW_NS = 2_000
"""A kernel's own start and end on the device, back to back."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: priced as what fusion takes from the short kernels and their gaps, while launches from a CUDA graph are GPU404's."""
    trace = evidence.trace
    assert trace is not None
    steps = timeline.num_steps(trace)
    ran = [k for k in trace.kernels if k.step is not None and not k.is_memset]
    short = [k for k in ran if k.dur_ns < SMALL_NS]
    span_ms = evidence.wall_ms or sum(s.dur_ns for s in trace.steps) / steps / 1e6
    if len(ran) < MIN_COUNT * steps or sorted(k.dur_ns for k in ran)[len(ran) // 2] >= SMALL_NS or not span_ms:
        return
    short_ms = sum(k.dur_ns for k in short) / steps / 1e6
    gaps_ms = timeline.between_ms(evidence, *timeline.LAUNCHING, "idle") or 0.0
    if short_ms + gaps_ms < MIN_SHARE * span_ms:
        return
    fusable = [k for k in short if kernels.kind(k.name) in FUSABLE and not k.name.startswith("triton_")]
    share = len(fusable) / len(ran)
    saved_ms = FUSED * (sum(max(k.dur_ns, ROW_NS) for k in fusable) / steps / 1e6 + gaps_ms * share)
    is_eager = evidence.backend in ("eager", "cudagraphs")
    finding = Finding(
        code="",
        severity="info",
        message=f"{words.number(len(ran) / steps, 'kernel')} a call, {words.ms(sorted(k.dur_ns for k in ran)[len(ran) // 2] / 1e6)} in the median: the short ones take {words.ms(short_ms)} and the gaps {words.ms(gaps_ms)}, "
        f"{words.share((short_ms + gaps_ms) / span_ms)} of the call; {words.digits(len(fusable) / steps)} could be fused",
        fix="torch.compile(model): it fuses element-wise ops, norms and reductions into few kernels"
        if is_eager
        else "a larger batch, or a CUDA graph of the whole call (preset graphed)",
        op=kernels.short(Counter(k.name for k in short).most_common(1)[0][0]),
        count=round(len(ran) / steps),
        time_ms=short_ms + gaps_ms,
        change=Change(backend=BackendSpec(name="inductor")) if is_eager and fusable else None,
    )
    yield priced(finding, saved_ms, low=0.6, high=1.2, wall_ms=evidence.wall_ms) if is_eager and fusable else finding


RULE = Rule(
    code="GPU403",
    name="many-small-kernels",
    what="Most kernels of the call run for less time than it takes to launch one.",
    why="The GPU spends its time starting and ending kernels, or waiting for the next.",
    before="y = model(x)",
    after="model = torch.compile(model)\ny = model(x)",
    safe=True,
    needs=frozenset({"trace"}),
    find=find,
    source="launches take 5 to 20 us in eager PyTorch on an H200's host",
    has_change=True,
)
