"""GPU111: tensors are copied only to lie differently in memory."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import kernels
from gpuopt.core.result import Finding
from gpuopt.core.spec import Change
from gpuopt.core.trace import Copy, Trace
from gpuopt.doctor import modules, timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.places import Place, spread
from gpuopt.doctor.price import priced
from gpuopt.doctor.recast import shown_ms
from gpuopt.doctor.rule import Rule
from gpuopt.doctor.rules import manual_attention

MIN_SHARE = 0.03
"""Of the call. A copy here and there is the price of a layout that pays elsewhere."""
MIN_BYTES = 1 << 16
COPIES = frozenset(
    {"aten::contiguous", "aten::clone", "aten::copy_", "aten::reshape", "aten::_reshape_copy", "aten::flatten", "aten::permute_copy"}
)


def find(evidence: Evidence) -> Iterator[Finding]:
    """Findings by module for same-dtype copies, and one for cuDNN's own NCHW <-> NHWC passes: priced at their time, of which some copies are needed."""
    trace = evidence.trace
    assert trace is not None
    steps = timeline.num_steps(trace)
    span_ms = evidence.wall_ms or sum(s.dur_ns for s in trace.steps) / steps / 1e6
    # What lays q, k and v out for attention's two products goes with them: that rule has counted it.
    written_out = {block.module for block in manual_attention.blocks(evidence.records)}
    copied: dict[str | None, list[int]] = {}
    passes: list[int] = []
    for item in timeline.work(trace):
        if isinstance(item, Copy):
            kind = "strided copy" if item.kind == "d2d" and item.bytes >= MIN_BYTES else ""
        else:
            kind = "" if item.is_memset else kernels.kind(item.name)
        if kind == "nchw-nhwc":
            passes.append(item.dur_ns)
        elif kind == "strided copy" and _is_copy(trace, item.op) and timeline.module_of(trace, item.op) not in written_out:
            copied.setdefault(timeline.module_of(trace, item.op), []).append(item.dur_ns)
    total_ms = sum(sum(times) for times in copied.values()) / steps / 1e6
    if total_ms >= MIN_SHARE * span_ms and total_ms:
        share = words.share(total_ms / span_ms)
        places = [
            Place(module=m, op="aten::copy_", count=len(t) / steps, time_ms=sum(t) / steps / 1e6, saved_ms=sum(t) / steps / 1e6)
            for m, t in copied.items()
        ]

        def say(place: Place) -> Finding:
            finding = Finding(
                code="",
                severity="info",
                message=f"{words.number(place.count, 'copy a call changes', 'copies a call change')} only the layout{place.where}: {words.ms(place.time_ms)} (all such copies: {words.ms(total_ms)}, {share} of the call)",
                fix="drop .contiguous() before ops that take strides, reshape once at the end, and let the product write the layout the next op reads",
                module=None if place.module == "?" else place.module,
                line=modules.line(evidence.module, place.module)
                if evidence.module is not None and place.module not in (None, "?")
                else None,
                op=place.op,
                count=max(1, round(place.count)),
                time_ms=place.time_ms,
            )
            return priced(finding, shown_ms(evidence, place.saved_ms), low=0.5, high=1.0, wall_ms=evidence.wall_ms)

        yield from spread(places, say)
    passes_ms = sum(passes) / steps / 1e6
    # With the module at hand, whether its convolutions want channels_last is another rule's question.
    if evidence.module is None and passes_ms and passes_ms >= MIN_SHARE * span_ms:
        finding = Finding(
            code="",
            severity="info",
            message=f"cuDNN turns tensors between NCHW and NHWC {words.times(len(passes) / steps)} a call: {words.ms(passes_ms)}, {words.share(passes_ms / span_ms)} of it",
            fix="model.to(memory_format=torch.channels_last), and the inputs too",
            op="nchwToNhwcKernel",
            count=max(1, round(len(passes) / steps)),
            time_ms=passes_ms,
            change=Change(channels_last=True),
        )
        yield priced(finding, shown_ms(evidence, passes_ms), low=0.6, high=1.0, wall_ms=evidence.wall_ms)


def _is_copy(trace: Trace, op: int | None) -> bool:
    """Launched by one of COPIES, with inputs and output of one dtype; not by a conversion, and not into a cache by index."""
    names = timeline.op_path(trace, op)
    return any(n in COPIES for n in names) and not any(n in ("aten::to", "aten::_to_copy", "aten::cat", "aten::index_copy_") for n in names)


RULE = Rule(
    code="GPU111",
    name="layout-thrash",
    what="Tensors are copied to another memory layout without any computation.",
    why="Such a copy reads and writes the whole tensor; most ops read strided tensors as well, and products can write the layout that is wanted.",
    before="x = x.permute(0, 2, 1).contiguous() @ w",
    after="x = x.transpose(1, 2) @ w",
    safe=True,
    needs=frozenset({"trace"}),
    find=find,
    source="kernel times in the trace",
    has_change=True,
)
