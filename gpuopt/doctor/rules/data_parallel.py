"""GPU308: nn.DataParallel."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor import modules
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a wrapper in the module tree."""
    for name, part in modules.parts(evidence.module).items():
        if not modules.is_a(part, "DataParallel"):
            continue
        num_gpus = len(part.device_ids or ())
        size = sum(t.numel() * t.element_size() for t in (*part.parameters(), *part.buffers()) if not modules.is_lazy(t))
        over = f"over {num_gpus} GPUs" if num_gpus else "without a GPU"
        copied = f": {units.format_bytes(float(size))} of weights are copied to each of the others in every call" if num_gpus > 1 else ""
        yield Finding(
            code="",
            severity="warning",
            message=f"{name or 'the model'} is wrapped in nn.DataParallel {over}{copied}",
            fix="use model.module, one process a GPU (torchrun), each with its own share of the requests",
            module=name or None,  # the whole of it
            bytes=float(size * max(0, num_gpus - 1)) or None,
            count=num_gpus or None,
        )


RULE = Rule(
    code="GPU308",
    name="data-parallel",
    what="The model is wrapped in nn.DataParallel.",
    why="Every call copies all weights from the first GPU to the others, splits the batch, runs the replicas from threads of one process that share Python's lock, and gathers the "
    "outputs on the first GPU: more GPUs may be slower than one.",
    before="model = nn.DataParallel(model).cuda()\ny = model(x)",
    after="# torchrun --nproc-per-node 4 infer.py\nmodel = model.to(f'cuda:{os.environ[\"LOCAL_RANK\"]}')\ny = model(x_of_this_rank)",
    safe=False,
    needs=frozenset({"module"}),
    find=find,
    source="PyTorch documentation of nn.DataParallel: it is recommended to use DistributedDataParallel instead",
)
