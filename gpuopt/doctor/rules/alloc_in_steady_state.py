"""GPU107: device or pinned memory is still allocated from the driver while the model runs."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule
from gpuopt.doctor.timeline import num_steps

PINNED = (
    "cudaHostAlloc",
    "cudaMallocHost",
    "cudaHostRegister",
    "cudaFreeHost",
    "cudaHostUnregister",
    "cuMemHostAlloc",
    "cuMemHostRegister",
)
MIN_SHARE = 0.001
"""Of the call: a library's one small workspace is not steady allocation."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for device memory, one for pinned: priced at the host time of the calls, which also wait for the GPU."""
    trace = evidence.trace
    assert trace is not None
    steps = num_steps(trace)
    # Stream-ordered calls take from a pool and wait for nobody; `cudaFree(0)` is how libraries start the context.
    calls = [r for r in trace.runtime if r.kind == "alloc" and r.step is not None and "Async" not in r.name]
    for is_pinned in (False, True):
        mine = [r for r in calls if r.name.startswith(PINNED) == is_pinned]
        time_ms = sum(r.dur_ns for r in mine) / steps / 1e6
        if not mine or (evidence.wall_ms and time_ms < MIN_SHARE * evidence.wall_ms):
            continue
        names: dict[str, int] = {}
        for call in mine:
            names[call.name] = names.get(call.name, 0) + 1
        listed = ", ".join(f"{name} {words.times(n / steps)}" for name, n in sorted(names.items(), key=lambda i: -i[1])[:4])
        finding = Finding(
            code="",
            severity="info",
            message=f"{'pinned' if is_pinned else 'GPU'} memory is asked of the driver in every call: {listed}, {words.ms(time_ms)}",
            fix="pin one buffer at the start and copy into it"
            if is_pinned
            else "warm up with the largest shapes, keep torch.cuda.empty_cache() out of the loop, set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
            op=max(names, key=lambda n: names[n]),
            count=max(1, round(len(mine) / steps)),
            time_ms=time_ms,
        )
        # A call that waits for the GPU holds the host while kernels run: not all of its time would come back.
        yield priced(finding, time_ms, low=0.5, high=1.0, wall_ms=evidence.wall_ms)


RULE = Rule(
    code="GPU107",
    name="alloc-in-steady-state",
    what="The driver is asked for memory in calls that should find all of it in the allocator's cache.",
    why="cudaMalloc and cudaFree take tens of microseconds to milliseconds and make the host wait for the GPU.",
    before="for x in batches:\n    y = model(x)\n    torch.cuda.empty_cache()",
    after="for x in batches:\n    y = model(x)",
    safe=False,
    needs=frozenset({"trace"}),
    find=find,
    source="durations of the runtime calls in the trace",
)
