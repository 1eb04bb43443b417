"""GPU314: the model runs on the CPU of a machine with a GPU."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor import modules, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding, where the flags say that a GPU is there and it was the CPU that ran."""
    assert evidence.device is not None
    if evidence.device.kind != "cpu" or not evidence.flags.get("gpu_available"):
        return
    count = sum(h.tensor.numel() for h in modules.tensors(evidence.module) if h.kind == "parameter")
    took = f": {words.ms(evidence.wall_ms)} a call" if evidence.wall_ms else ""
    weights = f" with {units.format_count(count)} parameters" if count else ""
    yield Finding(
        code="",
        severity="warning",
        message=f"the model{weights} runs on the CPU though a GPU is there{took}",
        fix="model.to('cuda') and inputs likewise, or --device cuda; gpuopt bench MODEL --device cpu,cuda shows from which batch on it pays",
        module="" if evidence.module is not None else None,
        time_ms=evidence.wall_ms,
    )


RULE = Rule(
    code="GPU314",
    name="left-on-cpu",
    what="The model runs on the CPU of a machine that has a GPU.",
    why="Without .to('cuda') everything stays where it was made, and nothing says so: the GPU idles.",
    before="model = build().eval()\ny = model(x)",
    after="model = build().eval().to('cuda')\ny = model(x.to('cuda'))",
    safe=False,
    needs=frozenset({"device", "flags"}),
    find=find,
    source="torch.cuda.is_available()",
)
