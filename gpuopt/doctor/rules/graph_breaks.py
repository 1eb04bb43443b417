"""GPU501: torch.compile split the model into several graphs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

REGION = "Torch-Compiled Region"
"""Name of the op Dynamo records around every compiled graph it runs (torch/_dynamo/convert_frame.py)."""
WORST = 5
UNCOMPILED = "; its function runs uncompiled"
"""What a reason's title ends in where Dynamo gave a whole frame up: a break inside a loop."""
REMEDIES = (
    (("torch.compiler.disable",), "take torch.compiler.disable off that function, or move the call out of forward()"),
    (("print", "logging", "logger", "warnings"), "move the printing out of forward()"),
    (("item()", "_local_scalar_dense", "scalar", "tolist"), "keep the value a tensor: torch.where instead of if, no .item() in forward()"),
    (("data-dependent", "dynamic control flow", "jump", "branch", "bool("), "write the branch as torch.where or torch.cond"),
    (("nonzero", "dynamic output shape", "dynamic shape operator"), "write it with a mask of fixed shape"),
    (("numpy",), "do it with torch ops"),
    (
        ("skipped function", "skip", "builtin", "c function", "c/c++"),
        "replace the call by torch ops, or register it with torch.library.custom_op",
    ),
    (("torch._dynamo.graph_break",), "remove the graph_break() call"),
)
"""Words of a reason -> what takes the break away."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a line, the five commonest, then one for the rest; the idle time between compiled regions is shared among them by how often each broke."""
    assert evidence.compiled is not None
    places: dict[tuple[str, str], int] = defaultdict(int)
    remedies: dict[str, str] = {}
    skipped: set[tuple[str, str]] = set()
    for reason, line, count in evidence.compiled.graph_breaks:
        if count > 0:
            shown = _shown(reason)
            places[(shown, line)] += count
            remedies.setdefault(shown, _remedy(reason))
            if UNCOMPILED in reason.partition("\n")[0]:
                skipped.add((shown, line))
    if not places:
        return
    total = sum(places.values())
    idle_ms = border_ms(evidence)
    ranked = sorted(places.items(), key=lambda item: (-item[1], item[0]))
    graphs = f"; {evidence.compiled.num_graphs} graphs in all" if evidence.compiled.num_graphs > 1 else ""
    for (reason, line), count in ranked[:WORST]:
        yield _priced(
            evidence,
            f"torch.compile broke the graph {words.times(count)}{'' if line else ' at an unknown line'}: {reason}{UNCOMPILED if (reason, line) in skipped else ''}{graphs}",
            f"{remedies[reason]}; fullgraph=True makes the next break an error",
            line or None,
            count,
            None if idle_ms is None else idle_ms * count / total,
        )
    rest = ranked[WORST:]
    if rest:
        count = sum(n for _, n in rest)
        share = None if idle_ms is None else idle_ms * count / total
        yield _priced(
            evidence, f"{words.number(count, 'more graph break')} at {words.number(len(rest), 'other line')}", "TORCH_LOGS=graph_breaks names each; fullgraph=True stops at the first", None, count, share
        )  # fmt: skip


def _priced(evidence: Evidence, message: str, fix: str, line: str | None, count: int, idle_ms: float | None) -> Finding:
    finding = Finding(code="", severity="warning", message=message, fix=fix, line=line, count=count, time_ms=idle_ms or None)
    # One graph still has gaps, only smaller ones: the upper end is all of them gone.
    return finding if not idle_ms else priced(finding, idle_ms, low=0.6, high=1.0, wall_ms=evidence.wall_ms)


def border_ms(evidence: Evidence) -> float | None:
    """Untraced idle time of the device where one compiled region hands over to the next, a call; None without a trace that shows two of them."""
    trace = evidence.trace
    if trace is None or not trace.on_device:
        return None
    idle, seen = 0, set()
    end, step, region = 0, None, None
    for item in timeline.work(trace):
        mine = next((op.index for op in trace.chain(item.op) if op.name.startswith(REGION)), None)
        if item.step == step and mine != region:
            idle += max(0, item.start_ns - end)
        end = item.start_ns + item.dur_ns if item.step != step else max(end, item.start_ns + item.dur_ns)
        step, region = item.step, mine
        seen.add(mine)
    if len(seen - {None}) < 2:
        return None
    return idle * timeline.stretch(evidence) / timeline.num_steps(trace) / 1e6


def _remedy(reason: str) -> str:
    """Title and explanation decide; Dynamo's hints name functions that were not called."""
    lowered = reason.partition("Hint:")[0].lower()
    return next(
        (fix for words, fix in REMEDIES if any(word in lowered for word in words)), "rewrite that line so that torch.compile can trace it"
    )


def _shown(reason: str) -> str:
    """The title; where it names nothing, the first sentence of the explanation: `Failed to trace builtin operator` says which only there."""
    lines = [line.strip().removesuffix(UNCOMPILED) for line in reason.splitlines() if line.strip()]
    if not lines:
        return "no reason given"
    explained = next((line.removeprefix("Explanation:").strip() for line in lines[1:] if line.startswith("Explanation:")), "")
    sentence = re.split(r"(?<=[\w`)\]])\. ", explained)[0].rstrip(".")
    return (f"{lines[0]}: {sentence}" if "`" in sentence and "`" not in lines[0] else lines[0])[:200]


RULE = Rule(
    code="GPU501",
    name="graph-breaks",
    what="torch.compile could not trace the model in one piece.",
    why="At every break the device drains while Python runs between two graphs, nothing is fused across it, and CUDA graphs end there.",
    before="y = self.block(x)\nprint(y.mean().item())\nreturn self.head(y)",
    after="y = self.block(x)\nreturn self.head(y)",
    safe=False,
    needs=frozenset({"compiled"}),
    find=find,
    source="idle times of the trace between compiled regions, scaled to the untraced wall time",
)
