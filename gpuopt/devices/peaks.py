"""Device -> data-sheet Ceilings, from peaks.toml: dense, by dtype, with the source of each. Unknown stays unknown."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from gpuopt.core.result import Ceiling, Ceilings, Device

QUANTITIES = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "int8")
_GIB = 2**30
_VENDOR = re.compile(r"^(NVIDIA|Tesla)\s+", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """One table of peaks.toml. FLOP/s and byte/s; a quantity that is absent is unknown or not there."""

    key: str
    name: str
    """Regular expression for the whole name without the vendor."""
    num_sms: int
    capability: str
    memory_gib: tuple[float, float]
    boost_mhz: float
    flop_per_clk_sm: float
    """Dense fp16 with fp32 accumulate, one SM, one clock."""
    flops: dict[str, float]
    """By quantity; fp64 is the better of CUDA and tensor cores, which is what a GEMM gets."""
    bandwidth: float
    source: str
    is_clock_independent: bool
    """False where the clock was solved from the peak: recomputing then proves nothing."""
    boosts_past: bool = False
    note: str = ""

    def matches(self, device: Device) -> bool:
        """The name as a whole, and whatever else the device tells of itself."""
        name = _VENDOR.sub("", device.name.strip())
        low, high = self.memory_gib
        return (
            re.fullmatch(self.name, name, re.IGNORECASE) is not None
            and device.num_sms in (None, self.num_sms)
            and device.capability in (None, self.capability)
            and (device.memory_bytes is None or low <= device.memory_bytes / _GIB <= high)
        )

    def limit(self, quantity: str, value: float, max_sm_mhz: float | None) -> float:
        """What no measurement can exceed: `value`, or more by the clock where this card boosts past its data sheet."""
        if self.boosts_past and quantity in self.flops and max_sm_mhz is not None:
            return value * max(1.0, max_sm_mhz / self.boost_mhz)
        return value


@cache
def table() -> tuple[Peak, ...]:
    """Every row of peaks.toml."""
    text = files("gpuopt.devices").joinpath("peaks.toml").read_text(encoding="utf-8")
    return tuple(_peak(key, row) for key, row in tomllib.loads(text).items())


def find(device: Device) -> Peak | None:
    """The one row that fits; None where there is none, or where the device tells too little to choose."""
    found = [peak for peak in table() if peak.matches(device)]
    return found[0] if len(found) == 1 else None


def spec_ceilings(device: Device) -> Ceilings:
    """Rows of kind `spec`; empty, with a note that says why, for a device that is not in the table."""
    if device.kind == "null":
        from gpuopt.devices import null

        return Ceilings(rows=tuple(row for row in null.CEILINGS.rows if row.kind == "spec"))
    if device.kind != "cuda":
        return Ceilings(notes=(f"{device.name}: no data-sheet ceilings are kept for this kind of device",))
    peak = find(device)
    if peak is None:
        return Ceilings(notes=(_why_not(device),))
    source = f"{peak.key}: {peak.source}" + (f" ({peak.note})" if peak.note else "")
    rows = [Ceiling(quantity=q, value=peak.flops[q], unit="FLOP/s", kind="spec", source=source) for q in QUANTITIES if q in peak.flops]
    rows.append(Ceiling(quantity="memory", value=peak.bandwidth, unit="byte/s", kind="spec", source=source))
    return Ceilings(rows=tuple(rows))


def _why_not(device: Device) -> str:
    found = [peak.key for peak in table() if peak.matches(device)]
    if found:
        return f"{device.name} could be {' or '.join(found)}: its data-sheet ceilings stay unknown"
    memory = f", {device.memory_bytes / _GIB:.0f} GiB" if device.memory_bytes else ""
    return (
        f"no data sheet in gpuopt/devices/peaks.toml fits {device.name} ({device.num_sms} SMs, capability {device.capability}{memory}): "
        "its data-sheet ceilings stay unknown"
    )


def _peak(key: str, row: dict[str, object]) -> Peak:
    def number(name: str) -> float:
        value = row[name]
        assert isinstance(value, int | float), f"peaks.toml: {key}.{name} is {value!r}"
        return float(value)

    flops = {q: number(q) * 1e12 for q in QUANTITIES if q in row}
    if "fp64_tensor" in row:
        flops["fp64"] = max(flops["fp64"], number("fp64_tensor") * 1e12)
    memory = row["memory_gib"]
    assert isinstance(memory, list) and len(memory) == 2, f"peaks.toml: {key}.memory_gib is {memory!r}"
    return Peak(
        key=key,
        name=str(row["name"]),
        num_sms=int(number("num_sms")),
        capability=str(row["capability"]),
        memory_gib=(float(memory[0]), float(memory[1])),
        boost_mhz=number("boost_mhz"),
        flop_per_clk_sm=number("flop_per_clk_sm"),
        flops=flops,
        bandwidth=number("memory") * 1e9,
        source=str(row["source"]),
        is_clock_independent=row["clock"] == "independent",
        boosts_past=bool(row.get("boosts_past", False)),
        note=str(row.get("note", "")),
    )
