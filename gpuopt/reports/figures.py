"""Numbers with units -> short text for people; what is missing is a dash. Pure."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable

MISSING = "—"

_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BINARY = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def clean(text: object, limit: int = 400) -> str:
    """Text from a model, a file or a child -> one printable line: no control codes, no escape sequences, no bidirectional overrides."""
    line = _UNPRINTABLE.sub(lambda m: " " if m[0] in "\n\r\t" else "\N{REPLACEMENT CHARACTER}", str(text))
    line = unicodedata.normalize("NFC", " ".join(line.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def digits(value: float, significant: int = 3) -> str:
    """12345 -> `12345`, 12.345 -> `12.3`, 0.12345 -> `0.123`: three digits that mean something, never an exponent."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    rounded = round(value, significant - 1 - magnitude)
    if rounded:  # 9.996 rounds up into the next decade
        magnitude = math.floor(math.log10(abs(rounded)))
    return f"{rounded:.{max(0, significant - 1 - magnitude)}f}"


def ms(value: float | None) -> str:
    """Milliseconds -> `12.9 ms`, `850 µs`, `2.10 s`, `3 min 20 s`."""
    if value is None:
        return MISSING
    if abs(value) >= 120_000:
        minutes, seconds = divmod(round(value / 1e3), 60)
        return f"{minutes} min {seconds} s"
    for scale, unit in ((1e3, "s"), (1.0, "ms"), (1e-3, "µs")):
        # 999.6 ms would print as `1000 ms`: the next unit takes over where the rounding does
        if abs(value) >= scale * 0.9995:
            return f"{digits(value / scale)} {unit}"
    return f"{digits(value / 1e-6)} ns" if value else "0 ms"


def ns(value: float | None) -> str:
    """Nanoseconds -> like `ms`."""
    return MISSING if value is None else ms(value / 1e6)


def seconds(value: float | None) -> str:
    """Seconds -> like `ms`."""
    return MISSING if value is None else ms(value * 1e3)


def si(value: float | None, unit: str = "") -> str:
    """1.56e10, `FLOP` -> `15.6 GFLOP`."""
    if value is None:
        return MISSING
    for scale, prefix in _SI:
        if abs(value) >= scale * 0.9995:
            return f"{digits(value / scale)} {prefix}{unit}".rstrip()
    return f"{digits(value)} {unit}".rstrip()


def rate(value: float | None) -> str:
    """A throughput: `19.9k`, `65.0`, `0.420`."""
    if value is None:
        return MISSING
    if abs(value) < 9999.5:
        return digits(value)
    return si(value).replace(" ", "")


def tflops(value: float | None) -> str:
    """TFLOP/s -> with the prefix that suits: `311 TFLOP/s`, `514 MFLOP/s`."""
    return MISSING if value is None else si(value * 1e12, "FLOP/s")


def tflops_column(values: Iterable[float | None]) -> tuple[str, float]:
    """TFLOP/s of a column -> (its title, what to multiply by): one unit for all of them, so that they compare."""
    top = max((v for v in values if v is not None), default=1.0)
    return ("TFLOP/s", 1.0) if top >= 1 else ("GFLOP/s", 1e3) if top >= 1e-3 else ("MFLOP/s", 1e6)


def ceiling(value: float, unit: str) -> str:
    """A ceiling with its unit: `764 TFLOP/s`, `4261 GB/s`."""
    if unit == "FLOP/s":
        return si(value, unit)
    return f"{digits(value / 1e9, 4 if value >= 1e12 else 3)} GB/s"


def memory(value: float | None) -> str:
    """Bytes held -> `1.50 GiB`."""
    if value is None:
        return MISSING
    for scale, unit in _BINARY:
        if abs(value) >= scale:
            return f"{digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def percent(value: float | None) -> str:
    """0..100 -> `41%`, `4.1%`, `<0.1%`."""
    if value is None:
        return MISSING
    if 0 < abs(value) < 0.1:
        return "<0.1%"
    return f"{value:.0f}%" if abs(value) >= 9.95 or value == 0 else f"{value:.1f}%"


def share(value: float | None) -> str:
    """0..1 -> like `percent`; only 1 itself is `100%`."""
    if value is None:
        return MISSING
    if 0.995 <= value < 1:
        return f"{math.floor(value * 1000) / 10:.1f}%"
    return percent(value * 100)


def calls(value: float | None) -> str:
    """How often something ran: `24`, `0.5` where it ran in every other call."""
    if value is None:
        return MISSING
    return f"{value:.0f}" if abs(value - round(value)) < 1e-6 or value >= 100 else digits(value)


def signed_ms(value: float) -> str:
    """A difference of times: `+1.20 ms`, `-850 µs`, `0`."""
    return "0" if abs(value) < 5e-7 else f"{'+' if value > 0 else '-'}{ms(abs(value))}"


def change(value: float | None) -> str:
    """A relative change: 0.052 -> `+5.2%`, 7.2 -> `8.2×`."""
    if value is None:
        return MISSING
    if value >= 1:
        return f"{digits(value + 1, 2)}×"
    return "0%" if abs(value) < 5e-4 else f"{value * 100:+.1f}%"


def error(value: float | None) -> str:
    """A relative error: `1.2e-04`, `0`."""
    return MISSING if value is None else ("0" if value == 0 else f"{value:.1e}")


def ratio(value: float | None) -> str:
    """`8.59×`."""
    return MISSING if value is None else f"{digits(value)}×"


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
