"""GPU603: others use the GPU at the same time."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding with their number; None, where the driver does not say, is not 0 and not a finding."""
    assert evidence.device is not None
    others = evidence.device.other_processes
    if not others:
        return
    yield Finding(
        code="",
        severity="warning",
        message=f"{others} other process{'es' if others > 1 else ''} hold{'' if others > 1 else 's'} memory on {evidence.device.id} ({evidence.device.name})",
        fix="nvidia-smi lists them: stop them, or take another GPU with CUDA_VISIBLE_DEVICES; under MPS or MIG measure on a slice of your own",
        count=others,
    )


RULE = Rule(
    code="GPU603",
    name="gpu-shared",
    what="Other processes use this GPU.",
    why="Without MPS their kernels take turns with yours in time slices, and their memory is missing from yours: times vary, and memory runs out early.",
    before="$ nvidia-smi  # two python processes on GPU 0",
    after="$ CUDA_VISIBLE_DEVICES=1 python serve.py",
    safe=False,
    needs=frozenset({"device"}),
    find=find,
    source="NVML's list of processes on this GPU; in a container it may be empty, or this process under the host's number",
)
