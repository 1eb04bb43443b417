"""GPU103: a tensor of the model stays behind when the model moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor import modules, sources, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.modules import Held
from gpuopt.doctor.rule import Rule

MOST = 5
"""Findings before the rest is summed."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """Registered tensors away from most of the model; bare tensors on the CPU that forward uses where the candidate is to run on a GPU."""
    held = list(modules.tensors(evidence.module))
    found = [*_apart(evidence, held), *(_left_behind(evidence, held) if evidence.on_gpu else ())]
    yield from found[:MOST]
    if len(found) > MOST:
        rest = found[MOST:]
        severity = "error" if any(f.severity == "error" for f in rest) else "warning"
        yield Finding(
            code="",
            severity=severity,
            message=f"{words.number(len(rest), 'more tensor')} apart from the model, in {words.listed(f.module or '' for f in rest)}",
            fix="as above, for each",
            module=modules.common(f.module or "" for f in rest),
            count=len(rest),
            bytes=sum(f.bytes or 0.0 for f in rest),
        )


def _apart(evidence: Evidence, held: list[Held]) -> Iterator[Finding]:
    """Parameters and buffers on the CPU (or without data) while most of the model is elsewhere; a model spread over GPUs on purpose is not judged."""
    registered = [h for h in held if h.kind in ("parameter", "buffer")]
    homes = Counter(h.tensor.device.type for h in registered)
    if len(homes) < 2 or _is_dispatched(evidence.module):
        return
    # What has no data is the odd one out, however much of it there is.
    home = max((kind for kind in homes if kind != "meta"), key=lambda kind: homes[kind])
    for h in registered:
        where = h.tensor.device.type
        if where == home or (h.tensor.dim() == 0 and where == "cpu"):
            continue
        if where == "meta":
            what, fix = (
                "has no data (device meta): it was never loaded",
                "load_state_dict(..., assign=True) with this key, or to_empty() and fill it",
            )
        else:
            what, fix = f"lies on {h.tensor.device}", f"model.to({home!r}) after the last change to the model"
        yield _finding(evidence, h, f"{h.kind} {h.name} {what}, {words.number(homes[home], 'other tensor')} on {home}", fix, "error")


def _left_behind(evidence: Evidence, held: list[Held]) -> Iterator[Finding]:
    """Bare attributes: `.to("cuda")` moves what is registered, nothing else. Tensors without dimensions may stay: kernels take them as numbers."""
    parts = modules.parts(evidence.module)
    # It ran: then the tensor was used where that is allowed (an index), or not at all, and costs a copy at most.
    ran = evidence.failure is None and (evidence.wall_ms is not None or evidence.outputs is not None)
    for h in held:
        if h.kind not in ("plain", "unregistered") or h.tensor.device.type != "cpu" or h.tensor.dim() == 0:
            continue
        used = sources.uses(parts[h.owner], h.attribute)
        at = next((u.line for u in used or () if not u.is_moved), None)
        if used is not None and at is None:
            continue
        if h.kind == "unregistered":
            what = f"{h.name} holds modules in a plain list: their parameters are not registered and stay on the CPU"
            fix = f"self.{h.attribute} = nn.ModuleList(...)"
        else:
            what = f"{h.name} is a plain tensor on the CPU: .to('cuda') does not move it"
            fix = f"self.register_buffer({h.attribute!r}, tensor, persistent=False) in __init__"
        severity = "info" if ran else "error" if used else "warning"
        yield _finding(evidence, h, what, fix, severity, at)


def _finding(evidence: Evidence, h: Held, what: str, fix: str, severity: str, line: str | None = None) -> Finding:
    size = float(h.tensor.numel() * h.tensor.element_size())
    shape = ",".join(str(n) for n in h.tensor.shape)
    return Finding(
        code="",
        severity=severity,
        message=f"{what} ({modules.dtype(h.tensor)}[{shape}], {units.format_bytes(size)})",
        fix=fix,
        module=h.owner,
        line=line or modules.line(evidence.module, h.owner),
        bytes=size,
    )


def _is_dispatched(root: object) -> bool:
    """accelerate put its parts where they are, with hooks that move them."""
    return hasattr(root, "hf_device_map") or any(hasattr(part, "_hf_hook") for part in modules.parts(root).values())


RULE = Rule(
    code="GPU103",
    name="buffer-on-cpu",
    what="A tensor of the model stays on the CPU when the model moves to the GPU.",
    why="model.to('cuda') moves parameters and buffers only; a bare tensor attribute stays behind, and forward raises 'expected all tensors to be on the same device', "
    "or copies it in every call.",
    before="self.positions = torch.arange(512)",
    after="self.register_buffer('positions', torch.arange(512), persistent=False)",
    safe=False,
    needs=frozenset({"module"}),
    find=find,
    source="torch.nn.Module._apply: parameters and buffers only",
)
