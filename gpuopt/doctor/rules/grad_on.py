"""GPU302: gradients are recorded in inference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor import modules, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

MOST_NODES = 20_000
"""Nodes of a graph that are walked; a bigger one is told as 'more than'."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: outputs that require grad, the graph they hang on, and the activations it keeps alive."""
    if evidence.flags.get("grad_enabled") is not True:
        return
    named = [(name, t) for name, t in modules.given(evidence.outputs) if getattr(t, "requires_grad", False)]
    if not named:
        return
    nodes, kept = _graph([t for _, t in named], {_storage(h.tensor)[0] for h in modules.tensors(evidence.module)})
    size = "more than " if nodes >= MOST_NODES else ""
    peak = f" of {units.format_bytes(evidence.peak_bytes)} at the peak" if evidence.peak_bytes else ""
    yield Finding(
        code="",
        severity="warning",
        message=f"{words.number(len(named), 'output')} with requires_grad ({words.listed(n for n, _ in named)}): a graph of {size}{nodes} nodes keeps {units.format_bytes(kept)} of activations{peak} alive",
        fix="with torch.inference_mode(): around the call",
        count=nodes,
        bytes=kept,
    )


def _graph(outputs: list[Any], weights: set[int]) -> tuple[int, float]:
    """(nodes, bytes of saved tensors that are not weights) behind these outputs."""
    queue = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen: set[Any] = set(queue)
    storages: dict[int, int] = {}
    count = 0
    while queue and count < MOST_NODES:
        node = queue.pop()
        count += 1
        for name in dir(node):
            if name.startswith("_saved_"):
                _weigh(node, name, weights, storages)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
    return count, float(sum(storages.values()))


def _weigh(node: Any, name: str, weights: set[int], storages: dict[int, int]) -> None:
    try:
        saved = getattr(node, name)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):  # freed, or of a kind Python cannot show
        return
    for value in saved if isinstance(saved, tuple | list) else (saved,):
        if modules.is_tensor(value) and not getattr(value, "is_leaf", False):
            pointer, size = _storage(value)
            if pointer not in weights:
                storages[pointer] = size


def _storage(tensor: Any) -> tuple[int, int]:
    """(address, bytes); a weight and its transpose have the same. (0, 0) for fake and meta tensors, which have no memory."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes() if storage.data_ptr() else 0
    except (RuntimeError, NotImplementedError):
        return 0, 0


RULE = Rule(
    code="GPU302",
    name="grad-on",
    what="Inference records a graph for gradients.",
    why="Every op keeps its inputs alive for a backward pass that never comes: memory grows with depth, the host does more work an op, and fused fast paths are not taken.",
    before="y = model(x)",
    after="with torch.inference_mode():\n    y = model(x)",
    safe=True,
    needs=frozenset({"flags", "outputs"}),
    find=find,
    source="PyTorch notes, autograd mechanics: locally disabling gradient computation",
)
