"""A model on a CUDA device -> Calibration: its units' times with their weights on the device, and the link while products run. Imports torch.

Every unit is streamed once, from memory that is not locked: what is timed is each unit's forward after its weights have come, so a slow copy costs nothing but time to wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from gpuopt.core.streaming import Anatomy, Calibration, Ledger, Plan, StreamSpec
from gpuopt.pipeline import stream_device
from gpuopt.pipeline.stream_calls import Work
from gpuopt.streaming import bound as binding
from gpuopt.streaming import diskrate

FORWARDS = 3
"""Timed, after one that warms up."""
LINK_COPIES = 8
PRODUCTS = 320
"""Queued beside the copies: about as long as those take on an H200."""
MAX_LINK_BYTES = 512 * 2**20
PAGEABLE_BYTES = 64 * 2**20


@dataclass(slots=True)
class Pair:
    """Two events around something on the stream that computes."""

    begin: Any
    end: Any

    @property
    def ms(self) -> float:
        """After both have happened."""
        return float(self.begin.elapsed_time(self.end))


@dataclass(slots=True)
class _Seen:
    """One forward."""

    whole: Pair | None = None
    units: dict[str, list[Pair]] = field(default_factory=dict)
    waits: list[Pair] = field(default_factory=list)


class Watched:
    """An engine that also times what is computed: each unit, each wait for a copy, the whole forward. Everything else is the engine's own."""

    def __init__(self, engine: Any, cuda: Any = torch.cuda) -> None:
        self._engine, self._cuda = engine, cuda
        self.forwards: list[_Seen] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _event(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._engine.device))
        return event

    def wait_compute(self, event: Any) -> None:
        """The engine's, timed."""
        begin = self._event()
        self._engine.wait_compute(event)
        if self.forwards:
            self.forwards[-1].waits.append(Pair(begin, self._event()))

    @contextmanager
    def segment(self, unit: str, slot: Any = None) -> Any:
        """The engine's, timed; `""` is a forward."""
        if not unit or not self.forwards:  # an encoder may be called by itself, outside a forward of the model
            self.forwards.append(_Seen())
        seen, begin = self.forwards[-1], self._event()
        with self._engine.segment(unit, slot):
            yield
        pair = Pair(begin, self._event())
        if unit:
            seen.units.setdefault(unit, []).append(pair)
        else:
            seen.whole = pair


def provisional(anatomy: Anatomy, spec: StreamSpec, calibration: Calibration) -> Plan:
    """All units streamed through two slots, from memory that is not locked."""
    slots: dict[str, tuple[int, ...]] = {}
    turn: dict[str, int] = {}
    bound: dict[str, int] = {}
    for unit in anatomy.units:
        largest = max(u.num_bytes for u in anatomy.units if u.ring == unit.ring)
        slots[unit.ring] = (largest, largest)
        bound[unit.name] = turn.get(unit.ring, 0) % 2
        turn[unit.ring] = turn.get(unit.ring, 0) + 1
    return Plan(
        spec=StreamSpec(budget_share=spec.budget_share, budget_bytes=spec.budget_bytes),
        anatomy=anatomy,
        calibration=calibration,
        resident=(),
        slots=slots,
        binding=bound,
        homes=dict.fromkeys(bound, "pageable"),
        ledger=Ledger(),
        budget_bytes=0,
        streamed_bytes=sum(unit.num_bytes for unit in anatomy.units),
        compute_ms=0.0,
        link_ms=0.0,
        bound_ms=0.0,
        predicted_ms=0.0,
        stall_ms=0.0,
    )


def measured(
    module: Any,
    anatomy: Anatomy,
    spec: StreamSpec,
    engine: Any,
    call: Callable[[], Any],
    *,
    fill: Any = None,
    workload: str,
    skip_prompt: bool,
    cache_bytes: int,
    others_bytes: int,
    progress: Callable[[float | None, str], None],
    cuda: Any = torch.cuda,
) -> Calibration:
    """Bind, call, look, unbind: the module is on the CPU afterwards. skip_prompt: the first forward of a call is another kind of work than the others.

    others_bytes: of the device, held by other processes. cuda: torch.cuda, or what stands in for it.
    """
    progress(None, "measuring the link")
    largest = min(MAX_LINK_BYTES, max((u.num_bytes for u in anatomy.units), default=PAGEABLE_BYTES))
    link, pageable, pin = link_rates(engine, largest)
    known = Calibration(device=str(engine.device), link_bytes_per_s=link, pageable_bytes_per_s=pageable, pin_bytes_per_s=pin)
    watched = Watched(engine, cuda)
    progress(None, "timing units one by one")
    with binding.bind(module, provisional(anatomy, spec, known), watched, fill=fill):
        call()
        watched.drain()
        held = cuda.memory_allocated(engine.device)
        cuda.reset_peak_memory_stats(engine.device)
        watched.forwards.clear()
        kept: list[_Seen] = []
        for _ in range(FORWARDS):
            call()
            watched.drain()
            seen = [one for one in watched.forwards if one.whole is not None]
            kept += seen[1:] if skip_prompt and len(seen) > 1 else seen
            watched.forwards.clear()
        peak = cuda.max_memory_allocated(engine.device) - held
        # After the calls, for kernels are loaded and workspaces made when they are first used.
        free, total = cuda.mem_get_info(engine.device)
        context_bytes = max(0, total - free - cuda.memory_reserved(engine.device) - others_bytes)
    return Calibration(
        device=str(engine.device),
        link_bytes_per_s=link,
        pageable_bytes_per_s=pageable,
        compute_ms=times(kept),
        workload=workload,
        activation_bytes=max(0, peak - cache_bytes),
        cache_bytes=cache_bytes,
        context_bytes=context_bytes,
        pin_bytes_per_s=pin,
        source=f"measured here: {len(kept)} forwards, copies of {largest} bytes beside products",
    )


def estimated(
    engine: Any, anatomy: Anatomy, spec: StreamSpec, work: Work, *, cache_bytes: int, rings: frozenset[str] | None
) -> Calibration:
    """Link and disk measured, compute estimated: for weights that need not fit host memory, and for a module that comes without inputs."""
    largest = min(MAX_LINK_BYTES, max((unit.num_bytes for unit in anatomy.units), default=PAGEABLE_BYTES))
    link, pageable, pin = link_rates(engine, largest)
    rates = stream_device.parse(f"{stream_device.SIMULATED}:link={link!r},pageable={pageable!r}")
    guessed = stream_device.made_up(rates, anatomy, tokens=work.tokens, workload=work.words, cache_bytes=cache_bytes, rings=rings)
    return replace(
        guessed,
        device=str(engine.device),
        pin_bytes_per_s=pin,
        disk_bytes_per_s=diskrate.measure_disk(spec.disk).bytes_per_s if spec.disk is not None else None,
        source="the link was measured here; a unit's compute is an estimate from its weights, activations are not counted",
    )


def times(forwards: list[_Seen]) -> Mapping[str, float]:
    """Unit -> median milliseconds of its forwards, summed where a forward runs it several times; `""` is what is left of a forward without its waits."""
    names = dict.fromkeys(name for seen in forwards for name in seen.units)
    found = {name: median(sum(p.ms for p in seen.units.get(name, ())) for seen in forwards) for name in names}
    rest = [
        seen.whole.ms - sum(p.ms for pairs in seen.units.values() for p in pairs) - sum(p.ms for p in seen.waits)
        for seen in forwards
        if seen.whole is not None
    ]
    found[""] = max(0.0, median(rest)) if rest else 0.0
    return found


def link_rates(engine: Any, num_bytes: int) -> tuple[float, float, float | None]:
    """(bytes a second locked, pageable, of locking). The device multiplies meanwhile, as it will when weights are streamed."""
    import time

    cuda = torch.cuda
    began = time.monotonic()
    home = engine.home(num_bytes, pin=True)
    pin_s = time.monotonic() - began
    try:
        slot = engine.slot(num_bytes)
        side = torch.zeros(4096, 4096, dtype=torch.float16, device=engine.device)
        stream = cuda.Stream(engine.device)
        link = pageable = _pageable_rate(engine, min(num_bytes, PAGEABLE_BYTES))
        if home.pinned:
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            slot.copy_(home.bytes, non_blocking=True)
            engine.drain()
            for _ in range(PRODUCTS):
                side = side @ side
            with cuda.stream(stream):
                begin.record(stream)
                for _ in range(LINK_COPIES):
                    slot.copy_(home.bytes, non_blocking=True)
                end.record(stream)
            engine.drain()
            link = LINK_COPIES * num_bytes / (begin.elapsed_time(end) / 1e3)
        return link, pageable, num_bytes / pin_s if home.pinned and pin_s > 0 else None
    finally:
        engine.drain()
        home.close()


def _pageable_rate(engine: Any, num_bytes: int) -> float:
    import time

    source = torch.zeros(num_bytes, dtype=torch.uint8)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=engine.device)
    target.copy_(source)
    engine.drain()
    began = time.monotonic()
    target.copy_(source)
    engine.drain()
    return num_bytes / max(1e-9, time.monotonic() - began)
