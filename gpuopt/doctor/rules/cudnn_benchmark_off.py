"""GPU409: cuDNN picks its convolution algorithms by rule of thumb."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import modules, recast, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

WORTH = 0.10
"""Share of the device time in convolutions below which their choice does not matter."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding where the switch is off and convolutions matter; not priced, because only trying them tells."""
    if not evidence.on_gpu or evidence.flags.get("cudnn_benchmark") is not False or evidence.backend not in (*modules.EAGER, "inductor"):
        return
    rows = [r for r in evidence.records if recast.is_convolution(r) and r.time_ns]
    taken, busy = recast.total_ms(rows), recast.total_ms(evidence.records)
    layers = [n for n, part in modules.parts(evidence.module).items() if modules.is_a(part, "_ConvNd")]
    if not layers or (evidence.records and taken < WORTH * busy):
        return
    share = f": {words.ms(taken)} of {words.ms(busy)} on the device" if rows else ""
    yield Finding(
        code="",
        severity="info",
        message=f"cudnn.benchmark is off: the algorithms of {words.number(len(layers), 'convolution')} are chosen without trying them out{share}",
        fix="torch.backends.cudnn.benchmark = True before the first call, where shapes are fixed: each new shape is tried out once",
        module=rows[0].module if rows else layers[0],
        count=len(layers),
        time_ms=taken if rows else None,
    )


RULE = Rule(
    code="GPU409",
    name="cudnn-benchmark-off",
    what="Convolutions run with cudnn.benchmark off.",
    why="cuDNN has several algorithms for a convolution; its heuristics choose one by shape, a trial run chooses the fastest on this GPU. With fixed shapes the trial is paid once.",
    before="y = model(x)  # torch.backends.cudnn.benchmark is False by default",
    after="torch.backends.cudnn.benchmark = True\ny = model(x)",
    safe=True,
    needs=frozenset({"module", "device", "flags"}),
    find=find,
    source="PyTorch performance tuning guide: enable cuDNN auto-tuner",
)
