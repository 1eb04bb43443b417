"""GPU405: the batch is too small to keep the GPU's arithmetic busy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gpuopt.core.result import Finding
from gpuopt.doctor import weights, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule
from gpuopt.doctor.rules.weights_memory_bound import reads_weights

MIN_WEIGHTS = 0.5
"""Of the products' bytes: only what is read once a call, whatever the batch, is shared by more samples."""
MIN_SHARE = 0.3
"""Of the device time in products: else something other than they decides."""
FLAT = 1.15
"""Twice the batch at less than this gain in samples a second is no longer rising."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding, not priced: a larger batch makes no call shorter, it makes calls fewer. Silent where a measured curve is flat already, or GPU406 says it."""
    found = weights.products(evidence)
    if not evidence.on_gpu or found is None or found.intensity >= found.ridge or reads_weights(found):
        return
    if found.weight_bytes < MIN_WEIGHTS * found.bytes or found.share < MIN_SHARE:
        return
    measured = _curve(evidence.batch_curve, evidence.batch)
    if measured is None and evidence.batch_curve and max(evidence.batch_curve) > evidence.batch:
        return
    # Bytes grow by what is not weights; FLOPs with the batch: where their ratio meets the ridge.
    rest = found.bytes - found.weight_bytes
    room = found.flops - found.ridge * rest
    wanted = (
        f"about {max(evidence.batch + 1, round(evidence.batch * found.ridge * found.weight_bytes / room))}"
        if room > 0
        else "as large as memory allows"
    )
    yield Finding(
        code="",
        severity="info",
        message=f"at batch {evidence.batch} the products do {words.number(found.intensity, 'FLOP')} a byte where {words.digits(found.ridge)} would keep the {found.dtype} units busy: "
        f"{words.share(found.weight_bytes / found.bytes)} of their bytes are weights" + (f"; {measured}" if measured else ""),
        fix=f"put requests together: compute binds from a batch of {wanted}; gpuopt bench --dim N={evidence.batch},{evidence.batch * 4},{evidence.batch * 16} shows the curve",
        op="aten::mm",
        bytes=found.weight_bytes,
        time_ms=found.time_ms,
    )


def _curve(curve: Mapping[int, float], batch: int) -> str | None:
    """What a larger measured batch gives; None where none gives more samples a second."""
    now = curve.get(batch)
    if not now:
        return None
    gains = {n: (n / ms) / (batch / now) for n, ms in curve.items() if n > batch and ms > 0}
    best = max(gains, key=lambda n: gains[n], default=None)
    if best is None or gains[best] < FLAT:
        return None
    return f"batch {best} takes {words.ms(curve[best])}, {gains[best]:.3g} times the samples a second"


RULE = Rule(
    code="GPU405",
    name="small-batch",
    what="With so few samples the products read more bytes of weights than their arithmetic can cover.",
    why="The time of a call is that of reading the weights and of launching: more samples would ride along almost free.",
    before="for x in requests:\n    y = model(x[None])",
    after="y = model(torch.stack(requests))",
    safe=False,
    needs=frozenset({"records", "device"}),
    find=find,
    source="Williams et al. 2009, the roofline; ceilings measured on this machine",
)
