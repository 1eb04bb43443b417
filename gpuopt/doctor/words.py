"""Figures and names -> the words of a finding: three digits with a unit, a plural where there are several, a list that ends."""

from __future__ import annotations

from collections.abc import Iterable

_UNITS = ((60_000.0, "min"), (1_000.0, "s"), (1.0, "ms"), (1e-3, "µs"), (1e-6, "ns"))


def ms(milliseconds: float) -> str:
    """`13.9 ms`, `2.84 µs`, `1.2 s`."""
    size = abs(milliseconds)
    scale, unit = next(((s, u) for s, u in _UNITS if size >= s * (2 if u == "min" else 0.9995)), _UNITS[-1] if size else _UNITS[2])
    return f"{digits(milliseconds / scale)} {unit}"


def share(part: float) -> str:
    """`62%`, `8.3%`, `<0.1%`; never more than a whole."""
    percent = 100 * min(1.0, part)
    if 0 < percent < 0.1:
        return "<0.1%"
    return f"{percent:.0f}%" if percent >= 9.95 else f"{percent:.1f}%".replace(".0%", "%")


def digits(number: float) -> str:
    """Three of them, whole numbers in full: `1.28`, `12.5`, `4097`."""
    return f"{number:.0f}" if abs(number) >= 99.95 or number == round(number) else f"{number:.3g}"


def number(count: float, one: str, many: str = "") -> str:
    """`1 layer`, `2 layers`, `1.5 copies`."""
    return f"{digits(count)} {one if digits(count) == '1' else many or one + 's'}"


def times(count: float) -> str:
    """`once`, `24 times`."""
    return "once" if digits(count) == "1" else f"{digits(count)} times"


def listed(names: Iterable[str], most: int = 3) -> str:
    """`a, b, c and 4 more`."""
    every = [name or "the root" for name in names]
    rest = len(every) - most
    return ", ".join(every[:most]) + (f" and {rest} more" if rest > 0 else "")
