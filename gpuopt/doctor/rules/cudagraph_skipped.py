"""GPU503: CUDA graphs were asked for, and Inductor went without."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

REMEDIES = (
    (("mutat",), "do not write into inputs: return the new value, or make the tensor a registered buffer of the module"),
    (
        ("cpu device", "cpu tensor", "on cpu", "cpu scalar", "cpu ops", "devicecopy"),
        "keep every tensor of forward() on the GPU: the CPU one is named in the reason",
    ),
    (("multiple device", "multiple devices"), "one GPU a graph: move everything to one device, or compile the parts apart"),
    (
        ("dynamic shape", "symbolic", "unbacked", "conditional ops"),
        "compile with fixed shapes, one graph a size: pad inputs to a few sizes",
    ),
    (
        ("incompatible op", "incompatible ops", "unsafe custom op"),
        "replace the op that the reason names: it waits for the host, or allocates",
    ),
    (("re-recording", "exceed"), "fewer different shapes: pad inputs to a few sizes"),
    (("backward",), "run under torch.no_grad()"),
)
"""Words of a reason (torch/_inductor/cudagraph_utils.py) -> what to change."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a reason, priced as the time between launches, which a replay takes away."""
    assert evidence.compiled is not None
    reasons = Counter((_short(reason), _line(reason)) for reason in evidence.compiled.cudagraph_skips)
    if not reasons:
        return
    gaps_ms = timeline.between_ms(evidence, *timeline.LAUNCHING) if evidence.trace is not None and evidence.trace.on_device else None
    total = reasons.total()
    for (reason, line), count in reasons.most_common():
        share_ms = None if gaps_ms is None else gaps_ms * count / total
        finding = Finding(
            code="",
            severity="warning",
            message=f"CUDA graphs were skipped {words.times(count)}: {reason}"
            + (f"; the GPU idles {words.ms(share_ms)} a call between launches" if share_ms else ""),
            fix=next(
                (fix for words, fix in REMEDIES if any(word in reason.lower() for word in words)),
                "remove what the reason names from forward()",
            ),
            line=line,
            count=count,
            time_ms=share_ms or None,
        )
        yield finding if not share_ms else priced(finding, share_ms, low=0.6, high=1.0, wall_ms=evidence.wall_ms)


def _short(reason: str) -> str:
    text = " ".join(reason.split())
    found = text.lower().find("skipping cudagraphs")
    if found >= 0:
        text = text[found + len("skipping cudagraphs") :].lstrip()
        text = text.removeprefix("due to ").removeprefix("because ").lstrip(": ")
    text = text.partition(" Found from")[0].partition(' File "')[0].rstrip(" .:")
    return text[:160] or "Inductor gave no reason"


def _line(reason: str) -> str | None:
    """Where the stack in a reason ends: its innermost frame."""
    frames = re.findall(r"File [\"']([^\"']+)[\"'], line (\d+)", reason)
    return f"{frames[-1][0].rpartition('/')[2]}:{frames[-1][1]}" if frames else None


RULE = Rule(
    code="GPU503",
    name="cudagraph-skipped",
    what="CUDA graphs were asked for and not made.",
    why="Inductor falls back to launching every kernel by itself, with no more than a log line: the preset costs its memory and gives nothing.",
    before="def forward(self, x):\n    x += 1\n    return self.net(x)",
    after="def forward(self, x):\n    return self.net(x + 1)",
    safe=False,
    needs=frozenset({"compiled"}),
    find=find,
    source="Inductor's own reasons; idle times of the trace, scaled to the untraced wall time",
    explains=frozenset({"GPU404"}),
)
