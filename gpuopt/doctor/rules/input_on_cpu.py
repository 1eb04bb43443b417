"""GPU102: every call copies its inputs to the GPU."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor import transfers, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule
from gpuopt.doctor.timeline import num_steps

MIN_SHARE = 0.01
"""Of the call: less is a copy of a few numbers, not worth a line."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for the copies whose sizes are the inputs': priced at what is left once they come from pinned memory (the rest is GPU101's)."""
    trace = evidence.trace
    assert trace is not None and evidence.device is not None
    copies = transfers.sent(evidence).inputs
    if not copies:
        return
    steps = num_steps(trace)
    num_bytes = sum(c.bytes for c in copies) / steps
    link = evidence.device.ceilings.bandwidth("measured", "h2d")
    pageable = tuple(c for c in copies if c.memory == "pageable")
    floor_ms = sum(c.bytes for c in pageable) / steps / link * 1e3 if link else 0.0
    left_ms = floor_ms + transfers.exposed_ms(trace, tuple(c for c in copies if c.memory != "pageable"))
    if evidence.wall_ms and left_ms < MIN_SHARE * evidence.wall_ms:
        return
    is_asked = evidence.input_mode != "device"
    finding = Finding(
        code="",
        severity="info",
        message=f"{units.format_bytes(num_bytes)} of inputs travel to the GPU in every call: {words.ms(transfers.held_ms(trace, copies))} in {words.number(len(copies) / steps, 'copy', 'copies')}"
        + (f", which is what --input-mode {evidence.input_mode} measures" if is_asked else ""),
        fix="copy the next batch while this one computes (`for batch in gpuopt.feed(loader)`; --input-mode overlapped measures it), or make the inputs on the GPU"
        if is_asked
        else "give the model inputs that lie on the GPU already: move each once, keep it there, and take .to('cuda') out of the call",
        op="Memcpy HtoD",
        count=round(len(copies) / steps),
        bytes=num_bytes,
        time_ms=transfers.held_ms(trace, copies),
    )
    # Whoever asked for the copies keeps them: what a second stream would hide under the computing is all there is to gain.
    saved_ms = transfers.hidden_ms(trace, left_ms) if is_asked else left_ms
    yield priced(finding, saved_ms, low=0.8, high=1.15, wall_ms=evidence.wall_ms)


RULE = Rule(
    code="GPU102",
    name="input-on-cpu",
    what="The inputs lie in host memory and are copied to the GPU inside every call.",
    why="The link moves tens of gigabytes a second where the GPU's own memory moves thousands, and the first kernel waits for the copy.",
    before="for _ in range(n):\n    y = model(x.to('cuda'))",
    after="x = x.to('cuda')\nfor _ in range(n):\n    y = model(x)",
    safe=True,
    needs=frozenset({"trace", "device", "inputs"}),
    find=find,
    source="the link's rate is measured on this machine (gpuopt device)",
)
