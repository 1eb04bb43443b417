"""GPU204: neighbouring layers are in different floating dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpuopt.core.result import Finding
from gpuopt.doctor import modules, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

MOST = 5
"""Borders named one by one."""
_ADAPTERS = ("lora_", "adapter", "router", "gate.")
"""Adapters and expert routers are fp32 on purpose, and the code around them casts."""


@dataclass(frozen=True, slots=True)
class _Layer:
    name: str
    dtype: str
    part: Any


def find(evidence: Evidence) -> Iterator[Finding]:
    """Layers with weights of two and more dimensions in another dtype than most of the model, with the layer before or after them."""
    if evidence.flags.get("autocast"):
        return
    layers = list(_layers(evidence.module))
    main = modules.own_dtype(evidence.module)
    odd = [i for i, layer in enumerate(layers) if layer.dtype != main and not _is_meant(evidence, layer, main or "")]
    if not odd:
        return
    # It ran, so its own code casts at the border; where it did not, the first product of two dtypes raises.
    ran = evidence.failure is None and (evidence.wall_ms is not None or evidence.outputs is not None)
    severity = "warning" if ran else "error"
    cost = "each call casts there" if ran else "products of two dtypes raise an error"
    for index in odd[:MOST]:
        layer = layers[index]
        near = next((layers[i] for i in (index - 1, index + 1) if 0 <= i < len(layers) and layers[i].dtype != layer.dtype), None)
        border = f", next to {_called(near)} in {near.dtype}" if near else ""
        elements = sum(p.numel() for p in layer.part.parameters(recurse=False))
        yield Finding(
            code="",
            severity=severity,
            message=f"{_called(layer)} is {layer.dtype} ({elements:,} elements) in a {main} model{border}: {cost}",
            fix=f"model.to(torch.{main}), or keep it on purpose with --keep-fp32 {layer.name}"
            if layer.dtype == "float32"
            else f"model.to(torch.{main})",
            module=layer.name,
            line=modules.line(evidence.module, layer.name),
            count=1,
        )
    if len(odd) > MOST:
        yield Finding(
            code="",
            severity=severity,
            message=f"{words.number(len(odd) - MOST, 'more layer')} not in {main}: {words.listed(layers[i].name for i in odd[MOST:])}",
            fix=f"model.to(torch.{main})",
            module=modules.common(layers[i].name for i in odd[MOST:]),
            count=len(odd) - MOST,
        )


def _called(layer: _Layer) -> str:
    return f"layer {layer.name}" if layer.name else "the model itself"


def _layers(root: Any) -> Iterator[_Layer]:
    """Modules with floating weights of their own, in order of registration; normalisations and vectors are left out."""
    for name, part in modules.parts(root).items():
        weights = [
            p for p in part.parameters(recurse=False) if not modules.is_lazy(p) and p.dim() >= 2 and modules.dtype(p) in modules.FLOATS
        ]
        if weights and not modules.is_norm(part):
            yield _Layer(name, modules.dtype(weights[0]), part)


def _is_meant(evidence: Evidence, layer: _Layer, main: str) -> bool:
    """fp32 inside a half model where somebody said so: transformers' own lists, --keep-fp32, a hook that casts, adapters."""
    if layer.dtype != "float32" or main not in modules.HALVES:
        return False
    root, parts = evidence.module, modules.parts(evidence.module)
    kept = {*(getattr(root, "_keep_in_fp32_modules", None) or ()), *(getattr(root, "_keep_in_fp32_modules_strict", None) or ())}
    if any(word in layer.name.split(".") for word in kept) or any(word in f"{layer.name}." for word in _ADAPTERS):
        return True
    if any(t.startswith("keep_fp32:") for t in evidence.transforms):
        return True
    return any(parts[name]._forward_pre_hooks for name in modules.around(layer.name) if name in parts and name)


RULE = Rule(
    code="GPU204",
    name="mixed-dtypes",
    what="A layer's weights are in another floating dtype than its neighbours'.",
    why="A product of two dtypes raises an error; where the code casts instead, every call converts activations back and forth at the border, and the odd layer is slow.",
    before="model.half()\nmodel.head = nn.Linear(1024, 10)",
    after="model.head = nn.Linear(1024, 10)\nmodel.half()",
    safe=False,
    needs=frozenset({"module"}),
    find=find,
    source="torch.nn.functional.linear: input and weight must have the same dtype",
)
