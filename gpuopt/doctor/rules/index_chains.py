"""GPU311: values are picked and put by index, op after op."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.core.trace import CpuOp
from gpuopt.doctor import modules, timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.places import Place, spread
from gpuopt.doctor.price import priced
from gpuopt.doctor.recast import shown_ms
from gpuopt.doctor.rule import Rule

INDEXING = frozenset(
    {
        "aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::nonzero", "aten::masked_select", "aten::masked_fill_",
        "aten::masked_fill", "aten::masked_scatter", "aten::masked_scatter_", "aten::index_fill_", "aten::index_add_", "aten::take_along_dim",
    }
)  # fmt: skip
KINETO_BYTES = {"float": 4, "double": 8, "c10::Half": 2, "c10::BFloat16": 2}
CHAIN = 3
"""Such ops in one forward of one module: one or two are how a gather is written."""
BY_INDEX = frozenset(
    {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::nonzero", "aten::masked_select"}
)
"""At least one of these: filling under a mask alone is already the cheap way."""
MIN_SHARE = 0.03
"""Of the call."""
MASKED_REACHED = 0.33
"""Share of the copy bandwidth `torch.where` under a broadcast mask reaches, reading and writing its tensor once: eager's general element-wise kernel on an H200."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """A finding for each module with a chain: priced at the kernels' time, less what one `torch.where` takes. Their waits are GPU104's."""
    trace = evidence.trace
    assert trace is not None
    steps = timeline.num_steps(trace)
    span_ms = evidence.wall_ms or sum(s.dur_ns for s in trace.steps) / steps / 1e6
    below = timeline.time_below(trace, INDEXING)
    by_module: dict[str | None, list[int]] = {}
    for op in trace.ops:
        if op.step is not None and op.name in INDEXING and not any(o.name in INDEXING for o in trace.chain(op.parent)):
            by_module.setdefault(timeline.module_of(trace, op.index), []).append(op.index)
    places = []
    for module, indices in by_module.items():
        names = [trace.ops[i].name for i in indices]
        time_ms = sum(below.get(i, 0.0) for i in indices) / steps / 1e6
        if len(indices) >= CHAIN * steps and any(n in BY_INDEX for n in names):
            places.append(
                Place(
                    module=module, op=max(set(names), key=names.count), count=len(indices) / steps, time_ms=time_ms,
                    saved_ms=max(0.0, time_ms - _masked_ms(evidence, [trace.ops[i] for i in indices])),
                )
            )  # fmt: skip
    total_ms = sum(p.time_ms for p in places)
    if not places or not total_ms or total_ms < MIN_SHARE * span_ms:
        return

    def say(place: Place) -> Finding:
        finding = Finding(
            code="",
            severity="info",
            message=f"{words.number(place.count, 'indexing op')} a call in a row{place.where}: {words.ms(place.time_ms)}, {words.share(place.time_ms / span_ms)} of the call",
            fix="one gather, scatter or torch.where over a mask of fixed shape instead of index, nonzero and index_put",
            module=None if place.module == "?" else place.module,
            line=modules.line(evidence.module, place.module) if evidence.module is not None and place.module not in (None, "?") else None,
            op=place.op,
            count=max(1, round(place.count)),
            time_ms=place.time_ms,
        )
        return priced(finding, shown_ms(evidence, place.saved_ms), low=0.6, high=1.2, wall_ms=evidence.wall_ms)

    yield from spread(places, say)


def _masked_ms(evidence: Evidence, ops: list[CpuOp]) -> float:
    """One `torch.where` over the largest tensor they index; 0 where its size or the bandwidth is unknown."""
    bandwidth = evidence.device.ceilings.bandwidth("measured") if evidence.device is not None else None
    sizes = [math.prod(op.shapes[0]) * KINETO_BYTES.get(op.dtypes[0], 0) for op in ops if op.shapes and op.dtypes]
    return 2 * max(sizes, default=0) / (bandwidth * MASKED_REACHED) * 1e3 if bandwidth else 0.0


RULE = Rule(
    code="GPU311",
    name="index-chains",
    what="A module picks and places values by index in several ops.",
    why="Each reads its indices, gathers piece by piece and writes a new tensor; a boolean index also makes the host wait for its size.",
    before="i = mask.nonzero()\nx[i] = f(x[i])",
    after="x = torch.where(mask, f(x), x)",
    safe=False,
    needs=frozenset({"trace"}),
    find=find,
    source="kernel times under the indexing ops in the trace",
)
