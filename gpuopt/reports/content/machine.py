"""Device -> what it is, and its ceilings with their sources."""

from __future__ import annotations

from dataclasses import replace

from gpuopt.core.result import CEILING_OF_DTYPE, Device, Report
from gpuopt.reports import figures as f
from gpuopt.reports.content.blocks import Block, Cell, Column, Facts, Table
from gpuopt.reports.content.naming import compute_quantity
from gpuopt.reports.figures import clean


def of_all(report: Report) -> list[Block]:
    """Each device of a report about several, with the ceilings that its own runs stand against."""
    if not report.devices:
        return build(report)
    mine = [
        replace(report, device=device, devices=(device,), runs=tuple(run for run in report.runs if run.device == device.id))
        for device in report.devices
    ]
    return [block for one in mine for block in build(one)]


def build(report: Report) -> list[Block]:
    device = report.device
    if device is None:
        return []
    facts: list[tuple[str, Cell]] = [("device", Cell(f"{clean(device.name)} ({clean(device.id)})", "strong"))]
    details = []
    if device.capability:
        details.append(f"compute capability {clean(device.capability)}")
    if device.num_sms:
        details.append(f"{device.num_sms} SMs")
    if device.num_cores:
        details.append(f.plural(device.num_cores, "core"))
    if device.memory_bytes:
        details.append(f"{f.memory(device.memory_bytes)} memory")
    if device.cache_bytes:
        details.append(f"{f.memory(device.cache_bytes)} last-level cache")
    if device.driver:
        details.append(f"driver {clean(device.driver)}")
    if details:
        facts.append(("", Cell(" · ".join(details))))
    state = []
    state += [f"{clean(name)} {mhz} MHz" for name, mhz in device.clocks_mhz.items()]
    if device.power_limit_w:
        state.append(f"limit {device.power_limit_w:.0f} W")
    if device.temperature_c is not None:
        state.append(f"{device.temperature_c} °C")
    if state:
        facts.append(("now", Cell(" · ".join(state), "dim")))
    if device.throttle_reasons:
        facts.append(("throttled", Cell(", ".join(clean(r) for r in device.throttle_reasons), "warn")))
    if device.other_processes:
        facts.append(
            (
                "shared",
                Cell(
                    f"{f.plural(device.other_processes, 'other process')} on this device: figures may move".replace(
                        "processs", "processes"
                    ),
                    "warn",
                ),
            )
        )
    facts += [("note", Cell(clean(note), "dim")) for note in device.notes]
    blocks: list[Block] = [Facts(title="Device", rows=tuple(facts))]
    if shows_ceilings(report):
        blocks += _ceilings(device, None if report.verb == "device" else _quantities(report))
    return blocks


def shows_ceilings(report: Report) -> bool:
    """Whether the page has a table of ceilings; where it has none, each table names those it uses."""
    return report.verb == "device" or bool(report.devices) or any(run.roofline for run in report.runs)


def _quantities(report: Report) -> set[str]:
    """Ceilings that any figure of this report was held against."""
    wanted = {"memory"}
    for run in report.runs:
        wanted |= {CEILING_OF_DTYPE.get(d, d) for d in run.flops_by_dtype}
        if (quantity := compute_quantity(run)) is not None:
            wanted.add(quantity)
        if run.input_mode != "device" or (run.waterfall and any("host" in part.name and part.ms > 0 for part in run.waterfall.parts)):
            wanted |= {"h2d", "d2h"}
    return wanted


def _ceilings(device: Device, wanted: set[str] | None) -> list[Block]:
    quantities = [q for q in dict.fromkeys(row.quantity for row in device.ceilings.rows) if wanted is None or q in wanted]
    if not quantities:
        return []
    rows = []
    has_sustained = any(row.kind == "sustained" for row in device.ceilings.rows)
    for quantity in quantities:
        measured, spec = device.ceilings.find(quantity, "measured"), device.ceilings.find(quantity, "spec")
        sustained = device.ceilings.find(quantity, "sustained")
        rows.append(
            (
                Cell(clean(quantity), "strong"),
                Cell(f.ceiling(measured.value, measured.unit) if measured else f.MISSING),
                Cell(clean(measured.source) if measured else "not measured", "dim"),
                *([Cell(f.ceiling(sustained.value, sustained.unit) if sustained else f.MISSING)] if has_sustained else []),
                Cell(f.ceiling(spec.value, spec.unit) if spec else f.MISSING),
                Cell(clean(spec.source) if spec else f.MISSING, "dim"),
            )
        )
    columns = (
        Column("ceiling"),
        Column("measured", right=True),
        Column("how", spare=2),
        *([Column("sustained", right=True)] if has_sustained else []),
        Column("data sheet", right=True, spare=1),
        Column("source", spare=3),
    )
    return [Table(title="Ceilings", columns=columns, rows=tuple(rows), notes=tuple(clean(note) for note in device.ceilings.notes))]
