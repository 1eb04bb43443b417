"""GPU506: ONNX Runtime copies tensors between host and device in the middle of the graph."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

_NODE = re.compile(r"Memcpy(From|To)Host")
"""Ops that ONNX Runtime's MemcpyTransformer inserts; not CUPTI's `Memcpy HtoD`, which every input makes."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all, priced by their own time where the records or the trace have it."""
    rows = [r for r in evidence.records if _NODE.search(r.op) or any(_NODE.search(kernel) for kernel in r.kernels)]
    names = [r.op for r in rows]
    count = float(sum(r.count for r in rows))
    time_ms = math.fsum(r.time_ns or 0.0 for r in rows) / 1e6
    num_bytes = math.fsum(r.bytes or 0.0 for r in rows)
    if not rows and evidence.trace is not None:
        ops = [op for op in evidence.trace.ops if op.step is not None and _NODE.search(op.name)]
        steps = timeline.num_steps(evidence.trace)
        names, count, time_ms = [op.name for op in ops], len(ops) / steps, math.fsum(op.dur_ns for op in ops) / steps / 1e6
    if not names and evidence.audit is not None:
        names = [text for text in (*evidence.audit.exceptions, evidence.audit.reason) if _NODE.search(text)]
        count = float(len(names))
    if not names:
        return
    finding = Finding(
        code="",
        severity="warning",
        message=f"{words.number(count, 'copy', 'copies')} between host and device inside the ONNX graph"
        + (f": {words.ms(time_ms)} a call" if time_ms else ""),
        fix="give the op next to each copy a GPU kernel (newer opset, another op), or keep shapes constant: --dim fixes them, then the shape ops fold away",
        op=names[0][:80],
        count=max(1, round(count)),
        bytes=num_bytes or None,
        time_ms=time_ms or None,
    )
    yield priced(finding, time_ms, low=0.6, high=1.0, wall_ms=evidence.wall_ms) if time_ms else finding


RULE = Rule(
    code="GPU506",
    name="ort-memcpy-nodes",
    what="ONNX Runtime inserted copies between host and device into the graph.",
    why="Where a node on the CPU meets one on the GPU, a copy and a wait go between them in every call, and CUDA graphs become impossible.",
    before="MatMul (CUDA) -> MemcpyToHost -> NonZero (CPU) -> MemcpyFromHost -> Gather (CUDA)",
    after="MatMul (CUDA) -> Where (CUDA)",
    safe=False,
    needs=frozenset({"device"}),
    find=find,
    source="node names of ONNX Runtime's profile (core/optimizer/transformer_memcpy.cc)",
)
