"""GPU408: element-wise ops run one after the other over the same tensor, each in a pass of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gpuopt.core import kernels
from gpuopt.core.result import Finding
from gpuopt.core.spec import BackendSpec, Change
from gpuopt.core.trace import CpuOp, Kernel, Trace
from gpuopt.doctor import modules, timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.recast import shown_ms
from gpuopt.doctor.rule import Rule

MIN_SHARE = 0.03
"""Of the call, in passes that fusion would not make."""
FUSABLE = frozenset({"pointwise", "cast"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Element-wise kernels of one stream with nothing between them, over tensors of one size."""

    kernels: tuple[Kernel, ...]
    tensors_read: tuple[int, ...]
    """By each: how many tensors of the full size."""
    module: str | None

    @property
    def saved_share(self) -> float:
        """1 - bytes of one pass / bytes of all: each reads its tensors and writes one; fused, what one writes the next does not read."""
        passes = len(self.kernels)
        moved = sum(self.tensors_read) + passes
        fused = max(1, sum(self.tensors_read) - (passes - 1)) + 1
        return max(0.0, 1 - fused / moved)


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all runs: the fix is one. Only where ops run as they are written: compiled code has fused what it could."""
    trace = evidence.trace
    assert trace is not None
    if evidence.backend not in modules.EAGER:
        return
    steps = timeline.num_steps(trace)
    span_ms = evidence.wall_ms or sum(s.dur_ns for s in trace.steps) / steps / 1e6
    runs = _runs(trace)
    saved_ms = math.fsum(run.saved_share * sum(k.dur_ns for k in run.kernels) for run in runs) / steps / 1e6
    if not runs or saved_ms < MIN_SHARE * span_ms or not saved_ms:
        return
    time_ms = sum(k.dur_ns for run in runs for k in run.kernels) / steps / 1e6
    worst = max(runs, key=lambda run: run.saved_share * sum(k.dur_ns for k in run.kernels))
    passes = sum(len(run.kernels) for run in runs) / steps
    where = list(
        dict.fromkeys(run.module for run in sorted(runs, key=lambda r: -sum(k.dur_ns for k in r.kernels)) if run.module is not None)
    )
    names = " -> ".join(_op_name(trace, k) for k in worst.kernels[:4]) + (" -> ..." if len(worst.kernels) > 4 else "")
    finding = Finding(
        code="",
        severity="info",
        message=f"{words.number(passes, 'element-wise pass', 'element-wise passes')} a call follow each other over the same tensors in {words.number(len(runs) / steps, 'chain')} ({names}): {words.ms(time_ms)}, "
        f"{words.share(saved_ms / span_ms)} of the call in passes that fusion saves" + (f", in {words.listed(where)}" if where else ""),
        fix="torch.compile(model): it makes one kernel of each chain",
        module=where[0] if len(where) == 1 else None,
        line=modules.line(evidence.module, where[0]) if evidence.module is not None and where else None,
        op=_op_name(trace, worst.kernels[0]),
        count=max(1, round(passes)),
        time_ms=time_ms,
        change=Change(backend=BackendSpec(name="inductor")),
    )
    yield priced(finding, shown_ms(evidence, saved_ms), low=0.6, high=1.2, wall_ms=evidence.wall_ms)


def _runs(trace: Trace) -> list[Run]:
    found: list[Run] = []
    streams: dict[tuple[int, int | None], list[Kernel]] = {}
    for each in trace.kernels:
        if each.step is not None and not each.is_memset and each.graph_id is None:
            streams.setdefault((each.stream, each.step), []).append(each)
    for ran in streams.values():
        chain: list[tuple[Kernel, int, int]] = []
        order: list[Kernel | None] = [*sorted(ran, key=lambda k: k.start_ns), None]
        for kernel in order:
            size, read = _size(trace, kernel) if kernel is not None else (0, 0)
            if chain and (kernel is None or size != chain[-1][1] or size == 0):
                if len(chain) > 1:
                    found.append(
                        Run(
                            kernels=tuple(k for k, _, _ in chain),
                            tensors_read=tuple(n for _, _, n in chain),
                            module=timeline.module_of(trace, chain[0][0].op),
                        )
                    )
                chain = []
            if kernel is not None and size:
                chain.append((kernel, size, read))
    return found


def _size(trace: Trace, kernel: Kernel) -> tuple[int, int]:
    """(elements of the largest tensor an element-wise kernel's op reads, how many of that size); (0, 0) for other kernels, or where shapes are unknown.

    Generated kernels are fused already.
    """
    if kernels.kind(kernel.name) not in FUSABLE or kernel.name.startswith("triton_"):
        return 0, 0
    op = _op(trace, kernel)
    if op is None:
        return 0, 0
    sizes = [math.prod(shape) for shape in op.shapes]
    return max(sizes), 1 if op.name == "aten::copy_" else sizes.count(max(sizes))  # copy_ lists what it writes, too


def _op(trace: Trace, kernel: Kernel) -> CpuOp | None:
    return next((o for o in trace.chain(kernel.op) if o.shapes), None)


def _op_name(trace: Trace, kernel: Kernel) -> str:
    op = _op(trace, kernel)
    return op.name.removeprefix("aten::") if op is not None else kernels.short(kernel.name)


RULE = Rule(
    code="GPU408",
    name="unfused-pointwise",
    what="Several element-wise ops in a row read and write the same tensor.",
    why="Each is bound by memory: n passes take n times as long as one kernel that does them all.",
    before="y = torch.sigmoid(x * a + b)",
    after="y = torch.compile(lambda x: torch.sigmoid(x * a + b))(x)",
    safe=True,
    needs=frozenset({"trace"}),
    find=find,
    source="bytes of all passes against those of one",
    has_change=True,
)
