"""GPU715: a script records gradients while it infers."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

MIN_CALLS = 3
"""Once or twice is somebody looking at gradients."""
MIN_SHARE = 0.5
"""Of a model's calls."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a model that is called in eval mode with gradients on; unpriced: what the host saves an op, and what memory, only a run without them shows."""
    script = evidence.script
    assert script is not None
    for model in script.modules:
        if model.num_grad_calls >= MIN_CALLS and model.num_grad_calls >= MIN_SHARE * model.num_calls:
            yield Finding(
                code="",
                severity="warning",
                message=f"{model.name or model.module_class} is in eval mode and records a graph for gradients in {model.num_grad_calls} of {words.number(model.num_calls, 'call')}",
                fix="with torch.inference_mode(): around the loop that calls it",
                module=model.name or None,
                line=model.line or None,
                count=model.num_grad_calls,
            )


RULE = Rule(
    code="GPU715",
    name="grad-on-in-script",
    what="A script calls a model in eval mode without turning gradients off.",
    why="eval() changes dropout and batch norm, not autograd: every op still keeps its inputs alive for a backward pass that never comes, and does more work on the host.",
    before="model.eval()\nfor x in batches:\n    y = model(x)",
    after="model.eval()\nwith torch.inference_mode():\n    for x in batches:\n        y = model(x)",
    safe=False,
    needs=frozenset({"script"}),
    find=find,
    source="torch.is_grad_enabled() at each call while the script ran; PyTorch notes, autograd mechanics",
)
