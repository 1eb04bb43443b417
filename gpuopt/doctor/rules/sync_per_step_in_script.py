"""GPU713: a script waits for the GPU several times a call."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

OFTEN = 10
"""Waits at one line: fewer are warm-up and the end."""
EXPLICIT_PER_CALL = 0.9
"""torch.cuda.synchronize() once a call already keeps the host from preparing the next one."""
HIDDEN_PER_CALL = 1.9
"""`.item()` or `.cpu()` once a call is how a result is read; twice is a loop, or a value that steers the next step."""
WORST = 5


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a line; unpriced: most of a wait is the GPU's own work, and only the trace knows how long it idled afterwards."""
    script = evidence.script
    assert script is not None
    calls = max((m.num_calls for m in script.modules), default=0)
    if not calls:
        return
    found = []
    for site in script.syncs:
        limit = EXPLICIT_PER_CALL if "synchronize" in site.what.lower() else HIDDEN_PER_CALL
        if site.count >= OFTEN and site.count / calls >= limit:
            found.append(site)
    for site in sorted(found, key=lambda one: (-one.seconds, -one.count))[:WORST]:
        is_explicit = "synchronize" in site.what.lower()
        yield Finding(
            code="",
            severity="warning" if site.count / calls >= HIDDEN_PER_CALL else "info",
            message=f"{site.what} waits for the GPU {words.times(site.count / calls)} a call: {words.number(site.count, 'wait')}, {words.ms(site.seconds * 1e3)} in all",
            fix="remove it: reading a result waits by itself; time with CUDA events"
            if is_explicit
            else "collect results on the GPU and read them once: torch.stack(results).cpu() after the loop",
            line=site.line,
            op=site.what,
            count=max(1, round(site.count / calls)),
        )


RULE = Rule(
    code="GPU713",
    name="sync-per-step-in-script",
    what="The script makes the host wait for the GPU in its inner loop.",
    why="While it waits nothing is launched: afterwards the GPU idles until the host has caught up.",
    before="for x in batches:\n    loss += model(x).mean().item()",
    after="for x in batches:\n    loss += model(x).mean()\nloss = loss.item()",
    safe=False,
    needs=frozenset({"script"}),
    find=find,
    source="waits counted by source line while the script ran",
)
