"""GPU505: ONNX Runtime computes part of the model on the CPU, though it was asked for a GPU."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

CPU = "CPUExecutionProvider"
WORTH = 0.01
"""Share of FLOPs on the CPU that is worth a warning: a GPU is a hundred times faster, so a hundredth there doubles the time."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding with the share and the providers; unpriced: the nodes' own times on the CPU are not known."""
    assert evidence.audit is not None
    share = evidence.audit.placements.get(CPU, 0.0)
    if not evidence.on_gpu or share <= 0:
        return
    others = [name.removesuffix("ExecutionProvider") for name, part in evidence.audit.placements.items() if name != CPU and part > 0]
    elsewhere = f"{', '.join(others)} has the rest" if others else "no other provider computes anything"
    fix = (
        "find the nodes in the notes of the run: export with a newer opset, or replace the op; fp16 models want fp16 for every input of the node"
        if others
        else "the CUDA provider did not start: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu"
    )
    yield Finding(
        code="",
        severity="warning" if share >= WORTH else "info",
        message=f"{words.share(share)} of the FLOPs run on the CPU: {elsewhere}; each such node also costs a copy there and one back",
        fix=fix,
        op=CPU,
    )


RULE = Rule(
    code="GPU505",
    name="ort-nodes-on-cpu",
    what="ONNX Runtime placed nodes that compute on the CPU.",
    why="A node without a kernel for the GPU falls back to the CPU in silence: its inputs are copied over, the GPU waits, and the CPU is a hundred times slower.",
    before="torch.onnx.export(model, args, 'm.onnx', opset_version=11)",
    after="torch.onnx.export(model, args, 'm.onnx', opset_version=20)",
    safe=False,
    needs=frozenset({"audit", "device"}),
    find=find,
    source="placements read back from ONNX Runtime's own profile",
)
