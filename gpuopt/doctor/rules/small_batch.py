"""GPU405: the batch is too small to keep the GPU's arithmetic busy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gpuopt.core.result import Finding
from gpuopt.doctor import weights, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule
from gpuopt.doctor.rules.weights_memory_bound import reads_weights

MIN_WEIGHTS = 0.5
"""Of the products' bytes: only what is read once a call, whatever the batch, is shared by more samples."""
MIN_SHARE = 0.3
"""Of the device time in products: else something other than they decides."""
FLAT = 1.15
"""Twice the batch at less than this gain in samples a second is no longer rising."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding, priced where larger batches were measured: the time of a call less what its samples take in the best of them. A larger batch makes no call shorter, it
    makes calls fewer. Silent where a measured curve is flat already, or GPU406 says it."""
    found = weights.products(evidence)
    if not evidence.on_gpu or found is None or found.intensity >= found.ridge or reads_weights(found):
        return
    if found.weight_bytes < MIN_WEIGHTS * found.bytes or found.share < MIN_SHARE:
        return
    best = _best(evidence.batch_curve, evidence.batch)
    if best is None and evidence.batch_curve and max(evidence.batch_curve) > evidence.batch:
        return
    # Bytes grow by what is not weights; FLOPs with the batch: where their ratio meets the ridge.
    rest = found.bytes - found.weight_bytes
    room = found.flops - found.ridge * rest
    wanted = (
        f"about {max(evidence.batch + 1, round(evidence.batch * found.ridge * found.weight_bytes / room))}"
        if room > 0
        else "as large as memory allows"
    )
    finding = Finding(
        code="",
        severity="info",
        message=f"at batch {evidence.batch} the products do {words.number(found.intensity, 'FLOP')} a byte where {words.digits(found.ridge)} would keep the {found.dtype} units busy: "
        f"{words.share(found.weight_bytes / found.bytes)} of their bytes are weights"
        + (f"; {_told(evidence.batch_curve, evidence.batch, best)}" if best else ""),
        fix=f"put requests together: compute binds from a batch of {wanted}; gpuopt bench --dim N={evidence.batch},{evidence.batch * 4},{evidence.batch * 16} shows the curve",
        op="aten::mm",
        bytes=found.weight_bytes,
        time_ms=found.time_ms if best is None else None,
    )
    if best is None:
        yield finding
        return
    now = evidence.batch_curve[evidence.batch]
    yield priced(finding, now - evidence.batch_curve[best] * evidence.batch / best, low=0.9, high=1.05, wall_ms=now)


def _best(curve: Mapping[int, float], batch: int) -> int | None:
    """The measured larger batch with the most samples a second; None where none gives `FLAT` times what this one gives."""
    if not curve.get(batch):
        return None
    gains = {n: _gain(curve, batch, n) for n, ms in curve.items() if n > batch and ms > 0}
    best = max(gains, key=lambda n: gains[n], default=None)
    return best if best is not None and gains[best] >= FLAT else None


def _gain(curve: Mapping[int, float], batch: int, larger: int) -> float:
    """Samples a second, relative."""
    return (larger / curve[larger]) / (batch / curve[batch])


def _told(curve: Mapping[int, float], batch: int, best: int) -> str:
    return f"measured, batch {best} takes {words.ms(curve[best])} where this one takes {words.ms(curve[batch])}: {_gain(curve, batch, best):.3g} times the samples a second"


RULE = Rule(
    code="GPU405",
    name="small-batch",
    what="With so few samples the products read more bytes of weights than their arithmetic can cover.",
    why="The time of a call is that of reading the weights and of launching: more samples would ride along almost free. The gain is that of the same samples in larger calls.",
    before="for x in requests:\n    y = model(x[None])",
    after="y = model(torch.stack(requests))",
    safe=False,
    needs=frozenset({"records", "device"}),
    find=find,
    source="Williams et al. 2009, the roofline; ceilings and times of larger batches measured on this machine",
)
