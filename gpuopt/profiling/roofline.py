"""Records x Ceilings -> how close each is to what the device can do, and what bounds it. Pure.

floor = max(FLOPs / peak of the dtype, bytes / bandwidth); percent of ceiling = floor / time. Nothing can beat a true ceiling, so a figure above one is an error of ours
(a wrong count, a wrong peak, a clock that was not synchronised) and is raised, not printed. Two honest reasons lift a point above a *bandwidth*: its data were in the cache,
or were so in part. One lifts a convolution above a *peak*: Winograd's and the FFT's algorithms multiply less often than the direct one that is counted. They are named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gpuopt.core.result import CEILING_OF_DTYPE, Ceilings, Count, OpRecord, RooflinePoint, Useful

SLACK = 0.05
"""A measured ceiling is a median of its own: another run may beat it by this much (clocks, heat) before the figure is refused."""
OP_SLACK = 0.10
"""The same for a single op of a trace: it runs after a pause, at clocks that a product of 8192 cubed does not keep (105% of it has been seen on an H200)."""
NOTED = 0.02
"""Above the measured ceiling by more than this, a point carries the reason."""

WINOGRAD = 4.0
"""Multiplications of a direct 3x3 convolution over those of Winograd's F(4x4, 3x3), the largest tile libraries use (Lavin and Gray 2016: 144 against 36)."""
_FAST_KERNEL = re.compile(r"(?i)winograd|fft")

RARE = 0.01
"""Share of the FLOPs under which a dtype need not have a sustained ceiling of its own."""


class ImpossibleFigure(RuntimeError):
    """A figure above what the device can do: an error of gpuopt's, not the user's. The message holds the count, the time and the peak used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """A whole forward against the ceilings."""

    tflops: float | None
    """10^12 FLOP/s of known FLOPs; None where none are known."""
    pct_of_measured: float | None
    """Time the FLOPs would take at each dtype's measured peak, over the time taken, in percent; None where a dtype has no ceiling."""
    pct_of_sustained: float | None
    """The same against what products kept up between the blocks of the bench."""
    pct_of_spec: float | None
    pct_of_roofline: float | None
    """Floor of every op (compute or memory, unfused) over the time taken."""
    ceiling_note: str = ""
    tflops_useful: float | None = None
    """Without padding and the masked half of causal attention; None where nothing says what they are."""


def floor_ns(record: OpRecord, ceilings: Ceilings, kind: str = "measured") -> tuple[float | None, str, str]:
    """(floor in ns or None, `compute` | `memory` | `unknown`, ceiling as printed). Falls back to the other kind where a row is missing, and says so."""
    compute, compute_name = _compute_floor(record, ceilings, kind)
    memory, memory_name = _memory_floor(record, ceilings, kind)
    if record.flops is None:
        return None, "unknown", ""
    if record.flops > 0 and compute is None:
        return None, "unknown", ""
    if compute is not None and (memory is None or compute >= memory) and record.flops > 0:
        return compute, "compute", compute_name
    if memory is not None:
        return memory, "memory", memory_name
    return None, "memory" if record.flops == 0 else "unknown", ""


def _compute_floor(record: OpRecord, ceilings: Ceilings, kind: str) -> tuple[float | None, str]:
    if not record.flops:
        return (0.0, "") if record.flops == 0 else (None, "")
    for wanted in (kind, "spec" if kind == "measured" else "measured"):
        peak = ceilings.flops(record.dtype, wanted)
        if peak:
            return record.flops / peak * 1e9, f"{CEILING_OF_DTYPE.get(record.dtype or '', record.dtype)} {wanted}"
    return None, ""


def _memory_floor(record: OpRecord, ceilings: Ceilings, kind: str) -> tuple[float | None, str]:
    if record.bytes is None:
        return None, ""
    quantity = link_of(record) or "memory"
    for wanted in (kind, "spec" if kind == "measured" else "measured"):
        bandwidth = ceilings.bandwidth(wanted, quantity)
        if bandwidth:
            return record.bytes / bandwidth * 1e9, f"{quantity} {wanted}"
    return None, ""


def link_of(record: OpRecord) -> str | None:
    """`h2d` or `d2h` for a row of copies across the link, else None."""
    for link in ("h2d", "d2h"):
        if record.op.startswith(f"memcpy {link}"):
            return link
    return None


def points(
    records: Iterable[OpRecord], ceilings: Ceilings, *, cache_bytes: int | None, kind: str = "measured", slack: float = SLACK
) -> tuple[RooflinePoint, ...]:
    """One point a record, in the records' order.

    Parameters
    ----------
    cache_bytes: last-level cache. An op may find that much of what it reads there, left by the op before it; None is unknown, and then no bandwidth is refused.
    kind: the ceiling percents are against; the other kind where it has no row.
    slack: by how much a measured ceiling may be beaten before the figure is refused; a shared CPU needs more than a GPU of one's own.

    Raises
    ------
    ImpossibleFigure: above a data-sheet peak, or above a measured one by more than `slack`, with no cache to explain it.
    """
    return tuple(_point(record, ceilings, cache_bytes, kind, slack) for record in records)


def _point(record: OpRecord, ceilings: Ceilings, cache_bytes: int | None, kind: str, slack: float) -> RooflinePoint:
    floor, bound, ceiling = floor_ns(record, ceilings, kind)
    pct = 100.0 * floor / record.time_ns if floor is not None and record.time_ns else None
    note = _check(record, ceilings, cache_bytes, slack) if record.time_ns else ""
    return RooflinePoint(
        name=record.op,
        module=record.module,
        dtype=record.dtype,
        count=record.count,
        time_ns=record.time_ns,
        flops=record.flops,
        bytes=record.bytes,
        intensity=record.flops / record.bytes if record.flops is not None and record.bytes else None,
        bound=bound,
        pct_of_ceiling=pct,
        ceiling=ceiling,
        floor_ns=floor,
        note=note,
        line=record.line,
        kernels=record.kernel_times,
    )


def _check(record: OpRecord, ceilings: Ceilings, cache_bytes: int | None, slack: float) -> str:
    """ "" , or why the record may lie above a measured ceiling. Raises where nothing explains it."""
    assert record.time_ns is not None
    where = f"{record.op} in {record.module or 'the root'} ({record.count} calls, {record.shapes or 'shapes unknown'})"
    notes = []
    if record.flops:
        fast = any(_FAST_KERNEL.search(name) for name in record.kernels)
        for kind, allowed in (("spec", 0.0), ("measured", max(slack, OP_SLACK))):
            peak = ceilings.flops(record.dtype, kind)
            if not peak:
                continue
            excess = record.flops / peak * 1e9 / record.time_ns - 1.0
            if fast and allowed < excess <= WINOGRAD * (1.0 + allowed) - 1.0:
                notes.append(
                    f"a Winograd or FFT convolution: up to {WINOGRAD:.0f} times fewer multiplications than the direct one that is counted"
                )
                continue
            if excess > allowed:
                raise ImpossibleFigure(
                    f"{where}: {_rate(record.flops, record.time_ns)} is {100 * (1 + excess):.0f}% of the {kind} {record.dtype} peak of {peak / 1e12:.4g} TFLOP/s; "
                    f"counted {record.flops:.6g} FLOPs in {record.time_ns:.6g} ns: the count, the peak or the clock is wrong"
                    + ("; measure the ceilings again if the machine was busy then" if kind == "measured" else "")
                )
            if kind == "measured" and excess > NOTED:
                notes.append(f"above the measured {record.dtype} peak within the {100 * allowed:.0f}% that clocks allow a single op")
    quantity = link_of(record) or "memory"
    if record.bytes:
        a_call = record.bytes / record.count
        for kind, allowed in (("spec", 0.0), ("measured", slack)):
            bandwidth = ceilings.bandwidth(kind, quantity)
            if not bandwidth:
                continue
            excess = record.bytes / bandwidth * 1e9 / record.time_ns - 1.0
            if excess <= (allowed if kind == "spec" else NOTED):
                continue
            if quantity == "memory" and cache_bytes is None:
                notes.append("above the memory bandwidth: the cache's size is unknown")
                continue
            cached = min(a_call, float(cache_bytes or 0)) if quantity == "memory" else 0.0
            uncached = (a_call - cached) * record.count
            if cached and uncached / bandwidth * 1e9 <= record.time_ns * (1.0 + allowed):
                fits = a_call <= cached
                size = f"{a_call / 1e6:.3g} MB a call"
                notes.append(
                    f"working set of {size} fits the cache of {(cache_bytes or 0) / 1e6:.3g} MB"
                    if fits
                    else f"part of its {size} was in the cache of {(cache_bytes or 0) / 1e6:.3g} MB"
                )
                continue
            if excess > allowed:
                raise ImpossibleFigure(
                    f"{where}: {record.bytes / record.time_ns:.6g} GB/s is {100 * (1 + excess):.0f}% of the {kind} {quantity} bandwidth of {bandwidth / 1e9:.4g} GB/s; "
                    f"counted {record.bytes:.6g} bytes in {record.time_ns:.6g} ns, {a_call / 1e6:.3g} MB a call against a cache of {(cache_bytes or 0) / 1e6:.3g} MB: "
                    "the count, the bandwidth or the clock is wrong"
                )
            notes.append(f"above the measured {quantity} bandwidth within its {100 * slack:.0f}% run-to-run slack")
    return "; ".join(dict.fromkeys(notes))


def _rate(flops: float, time_ns: float) -> str:
    return f"{flops / time_ns / 1e3:.4g} TFLOP/s"


def whole(count: Count, seconds: float, ceilings: Ceilings, *, slack: float = SLACK, useful: Useful | None = None) -> Throughput:
    """A whole forward of `count` in `seconds`. Mixed precision is weighed by dtype: percent = Σ FLOPs_d / peak_d over the time.

    Parameters
    ----------
    useful: what of the FLOPs is not padding, where a mask says so: a program that skips padding cannot have done the others, and a refusal then names that.

    Raises
    ------
    ImpossibleFigure: above the data-sheet peak; or above the measured one by more than `slack`.
    """
    if seconds <= 0:
        raise ImpossibleFigure(f"a forward of {count.flops:.6g} FLOPs in {seconds} s: the clock is wrong")
    has_flops = bool(count.flops_by_dtype)
    notes = []
    percents: dict[str, float | None] = {}
    for kind, allowed in (("spec", 0.0), ("measured", slack)):
        peaks = {dtype: ceilings.flops(dtype, kind) for dtype in count.flops_by_dtype}
        missing = sorted(d for d, p in peaks.items() if not p)
        if missing or not has_flops:
            # A part of the sum is still a lower bound: enough to refuse, never enough to print.
            if missing and len(missing) < len(peaks):
                notes.append(f"no {kind} peak for {', '.join(missing)}")
            percents[kind] = None
        busy = sum(flops / peak for dtype, flops in count.flops_by_dtype.items() if (peak := peaks[dtype]))
        share = busy / seconds
        if share > 1.0 + allowed and (spared := _spared_by_winograd(count)) and (fp32 := peaks.get("float32")):
            if (busy - spared / fp32) / seconds <= 1.0 + allowed:
                notes.append("above the peak: its 3x3 convolutions can be done with fewer multiplications (Winograd) than are counted")
                percents.setdefault(kind, 100.0 * share)
                continue
        if share > 1.0 + allowed:
            used = ", ".join(f"{d} {p / 1e12:.4g} TFLOP/s" for d, p in peaks.items() if p)
            raise ImpossibleFigure(
                f"{count.flops / seconds / 1e12:.4g} TFLOP/s is {100 * share:.0f}% of the {kind} peak ({used}); "
                f"counted {count.flops:.6g} FLOPs in {seconds:.6g} s: {_culprit(count, seconds, useful, peaks)}"
                + ("; measure the ceilings again if the machine was busy then" if kind == "measured" else "")
            )
        if kind not in percents:
            percents[kind] = 100.0 * share
        if kind == "measured" and share > 1.0:
            notes.append(f"above the measured peak within its {100 * slack:.0f}% run-to-run slack")
    if useful is not None and useful.flops_padding:
        notes.append("; ".join(useful.reasons[:1]))
    sustained = _share_of_sustained(count, seconds, ceilings)
    if sustained is not None and sustained > 1.0:
        notes.append("faster than products kept up between its blocks: it draws less power than they do")
    floors = [floor_ns(r, ceilings)[0] for r in count.records]
    roof = 100.0 * sum(f for f in floors if f) / 1e9 / seconds if any(floors) else None
    if roof is not None and roof > 100.0:
        notes.append("faster than its ops one by one: fusion or the cache saves traffic the unfused floor counts")
    if count.unknown_ops:
        notes.append(f"without {', '.join(count.unknown_ops[:3])}: no formula")
    return Throughput(
        tflops=count.flops / seconds / 1e12 if has_flops else None,
        pct_of_measured=percents["measured"],
        pct_of_sustained=None if sustained is None else 100.0 * sustained,
        pct_of_spec=percents["spec"],
        pct_of_roofline=roof,
        ceiling_note="; ".join(dict.fromkeys(notes)),
        tflops_useful=useful.flops_useful / seconds / 1e12 if useful is not None and has_flops else None,
    )


def _spared_by_winograd(count: Count) -> float:
    """FLOPs that Winograd's algorithm may leave out: those of plain fp32 3x3 convolutions. Where they go through tensor cores, libraries multiply directly."""
    convolutions = (r for r in count.records if r.flops and r.dtype == "float32" and "conv" in r.op)
    return sum(
        (1.0 - 1.0 / WINOGRAD) * (r.flops or 0.0) for r in convolutions if any(s.endswith("x3x3") for s in r.shapes.split(", ")[1:2])
    )


def _culprit(count: Count, seconds: float, useful: Useful | None, peaks: Mapping[str, float | None]) -> str:
    """What is wrong with an impossible figure: padding, where that alone explains it."""
    if useful is None or not useful.flops_padding:
        return "the count (padding? sparsity?), the peak or the clock is wrong"
    # Causal attention may well run in full: only the padding is taken off.
    left = max(0.0, count.flops - useful.flops_padding)
    scale = left / count.flops if count.flops else 0.0
    share = scale * sum(flops / peak for dtype, flops in count.flops_by_dtype.items() if (peak := peaks[dtype])) / seconds
    said = f"padding counted as work ({useful.reasons[0]}); without it {left:.6g} FLOPs are {100 * share:.0f}% of the peak"
    return said if share <= 1.0 else f"{said}, still too many: the peak or the clock is wrong as well"


def _share_of_sustained(count: Count, seconds: float, ceilings: Ceilings) -> float | None:
    """Σ FLOPs_d / sustained_d over the time. No limit: unlike the measured peak, what a product sustains depends on the power it draws.

    A dtype with under a hundredth of the FLOPs may stand against its measured peak; None where one that matters was not timed.
    """
    busy = 0.0
    for dtype, flops in count.flops_by_dtype.items():
        peak = ceilings.flops(dtype, "sustained")
        if peak is None and flops < RARE * count.flops:
            peak = ceilings.flops(dtype, "measured")
        if not peak:
            return None
        busy += flops / peak
    return busy / seconds if busy and any(ceilings.flops(d, "sustained") for d in count.flops_by_dtype) else None
