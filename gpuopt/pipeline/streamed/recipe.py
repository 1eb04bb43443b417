"""The key `stream` of a recipe -> StreamRequest."""

from __future__ import annotations

from dataclasses import dataclass

from gpuopt.core import units
from gpuopt.core.errors import UsageError
from gpuopt.core.streamed import ACTIONS, StreamRequest
from gpuopt.pipeline.streamed import command


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEntry:
    """What `stream` is to do, with units as on the command line."""

    action: str = "plan"
    budget: str | tuple[str, ...] | None = None
    """`8GiB`, `50%`; several are a frontier."""
    pin_limit: str | None = None
    disk: str | None = None
    slots: int | None = None
    granularity: str = "block"
    embed: str = "device"
    graphs: bool = False
    compile: bool = False
    once: bool = False
    elastic: bool = False
    calls: int = 20
    forwards: int = 20
    rival: str | tuple[str, ...] | None = None
    """Of `bench`: names of RIVALS, or `none`."""
    alone: bool = False


def request_of(entry: StreamEntry, generate: int | None) -> StreamRequest:
    """As the command line makes it. Raises UsageError naming what cannot be meant."""
    if entry.action not in ACTIONS:
        raise UsageError(f"stream.action {entry.action!r} is unknown", fix="one of: " + ", ".join(ACTIONS))
    for name in ("calls", "forwards"):
        if getattr(entry, name) < 1:
            raise UsageError(f"stream.{name} is {getattr(entry, name)}", fix="a whole number from 1")
    if generate is not None and generate < 2:
        raise UsageError(f"generate is {generate}: one token is the prompt's forward", fix="a whole number from 2")
    specs = [
        command.spec_of(
            text,
            pin_limit_bytes=None if entry.pin_limit is None else units.parse_bytes(entry.pin_limit),
            disk=entry.disk,
            num_slots=entry.slots,
            granularity=entry.granularity,
            embed=entry.embed,
            graphs=entry.graphs,
            compile=entry.compile,
            once=entry.once,
            elastic=entry.elastic,
        )
        for text in ((entry.budget,) if isinstance(entry.budget, str) else entry.budget or ())
    ]
    return StreamRequest(
        action=entry.action,
        specs=tuple(specs),
        generate=generate,
        calls=entry.calls,
        forwards=entry.forwards,
        rivals=command.rivals_of((entry.rival,) if isinstance(entry.rival, str) else entry.rival),
        alone=entry.alone,
    )
