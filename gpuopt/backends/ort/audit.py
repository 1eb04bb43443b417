"""The nodes that ran -> the precision audit: share of FLOPs by dtype and by provider, and what fell to the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gpuopt.backends.ort.flops import KINDS, node_flops
from gpuopt.backends.ort.profile import NodeRun
from gpuopt.backends.ort.settings import CPU, CUDA
from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision
from gpuopt.core.tally import Tally


def audit_nodes(
    nodes: tuple[NodeRun, ...],
    *,
    requested: Precision | None,
    layer_flops: Mapping[str, tuple[float | None, str]] | None = None,
    has_tf32: bool = False,
) -> PrecisionAudit:
    """What ran -> share of FLOPs by dtype and by provider. Casts that ONNX Runtime inserted show as the dtype its kernels were given."""
    known = layer_flops or {}
    counted: list[tuple[NodeRun, float]] = []
    unknown: list[NodeRun] = []
    for node in nodes:
        flops = node_flops(node)
        if flops is None:
            flops = _joined(node.name, known)
        if flops is None:
            unknown.append(node)
        elif flops:
            counted.append((node, flops))
    tally = Tally()
    placements: dict[str, float] = {}
    for node, flops in counted:
        tally.add_counted(KINDS.get(node.op, "product"), _audited_dtype(node, has_tf32), flops, f"{node.name} ({node.op})")
        placements[node.provider] = placements.get(node.provider, 0.0) + flops
    for node in unknown:
        tally.add_counted("product", node.dtype, None, f"{node.name} ({node.op})")
    total = sum(placements.values())
    audit = tally.audit(requested.value if requested else None, "onnx graph + placement: the nodes that ran")
    return replace(
        audit,
        # A node that cannot be weighed still says what it computes in: one in another dtype may be most of the work.
        honoured=audit.honoured and all(requested is None or _audited_dtype(node, has_tf32) == _wanted(requested) for node in unknown),
        placements={provider: flops / total for provider, flops in sorted(placements.items())} if total else {},
    )


def _wanted(requested: Precision) -> str:
    return "tf32" if requested is Precision.TF32 else requested.dtype


def _audited_dtype(node: NodeRun, has_tf32: bool) -> str:
    return "tf32" if has_tf32 and node.dtype == "float32" and node.provider == CUDA else node.dtype


def _joined(name: str, layer_flops: Mapping[str, tuple[float | None, str]]) -> float | None:
    """FLOPs of the source node this one was made from: ONNX Runtime appends to names, `node_MatMul_2/MatMulAddFusion`."""
    stems = [stem for stem in layer_flops if name == stem or name.startswith((stem + "/", stem + "_"))]
    return layer_flops[max(stems, key=len)][0] if stems else None


def placement_notes(nodes: tuple[NodeRun, ...]) -> list[str]:
    """What fell to the CPU under the CUDA provider: each such node costs a copy and a wait."""
    notes = []
    fallen = [n for n in nodes if n.provider == CPU and not n.op.startswith("Memcpy")]
    computing = [n for n in fallen if n.dtype.startswith(("float", "bfloat")) and n.op != "Shape"]
    if computing:
        names = ", ".join(f"{n.name} ({n.op})" for n in computing[:8]) + (" …" if len(computing) > 8 else "")
        notes.append(f"{len(computing)} nodes on floating tensors ran on the CPU: {names}")
    if len(fallen) > len(computing):
        notes.append(f"{len(fallen) - len(computing)} nodes on shapes and indices ran on the CPU")
    copies = [n for n in nodes if n.op.startswith("Memcpy")]
    if copies:
        notes.append(f"{len(copies)} copies between host and device inside the graph: {', '.join(n.name for n in copies[:8])}")
    return notes
