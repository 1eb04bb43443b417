"""Text with units <-> plain numbers: seconds, bytes, FLOPs, fractions. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from gpuopt.core.errors import UsageError

_NUMBER = re.compile(r"^\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\d\s].*?)?\s*$", re.ASCII)
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
_BYTES = {
    "B": 1,
    **{prefix + "B": 1000**power for power, prefix in enumerate("kMGTP", start=1)},
    **{prefix + "iB": 1024**power for power, prefix in enumerate("KMGTP", start=1)},
}
_FLOPS = {"": 1.0, **{prefix: 1000.0**power for power, prefix in enumerate("kMGTPE", start=1)}}


def parse_seconds(text: str, *, default: str = "s") -> float:
    """`10ms` -> 0.01. A bare number is in `default` units. Raises UsageError on a negative or unknown one."""
    return _parse(text, _SECONDS, default, "a time", "10ms, 1.5s, 2min")


def parse_bytes(text: str, *, total: int | None = None) -> int:
    """`8GiB` -> 8589934592, `8GB` -> 8000000000, `50%` of `total` where one is known. A bare number is bytes. Raises UsageError."""
    if text.strip().endswith("%") and total is not None:
        return int(parse_fraction(text) * total)
    return round(_parse(text, _BYTES, "B", "a size", "8GiB, 512MB" + (", 50%" if total is not None else "")))


def parse_flops(text: str) -> float:
    """`300TFLOP/s`, `300T`, `3e14` -> 3e14. Raises UsageError."""
    return _parse(re.sub(r"(?i)flops?(/s)?\s*$", "", text), _FLOPS, "", "a rate of FLOPs", "300TFLOP/s")


def parse_fraction(text: str) -> float:
    """`5%` -> 0.05, `0.05` -> 0.05. A bare number above 1 is refused: `5` could mean either. Raises UsageError."""
    value = _parse(text, {"%": 0.01, "": 1.0}, "", "a share", "5%, 0.05")
    if value > 1 and "%" not in text:
        raise UsageError(f"{text!r} could be {text}% or {text} times", fix=f"write {text.strip()}%")
    return value


def format_seconds(seconds: float) -> str:
    """0.01234 -> `12.34 ms`."""
    if abs(seconds) >= 120:
        return f"{_digits(seconds / 60)} min"
    return _scaled(seconds, {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9})


def format_bytes(num_bytes: float) -> str:
    """1610612736 -> `1.5 GiB`; memory is counted in powers of 1024."""
    return _scaled(num_bytes, {"PiB": 1024.0**5, "TiB": 1024.0**4, "GiB": 1024.0**3, "MiB": 1024.0**2, "KiB": 1024.0, "B": 1.0})


def format_bytes_per_s(rate: float) -> str:
    """4.8e12 -> `4.8 TB/s`; bandwidth is counted in powers of 1000, like data sheets."""
    return _scaled(rate, {"TB/s": 1e12, "GB/s": 1e9, "MB/s": 1e6, "kB/s": 1e3, "B/s": 1.0})


def format_flops(flops: float) -> str:
    """1.56e10 -> `15.6 GFLOP`."""
    return _scaled(flops, {"PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6, "kFLOP": 1e3, "FLOP": 1.0})


def format_flops_per_s(rate: float) -> str:
    """9.89e14 -> `989 TFLOP/s`. Stays in TFLOP/s from 1e12 on, so that columns compare."""
    return _scaled(rate, {"TFLOP/s": 1e12, "GFLOP/s": 1e9, "MFLOP/s": 1e6, "kFLOP/s": 1e3, "FLOP/s": 1.0})


def format_count(number: float) -> str:
    """44549160 -> `44.55 M`."""
    return _scaled(number, {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}).strip()


def format_fraction(share: float) -> str:
    """0.0512 -> `5.12%`."""
    return f"{_digits(share * 100)}%"


def _parse(text: str, units: Mapping[str, float], default: str, what: str, example: str) -> float:
    match = _NUMBER.match(text)
    wanted = (match[2] or default) if match else ""
    # Case decides between kilo spellings nobody means differently; a milli-byte does not exist, so folding is safe where no two units collide.
    folded = {name.lower(): scale for name, scale in units.items()}
    scale = units.get(wanted, folded.get(wanted.lower())) if match else None
    if match is None or scale is None:
        raise UsageError(f"{text!r} is not {what}", fix=f"write {what} as {example}")
    value = float(match[1]) * scale
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"{text!r} is not {what} from 0 up", fix=f"write {what} as {example}")
    return value


def _scaled(value: float, units: Mapping[str, float]) -> str:
    """The largest unit that leaves at least 1 in front of the point, after rounding; the smallest where none does."""
    fitting = (name for name, scale in units.items() if float(_digits(abs(value) / scale)) >= 1)
    name = next(fitting, list(units)[-1])
    return f"{_digits(value / units[name])} {name}".strip()


def _digits(value: float) -> str:
    """Four significant digits, no trailing zeros, no exponent within reason: 12.34, 1234, 0.00123."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    places = 3 - math.floor(math.log10(abs(value)))
    text = f"{round(value, places):.{max(0, min(places, 20))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
