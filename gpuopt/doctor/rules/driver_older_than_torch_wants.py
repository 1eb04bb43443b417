"""GPU606: the NVIDIA driver is older than the CUDA version torch is built for."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import packages
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """An error where torch cannot use the GPU; where it can (through the compatibility libraries of a data-centre GPU), a warning."""
    here = packages.installed(evidence)
    cuda = packages.cuda_of_torch(here, evidence.environment)
    driver = packages.driver_of(evidence.device)
    oldest = None if cuda is None else packages.oldest_driver(cuda)
    if driver is None or cuda is None or oldest is None or packages.release(driver) >= (oldest,):
        return
    fitting = [
        major for major in (13, 12, 11) if (needed := packages.oldest_driver(f"{major}.0")) and packages.release(driver) >= (needed,)
    ]
    other = f", or install a torch built for CUDA {fitting[0]} (pytorch.org/get-started/locally)" if fitting else ""
    yield Finding(
        code="",
        severity="warning" if evidence.on_gpu else "error",
        message=f"the NVIDIA driver is {driver}, and torch {here.get('torch', '')} is built for CUDA {cuda}, which needs {oldest} or later"
        + ("; it runs here through compatibility libraries" if evidence.on_gpu else ""),
        fix=f"update the NVIDIA driver to {oldest} or later{other}",
        op="torch",
    )


RULE = Rule(
    code="GPU606",
    name="driver-older-than-torch-wants",
    what="The NVIDIA driver is older than this torch needs.",
    why="torch.cuda.is_available() is then False and everything runs on the CPU, or fails at the first kernel.",
    before="driver 535, torch 2.11.0 (CUDA 13.0)",
    after="driver 580, torch 2.11.0 (CUDA 13.0)",
    safe=False,
    needs=frozenset({"device"}),
    find=find,
    source="CUDA Compatibility, table 1 (docs.nvidia.com/deploy/cuda-compatibility), in doctor/packages.toml",
)
