"""GPU309: weights computed anew in every call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor import modules, recast, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

_OLD_HOOKS = {"WeightNorm": "weight_norm", "SpectralNorm": "spectral_norm"}


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all parametrized weights of either kind: torch.nn.utils.parametrize, and the older hooks of weight_norm and spectral_norm."""
    parts = modules.parts(evidence.module)
    found = {name: what for name, part in parts.items() if (what := _how(part))}
    if not found:
        return
    kinds = Counter(what for _, what in found.values())
    size = sum(_bytes(parts[name], tensor) for name, (tensor, _) in found.items())
    rows = [r for r in evidence.records if r.time_ns and _is_rebuilding(r.module, r.op, found)]
    taken = recast.total_ms(rows)
    first, (tensor, kind) = next(iter(found.items()))
    new = hasattr(parts[first], "parametrizations")
    finding = Finding(
        code="",
        severity="warning",
        message=f"{words.number(len(found), 'weight is', 'weights are')} rebuilt in every call ({', '.join(f'{n} {k}' for k, n in kinds.items())}: {words.listed(found)}): {units.format_bytes(size)}"
        + (f", {words.ms(taken)}" if rows else ""),
        fix=f"torch.nn.utils.parametrize.remove_parametrizations(module, {tensor!r}) on each, after loading"
        if new
        else f"torch.nn.utils.remove_{kind}(module) on each, after loading",
        module=first,
        line=modules.line(evidence.module, first),
        count=len(found),
        bytes=size,
        time_ms=taken if rows else None,
    )
    yield priced(finding, recast.shown_ms(evidence, taken), low=0.8, high=1.0, wall_ms=evidence.wall_ms)


def _how(part: Any) -> tuple[str, str] | None:
    """(tensor's name, kind) of what is rebuilt; a parametrization that does nothing but store (none is known of) would still be called."""
    table = getattr(part, "parametrizations", None)
    if table is not None and hasattr(table, "items"):
        for tensor, chain in table.items():
            return str(tensor), " + ".join(type(step).__name__.strip("_") for step in chain)
    for hook in part._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils.") and type(hook).__name__ in _OLD_HOOKS:
            return str(hook.name), _OLD_HOOKS[type(hook).__name__]
    return None


def _bytes(part: Any, tensor: str) -> float:
    """Of the weight that is rebuilt, from its stored pieces: reading the weight itself would rebuild it."""
    table = getattr(part, "parametrizations", None)
    own = table[tensor].parameters(recurse=False) if table is not None else part.parameters(recurse=False)
    sizes = [p.numel() * p.element_size() for p in own if not modules.is_lazy(p)]
    return float(max(sizes, default=0))


def _is_rebuilding(module: str, op: str, found: dict[str, tuple[str, str]]) -> bool:
    """In the parametrization's own modules, or the fused op of weight norm, in the module it belongs to."""
    return (".parametrizations." in f".{module}." and any(module.startswith(f"{name}.") or not name for name in found)) or (
        module in found and "weight_norm" in op
    )


RULE = Rule(
    code="GPU309",
    name="rebuilt-weights",
    what="A weight is computed from other tensors in every call: a parametrization, weight norm or spectral norm.",
    why="These serve training. In inference the result is the same in every call; computing it takes kernels, reads and writes the whole weight, and keeps compilers from folding it.",
    before="layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(1024, 1024))",
    after="torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')  # once, after loading",
    safe=False,
    needs=frozenset({"module"}),
    find=find,
    source="torch.nn.utils.parametrize: the parametrized tensor is computed at each access",
)
