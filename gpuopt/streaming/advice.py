"""A plan -> when streaming is the wrong tool, and what would be the right one, in sentences with numbers."""

from __future__ import annotations

import math
import re

from gpuopt.core.streaming import Plan
from gpuopt.core.units import format_bytes, format_count, format_seconds

LINK_BOUND = 3.0
"""S/B over C from which the link, not the schedule, is what a forward costs."""

_FLOAT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_SCALES = 1.03
"""Of int4: a 16-bit scale for every 128 weights."""
_FORMATS = (("fp8", 1.0), ("int4", 0.5 * _SCALES))
_MANY_TOKENS = 256
"""From here on a forward's time is taken to grow with its tokens; below, reading the weights is what it costs."""
_STALL = 0.02
HOST_BOUND = 1.5
"""What queueing a forward takes of the host, over what running it takes of the device, from which it is worth a sentence."""


def advise(plan: Plan) -> tuple[str, ...]:
    """Sentences, the most important first; none where streaming does what it should. The model's exactness is never traded without saying so."""
    if not plan.binding:
        return (f"everything fits: {format_bytes(plan.ledger.total)} of {format_bytes(plan.budget_bytes)}, nothing is streamed",)
    said = []
    if not plan.compute_ms:
        said.append(
            "no unit's compute was measured: the prediction is the link's time alone, and residents are spread for no compute to hide behind"
        )
    if plan.link_ms > LINK_BOUND * plan.compute_ms > 0:
        said.append(_link_bound(plan))
    if plan.link_ms > plan.compute_ms:
        said += [sentence for sentence in (_quantised(plan), _devices(plan), _balance(plan)) if sentence]
    elif plan.stall_ms <= _STALL * plan.compute_ms:
        said.append(
            f"copies hide behind compute: {_ms(plan.stall_ms)} of {_ms(plan.predicted_ms)} waits for them, so a larger budget gains nothing"
        )
    said += _launching(plan)
    said += _slow_homes(plan)
    return tuple(said)


def _launching(plan: Plan) -> list[str]:
    host, device = (sum(times.values()) for times in (plan.calibration.host_ms, plan.calibration.compute_ms))
    if host <= HOST_BOUND * device or plan.link_ms > plan.compute_ms:
        return []
    return [
        f"C is the host's: to queue a forward takes {_ms(host)}, to compute it {_ms(device)}; --compile, or more tokens a forward, shorten or fill that"
    ]


def _link_bound(plan: Plan) -> str:
    tokens = tokens_in_flight(plan.calibration.workload)
    rate = f", {format_count(1e3 * tokens / plan.predicted_ms)} tokens/s" if tokens else ""
    return (
        f"bound by the link: {format_bytes(plan.streamed_bytes)} a forward take {_ms(plan.link_ms)}, {plan.link_ms / plan.compute_ms:.1f} times the compute "
        f"of {_ms(plan.compute_ms)}; no schedule is faster than {_ms(plan.bound_ms)}{rate}, only fewer streamed bytes or more tokens a forward help"
    )


def _balance(plan: Plan) -> str:
    """Tokens a forward at which compute takes as long as the link."""
    tokens = tokens_in_flight(plan.calibration.workload)
    flops = plan.calibration.flops_per_s
    if tokens and tokens >= _MANY_TOKENS and plan.compute_ms:
        wanted = tokens * plan.link_ms / plan.compute_ms
        basis = "compute taken to grow with them"
    elif flops:
        # A weight multiplies and adds once a token; those always resident work too, but whether they are products, an anatomy does not say.
        wanted = flops * plan.link_ms / 1e3 / (2 * _elements(plan))
        basis = f"at {flops / 1e12:.4g} TFLOP/s, two FLOPs a weight and token"
    else:
        return ""
    now = f", now {format_count(tokens)}" if tokens else ""
    return f"about {format_count(math.ceil(wanted))} tokens a forward (batch times length{now}) would balance compute and link: {basis}"


def _quantised(plan: Plan) -> str:
    """The first format in which all units fit, else what the smallest does to the link's time."""
    spared = plan.ledger.total - plan.ledger.residents - plan.ledger.slots - plan.ledger.reserve
    held = sum(unit.num_bytes for unit in plan.anatomy.units)
    for name, each in _FORMATS:
        size = _bytes_at(plan, each)
        total = (spared + size) * 1.05
        if size < held and total <= plan.budget_bytes:
            return f"in {name} the blocks would take {format_bytes(size)} instead of {format_bytes(held)} and everything would fit; the outputs would not be the same bits"
    name, each = _FORMATS[-1]
    size = _bytes_at(plan, each)
    if size >= held:
        return ""
    return f"even in {name} the blocks take {format_bytes(size)} and do not fit; in fp8 they would be {format_bytes(_bytes_at(plan, 1.0))} instead of {format_bytes(held)}, and each copy as much shorter"


def _devices(plan: Plan) -> str:
    """Devices of this budget that hold everything between them."""
    ledger = plan.ledger
    each = plan.budget_bytes / 1.05 - ledger.activations - ledger.cache - ledger.context
    whole = ledger.fixed + sum(unit.num_bytes for unit in plan.anatomy.units)
    if each <= 0:
        return ""
    count = math.ceil(whole / each)
    if count < 2 or count > 8:
        return ""
    return f"{count} devices with this budget each would hold all {format_bytes(whole)} of weights, and nothing would be streamed"


def _slow_homes(plan: Plan) -> list[str]:
    said = []
    homes = list(plan.homes.values())
    for home, word in (("pageable", "in memory that is not locked"), ("disk", "on the disk")):
        count = homes.count(home)
        if count:
            rate = plan.calibration.pageable_bytes_per_s if home == "pageable" else plan.calibration.disk_bytes_per_s
            at = f"{rate / 1e9:.3g} GB/s" if rate else "a rate that was not measured"
            said.append(
                f"{count} of {len(homes)} streamed units wait {word}, at {at} against the link's {plan.calibration.link_bytes_per_s / 1e9:.3g}: a higher --pin-limit helps"
            )
    return said


def tokens_in_flight(workload: str) -> int | None:
    """`decode N=2 S=1 past=512` -> 2; None where it names no batch."""
    named = dict(re.findall(r"\b([NS])=(\d+)", workload))
    return int(named["N"]) * int(named.get("S", 1)) if "N" in named else None


def _elements(plan: Plan) -> float:
    return sum(place.num_bytes / _itemsize(place.dtype) for unit in plan.anatomy.units for place in unit.places)


def _bytes_at(plan: Plan, each: float) -> int:
    """Of all units with their floats of 16 bits and more at `each` bytes."""
    places = [place for unit in plan.anatomy.units for place in unit.places]
    return round(sum(p.num_bytes * each / _FLOAT_BYTES[p.dtype] if p.dtype in _FLOAT_BYTES else p.num_bytes for p in places))


def _itemsize(dtype: str) -> float:
    digits = re.search(r"(\d+)", dtype)
    return _FLOAT_BYTES.get(dtype) or (max(1, int(digits[1]) // 8) if digits else 1)


def _ms(value: float) -> str:
    return format_seconds(value / 1e3)
