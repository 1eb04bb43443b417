"""Copies over the link -> which of them carry inputs, which weights: by their sizes, for a trace holds no names."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from gpuopt.core.spec import DTYPE_BYTES
from gpuopt.core.trace import Copy, Trace
from gpuopt.doctor import modules
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.timeline import busy_ms, merged, module_of, num_steps, overlap_ns

SMALL_BYTES = 4096
"""Below this a size says nothing: a bias, a mask and a shape all look alike."""
LAYERS = 8
"""So many modules that each copy something to the device in every call do not copy inputs."""
FEW = 0.1
"""Of the parameters' bytes: weights that add up to less are one table kept on the host on purpose."""
FLAT = 0.05
"""All parameters in one buffer come this near to their bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """Host-to-device copies of all traced calls, sorted."""

    inputs: tuple[Copy, ...]
    weights: tuple[Copy, ...]
    others: tuple[Copy, ...]


def sent(evidence: Evidence) -> Sent:
    """Copies whose size is an input's are inputs, at most as many a call as there are such inputs; then those whose size is a parameter's are weights.

    Where no parameter's size is known, copies made inside `LAYERS` or more different modules are weights. What is left is weights too where it adds up to all parameters,
    or to half of them in `LAYERS` copies or more: packed otherwise than they are named. Weights that are only a `FEW` of all are others.
    """
    trace = evidence.trace
    assert trace is not None
    copies = [c for c in trace.copies if c.kind == "h2d" and c.step is not None]
    left = {step: Counter(int(t.numel() * t.element_size()) for _, t in modules.inputs(evidence)) for step in {c.step for c in copies}}
    parameters = parameter_sizes(evidence)
    inside = {module_of(trace, c.op) for c in copies} - {None, ""}
    is_layered = not parameters and len(inside) >= LAYERS
    # A bias's size says little alone; beside the copies of its large neighbours it says enough.
    smallest = 1 if any(c.bytes in parameters and c.bytes >= SMALL_BYTES for c in copies) else SMALL_BYTES
    inputs, weights, others = [], [], []
    for copy in copies:
        if left[copy.step][copy.bytes] > 0:
            left[copy.step][copy.bytes] -= 1
            inputs.append(copy)
        elif copy.bytes in parameters and copy.bytes >= smallest:
            weights.append(copy)
        elif is_layered and module_of(trace, copy.op) not in (None, ""):
            weights.append(copy)
        else:
            others.append(copy)
    whole = parameter_bytes(evidence)
    num_bytes = sum(c.bytes for c in others) / num_steps(trace)
    is_flat = whole is not None and abs(num_bytes - whole) <= FLAT * whole
    if whole and (is_flat or (num_bytes >= whole / 2 and len(others) >= LAYERS * num_steps(trace))):
        weights, others = weights + others, []
    elif whole and sum(c.bytes for c in weights) / num_steps(trace) < FEW * whole:
        weights, others = [], weights + others
    return Sent(inputs=tuple(inputs), weights=tuple(weights), others=tuple(others))


def parameter_sizes(evidence: Evidence) -> Counter[int]:
    """Bytes of a parameter -> how many there are of that size, as they are stored and as they run."""
    sizes: Counter[int] = Counter()
    for held in modules.tensors(evidence.module) if evidence.module is not None else ():
        if held.kind in ("parameter", "unregistered"):
            own = modules.dtype(held.tensor)
            for dtype in {own, modules.running(evidence, own)}:
                sizes[int(held.tensor.numel() * DTYPE_BYTES.get(dtype, 0))] += 1
    sizes.pop(0, None)
    return sizes


def parameter_bytes(evidence: Evidence) -> float | None:
    """Of all parameters as they run: from the module, else from the count and the precision asked for; None where neither is known."""
    if evidence.module is not None:
        total = 0
        for held in modules.tensors(evidence.module):
            if held.kind in ("parameter", "unregistered"):
                total += int(held.tensor.numel() * DTYPE_BYTES.get(modules.running(evidence, modules.dtype(held.tensor)), 0))
        return float(total) or None
    if evidence.count is not None and evidence.count.num_parameters and evidence.precision:
        return evidence.count.num_parameters * float(DTYPE_BYTES.get(modules.running(evidence, "float32"), 4))
    return None


def exposed_ms(trace: Trace, copies: tuple[Copy, ...]) -> float:
    """Milliseconds a call in which one of these copies runs and no kernel does."""
    kernels = merged(k for k in trace.kernels if k.step is not None)
    exposed = sum(c.dur_ns - overlap_ns(kernels, c.start_ns, c.start_ns + c.dur_ns) for c in copies)
    return exposed / num_steps(trace) / 1e6


_MOVES = frozenset({"aten::to", "aten::_to_copy", "aten::copy_", "aten::cuda", "aten::cpu", "aten::_copy_from", "aten::empty_strided"})


def op_ms(trace: Trace, copies: tuple[Copy, ...]) -> float:
    """Milliseconds a call inside the ops that make these copies, the outermost `.to()` of each: what the host is held for, allocation and wait included."""
    tops = {}
    for copy in copies:
        above = [o for o in trace.chain(copy.op) if o.name in _MOVES]
        if above:
            tops[above[-1].index] = above[-1].dur_ns
    return sum(tops.values()) / num_steps(trace) / 1e6


def held_ms(trace: Trace, copies: tuple[Copy, ...]) -> float:
    """Milliseconds a call these copies take: the host inside the calls of pageable ones, the transfers of the others."""
    pageable = {c.correlation for c in copies if c.memory == "pageable" and c.correlation is not None}
    host = sum(r.dur_ns for r in trace.runtime if r.correlation in pageable and r.step is not None)
    slow = sum(c.dur_ns for c in copies if c.memory == "pageable")
    return max(host, slow) / num_steps(trace) / 1e6 + exposed_ms(trace, tuple(c for c in copies if c.memory != "pageable"))


def hidden_ms(trace: Trace, exposed: float) -> float:
    """Of `exposed` milliseconds of copies a call, those that a copy of the next batch on a second stream would hide: no more than there is computing to hide them under."""
    return min(exposed, busy_ms(replace(trace, copies=())))
