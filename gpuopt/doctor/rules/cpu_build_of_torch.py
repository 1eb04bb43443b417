"""GPU609: this torch has no CUDA, and the machine has an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import packages
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

FAMILY = ("torch", "torchvision", "torchaudio")


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding with the command for torch and whatever of its family has the same tag."""
    here = packages.installed(evidence)
    if not packages.is_cpu_build(here, evidence.environment) or not packages.has_unused_gpu(evidence.device):
        return
    names = [name for name in FAMILY if name == "torch" or here.get(name, "").endswith("+cpu")]
    wanted = " ".join(f"{name}=={here[name].partition('+')[0]}" for name in names)
    driver, cuda = packages.driver_of(evidence.device), packages.table()["torch"].get(packages.minor(here["torch"]))
    oldest = None if cuda is None else packages.oldest_driver(cuda)
    too_old = driver is not None and oldest is not None and packages.release(driver) < (oldest,)
    yield Finding(
        code="",
        severity="error",
        message=f"torch {here['torch']} is built without CUDA, and this machine has an NVIDIA GPU"
        + (f" (driver {driver})" if driver else "")
        + ": everything runs on the CPU",
        # Uninstalled first: to pip 2.13.0+cpu already is 2.13.0.
        fix=f"pip uninstall -y {' '.join(names)} && pip install {wanted}"
        + (f", after an update of the driver to {oldest}: that wheel is for CUDA {cuda}" if too_old else ""),
        op="torch",
    )


RULE = Rule(
    code="GPU609",
    name="cpu-build-of-torch",
    what="The installed torch cannot use the GPU of this machine.",
    why="A wheel tagged +cpu holds no CUDA code at all: no setting makes it use the GPU.",
    before="torch 2.13.0+cpu",
    after="pip uninstall -y torch && pip install torch==2.13.0",
    safe=False,
    needs=frozenset({"packages", "device"}),
    find=find,
    source="torch.version.cuda, the driver's own answer",
)
