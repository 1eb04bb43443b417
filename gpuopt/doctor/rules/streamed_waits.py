"""GPU115: the host waits for each copy of weights before it launches what comes next."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import streamed, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: what the device idles while the host waits for a copy, and until it has launched the next thing."""
    found = streamed.streamed(evidence)
    if found is None or found.num_waits < found.num_runs / 2 or not streamed.is_told(found, "wait_ms"):
        return
    finding = Finding(
        code="",
        severity="info",
        message=f"the host waits for copies of weights {words.times(found.num_waits)} a call, and the GPU then idles {words.ms(found.wait_ms)} until the next launch",
        fix="fourth of the steps: no synchronize() and no blocking copy; compute.wait_event(ready) orders the two streams on the GPU, and the host goes on launching",
        count=round(found.num_waits),
        time_ms=found.wait_ms,
    )
    yield priced(finding, found.wait_ms, low=0.6, high=1.05, wall_ms=evidence.wall_ms)


RULE = Rule(
    code="GPU115",
    name="streamed-weights-waited-for",
    what="The host waits for each copy of weights before it goes on.",
    why="While it waits nothing is launched, so the GPU idles after every copy, and no copy can run under a kernel.",
    before="copy_stream.synchronize()\nx = layer(x)",
    after="torch.cuda.current_stream().wait_event(ready)\nx = layer(x)",
    safe=False,
    needs=frozenset({"trace", "device"}),
    find=find,
    source="the stretches of the trace in which no kernel runs, and the rate of pinned copies measured here (gpuopt device)",
    explains=frozenset({"GPU105"}),
)
