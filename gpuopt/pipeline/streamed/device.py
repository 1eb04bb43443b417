"""`cuda:0`, `simulated`, `simulated:link=25e9,block=0.12ms` -> what a model is streamed on; and, for a device on paper, the rates it is planned with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpuopt.core import units
from gpuopt.core.errors import UsageError
from gpuopt.core.streaming import Anatomy, Calibration

SIMULATED = "simulated"
RATES: Mapping[str, float] = {"link": 55.5e9, "pageable": 9.3e9, "disk": 7e9, "memory": 4.26e12, "flops": 600e12}
"""Of `simulated` where nothing else is said: what one H200 on PCIe 5 x16 was measured to do (pinned and pageable copies, a copy within its memory, bf16
products inside a model), and an NVMe drive."""
SCHEDULES = ("late", "early", "random")


def _rate(text: str) -> float:
    return units.parse_flops(text.removesuffix("B/s").removesuffix("/s").removesuffix("B"))


def _ms(text: str) -> float:
    return units.parse_seconds(text, default="ms") * 1e3


_KEYS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "link": (_rate, "bytes a second from locked host memory"),
    "pageable": (_rate, "bytes a second from pageable memory"),
    "disk": (_rate, "bytes a second from the disk"),
    "memory": (_rate, "bytes a second of the device's own memory"),
    "flops": (_rate, "products a second"),
    "block": (_ms, "a unit's forward, instead of an estimate from memory and flops"),
    "host": (_ms, "what the host takes to queue a unit"),
    "outside": (_ms, "what is computed outside units"),
    "activations": (units.parse_bytes, "bytes of activations"),
    "context": (units.parse_bytes, "bytes before any tensor"),
    "schedule": (str, "when copies are done: late, early or random, within what events allow"),
    "seed": (int, "of a random schedule"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamDevice:
    """What a model is streamed on."""

    id: str
    """`simulated`, or a CUDA device as typed."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of a simulated device, those that were given, read."""

    @property
    def is_simulated(self) -> bool:
        """Whether it is one on paper: bytes are real, times are arithmetic."""
        return self.id == SIMULATED

    def rate(self, name: str) -> float:
        """A key of RATES, in units a second."""
        return float(self.settings.get(name, RATES[name]))

    @property
    def schedule(self) -> str:
        """When copies are done within what events allow."""
        return str(self.settings.get("schedule", "late"))

    @property
    def seed(self) -> int:
        """Of a random schedule."""
        return int(self.settings.get("seed", 0))

    def __str__(self) -> str:
        told = {**({name: self.rate(name) for name in RATES} if self.is_simulated else {}), **self.settings}
        return self.id + (":" + ",".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in told.items()) if told else "")


def parse(text: str) -> StreamDevice:
    """`simulated[:key=value,…]`, or the name of a CUDA device (`auto` is one too). Raises UsageError for a key there is none of, or a value that is none."""
    name, _, rest = text.strip().partition(":")
    if name != SIMULATED:
        if name not in ("auto", "cuda"):
            raise UsageError(f"{text[:60]!r} is no device to stream to", fix="--device cuda, cuda:1 or simulated")
        return StreamDevice(id=text.strip())
    settings: dict[str, Any] = {}
    for part in (p.strip() for p in rest.split(",") if p.strip()):
        key, eq, value = part.partition("=")
        if key not in _KEYS or not eq:
            raise UsageError(f"a simulated device has no {key[:40]!r}", fix="simulated:link=55e9,block=0.12ms; keys: " + ", ".join(_KEYS))
        try:
            settings[key] = _KEYS[key][0](value.strip())
        except ValueError as error:
            raise UsageError(
                f"{key}={value[:40]} is not {_KEYS[key][1]}", fix=f"{key}=…, as in simulated:link=55e9,block=0.12ms"
            ) from error
        if key in RATES and not settings[key] > 0:
            raise UsageError(f"{key} is {value[:40]}: nothing would ever move", fix=f"{key}={RATES[key]:g}")
    if settings.get("schedule", "late") not in SCHEDULES:
        raise UsageError(f"no schedule is called {settings['schedule']!r}", fix="one of: " + ", ".join(SCHEDULES))
    return StreamDevice(id=SIMULATED, settings=settings)


def made_up(
    device: StreamDevice,
    anatomy: Anatomy,
    *,
    tokens: int,
    workload: str,
    cache_bytes: int = 0,
    rings: frozenset[str] | None = None,
    waits: bool = False,
) -> Calibration:
    """What a device on paper does with a model: a unit takes as long as reading its weights from the device's memory, or two products a weight and token, whichever is longer.

    tokens: rows of a product, so batch x positions; 1 a sequence in decoding. rings: those that run in this workload; None is all of them.
    waits: the host looks at each forward's outcome before the next, which only shows where `host` is given.
    """
    compute: dict[str, float] = {}
    for unit in anatomy.units:
        if rings is not None and unit.ring not in rings:
            continue
        num_bytes = sum(place.num_bytes for place in unit.places)
        weights = sum(math.prod(place.shape) for place in unit.places)
        roofline = 1e3 * max(num_bytes / device.rate("memory"), 2 * weights * tokens / device.rate("flops"))
        compute[unit.name] = float(device.settings.get("block", roofline))
    compute[""] = float(device.settings.get("outside", 1e3 * sum(anatomy.fixed.values()) / device.rate("memory")))
    return Calibration(
        device=str(device),
        link_bytes_per_s=device.rate("link"),
        pageable_bytes_per_s=device.rate("pageable"),
        disk_bytes_per_s=device.rate("disk"),
        compute_ms=compute,
        host_ms={name: float(device.settings["host"]) for name in compute if name} if "host" in device.settings else {},
        host_waits=waits and "host" in device.settings,
        workload=workload,
        activation_bytes=int(device.settings.get("activations", 0)),
        cache_bytes=cache_bytes,
        context_bytes=int(device.settings.get("context", 0)),
        source="a device on paper; activations and context are counted where they are given",
    )
