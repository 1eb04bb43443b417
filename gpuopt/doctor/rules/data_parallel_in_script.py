"""GPU712: a script spreads its calls over GPUs with DataParallel."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a model; unpriced: what one GPU alone would take was not measured."""
    assert evidence.script is not None
    for model in evidence.script.modules:
        if not model.is_data_parallel:
            continue
        each = model.wall_s / model.num_calls if model.num_calls else 0.0
        yield Finding(
            code="",
            severity="warning",
            message=f"{model.name or 'a model'} ({model.module_class}) runs under DataParallel: {model.num_calls} calls"
            + (f" of {units.format_seconds(each)}" if each else ""),
            fix="one process a GPU (torchrun --nproc-per-node=N), each with its own model and its share of the inputs",
            module=model.name or None,
            line=model.line or None,
            op="torch.nn.DataParallel",
            count=model.num_calls,
        )


RULE = Rule(
    code="GPU712",
    name="data-parallel-in-script",
    what="The script runs its model under torch.nn.DataParallel.",
    why="In every call it copies all weights to every GPU, runs the replicas from threads that share one interpreter lock, and gathers on the first GPU: often slower than one.",
    before="model = nn.DataParallel(model).cuda()",
    after="# torchrun --nproc-per-node=4 infer.py\nmodel = model.to(f\"cuda:{os.environ['LOCAL_RANK']}\")",
    safe=False,
    needs=frozenset({"script"}),
    find=find,
    source="https://pytorch.org/docs/stable/generated/torch.nn.DataParallel.html recommends DistributedDataParallel",
    explains=frozenset({"GPU308"}),
)
