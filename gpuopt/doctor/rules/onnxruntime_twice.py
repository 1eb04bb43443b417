"""GPU608: two distributions of onnxruntime overwrite each other, or its CUDA is not torch's."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import packages
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """At most one finding: what is installed twice is reinstalled in the version that fits torch's CUDA."""
    here = packages.installed(evidence)
    gpu, cpu = here.get("onnxruntime-gpu"), here.get("onnxruntime")
    if not gpu:
        return
    cuda = packages.cuda_of_torch(here, evidence.environment)
    major = None if cuda is None else packages.release(cuda)[0]
    theirs = packages.cuda_of_onnxruntime(gpu)
    wanted = None if major is None else packages.onnxruntime_for(major)
    fits = major is None or theirs is None or theirs == major
    wanted = f"onnxruntime-gpu=={gpu}" if fits or wanted is None else wanted
    if cpu:
        yield Finding(
            code="",
            severity="error",
            message=f"onnxruntime {cpu} and onnxruntime-gpu {gpu} are both installed: they write the same files, and the one without CUDA may win",
            fix=f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install '{wanted}'",
            op="onnxruntime",
        )
    elif not fits:
        yield Finding(
            code="",
            severity="error",
            message=f"onnxruntime-gpu {gpu} is built for CUDA {theirs}, and torch {here.get('torch', '')} brings CUDA {cuda}: its CUDA provider does not load",
            fix=f"pip install '{wanted}'",
            op="onnxruntime-gpu",
        )


RULE = Rule(
    code="GPU608",
    name="onnxruntime-twice",
    what="ONNX Runtime is installed twice, or for another CUDA than torch.",
    why="Both wheels are the module onnxruntime: whichever was unpacked last wins, and without CUDA libraries of its major version the session runs on the CPU in silence.",
    before="pip install onnxruntime onnxruntime-gpu",
    after="pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
    safe=False,
    needs=frozenset({"packages"}),
    find=find,
    source="Requires-Dist of the wheels, in doctor/packages.toml",
)
