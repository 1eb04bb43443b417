"""GPU607: torch, torch-tensorrt, TensorRT and CUDA do not belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gpuopt.core.result import Finding
from gpuopt.doctor import packages
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: the first thing that does not fit decides the command, which sets all three."""
    here = packages.installed(evidence)
    version, torch = here.get("torch-tensorrt"), here.get("torch")
    if not version or not torch:
        return
    row = packages.torch_tensorrt(version)
    cuda = packages.cuda_of_torch(here, evidence.environment)
    problem = _problem(here, version, torch, row, cuda)
    if problem is None:
        return
    # Keep torch where a torch-tensorrt for it exists; else go to the newest set there is.
    target = packages.torch_tensorrt(torch) or packages.newest_torch_tensorrt()
    if cuda is not None and packages.release(cuda)[0] != target["cuda"]:
        problem += f"; the wheels of torch-tensorrt are for CUDA {target['cuda']}"
    yield Finding(code="", severity="error", message=problem, fix=f"pip install {_set(target)}", op="torch-tensorrt")


def _problem(here: Mapping[str, str], version: str, torch: str, row: dict[str, Any] | None, cuda: str | None) -> str | None:
    if packages.minor(version) != packages.minor(torch):
        return f"torch-tensorrt {version} is built for torch {packages.minor(version)}, and torch is {torch}"
    tag, theirs = version.partition("+")[2], torch.partition("+")[2]
    if tag.startswith("cu") and theirs.startswith("cu") and tag[:4] != theirs[:4]:
        return f"torch-tensorrt {version} and torch {torch} are built for different CUDA versions"
    if row is None:
        return None
    if not tag and cuda is not None and packages.release(cuda)[0] != row["cuda"]:
        return f"torch-tensorrt {version} is built for CUDA {row['cuda']}, and torch {torch} for CUDA {cuda}"
    for name in packages.TENSORRT:
        found = here.get(name)
        if found and not packages.within(found, row["tensorrt"]):
            return f"torch-tensorrt {version} takes TensorRT {row['tensorrt']}, and {name} is {found}"
    if "tensorrt-cu12" in here and "tensorrt-cu13" not in here and row["cuda"] == 13 and not tag:
        return f"torch-tensorrt {version} takes TensorRT for CUDA 13, and tensorrt-cu12 {here['tensorrt-cu12']} is installed"
    return None


def _set(row: dict[str, Any]) -> str:
    return f"'torch=={row['torch']}.*' 'torch-tensorrt=={row['torch']}.*' '{row['package']}{row['tensorrt']}'"


RULE = Rule(
    code="GPU607",
    name="torch-tensorrt-mismatch",
    what="The installed torch, torch-tensorrt and TensorRT are not a set.",
    why="torch-tensorrt links against one minor version of torch and one of TensorRT: with any other it fails to import, or crashes in the first engine.",
    before="pip install torch torch-tensorrt tensorrt",
    after="pip install 'torch==2.14.*' 'torch-tensorrt==2.14.*' 'tensorrt-cu13>=11.1,<11.2'",
    safe=False,
    needs=frozenset({"packages"}),
    find=find,
    source="Requires-Dist of the wheels, in doctor/packages.toml",
)
