"""A model on a CUDA device -> Calibration: what each unit takes of the device and of the host with its weights in place, and the link while products run. Imports torch.

The module runs with everything resident where the device has room for that; else each unit with whatever weights lie in its slot, which nothing is copied to any more: kernels take
as long with the weights of another block of the same shape. Either way nothing waits for a copy, which would be timed for the unit after it.

Three things are told apart, in forwards of their own: how long the host takes to queue a unit; how long the device takes, each unit being held back until all of it is queued (a device
that waits for launches would be timed as slow as they are); and a whole forward, with nothing in the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from gpuopt.core.errors import OutOfMemory
from gpuopt.core.streaming import Anatomy, Calibration, Ledger, Plan, StreamSpec
from gpuopt.pipeline.streamed.calls import Work
from gpuopt.pipeline.streamed.device import SIMULATED, made_up, parse
from gpuopt.pipeline.streamed.watched import Seen, Still, Watched
from gpuopt.streaming import bound as binding
from gpuopt.streaming import diskrate, guards, timeline
from gpuopt.streaming.shelf import Shelf

FORWARDS = 5
"""Timed each way, after what warms up."""
CONTEXT_GROWTH_BYTES = 64 * 2**20
"""Of the reserve: kernels that are loaded later on take memory of the driver's, which the allocator knows nothing of."""
BUSY = 0.8
"""Of a forward: where its units take as much and launching takes less, the device is what it waits for."""
ROOM = 0.85
"""Of the free memory: what weights and caches may take for everything to be resident, activations aside."""
LINK_COPIES = 8
LINK_ROUNDS = 3
"""The fastest is what the link can do."""
PRODUCTS = 320
"""Queued beside the copies: about as long as those take on an H200."""
MAX_LINK_BYTES = 512 * 2**20
PAGEABLE_BYTES = 64 * 2**20


def provisional(anatomy: Anatomy, spec: StreamSpec, calibration: Calibration, *, resident: bool) -> Plan:
    """Everything resident, or all units through two slots a ring, from memory that is not locked."""
    slots: dict[str, tuple[int, ...]] = {}
    turn: dict[str, int] = {}
    bound: dict[str, int] = {}
    for unit in () if resident else anatomy.units:
        largest = max(u.num_bytes for u in anatomy.units if u.ring == unit.ring)
        slots[unit.ring] = (largest, largest)
        bound[unit.name] = turn.get(unit.ring, 0) % 2
        turn[unit.ring] = turn.get(unit.ring, 0) + 1
    return Plan(
        spec=StreamSpec(budget_share=spec.budget_share, budget_bytes=spec.budget_bytes, compile=spec.compile, graphs=spec.graphs),
        anatomy=anatomy,
        calibration=calibration,
        resident=tuple(unit.name for unit in anatomy.units) if resident else (),
        slots=slots,
        binding=bound,
        homes=dict.fromkeys(bound, "pageable"),
        ledger=Ledger(),
        budget_bytes=0,
        streamed_bytes=sum(unit.num_bytes for unit in anatomy.units if unit.name in bound),
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
    brief: Callable[[], Any] | None = None,
    fill: Any = None,
    shelf: Shelf | None = None,
    workload: str,
    skip_prompt: bool,
    cache_bytes: int,
    others_bytes: int,
    baseline_bytes: int = 0,
    progress: Callable[[float | None, str], None],
    cuda: Any = torch.cuda,
    now: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Bind, call, look, unbind: the module is on the CPU afterwards. skip_prompt: the first forward of a call is another kind of work than the others.

    brief: the same call with fewer forwards, four or more, to be timed; `call` says what memory it takes. shelf: where the slabs stay for what is bound next. others_bytes: of the device, held by other processes. baseline_bytes: what this process
    had allocated there before anything of the model, its inputs or its workspaces. cuda, now: torch.cuda and the host's clock, or what stands in for them.
    """
    progress(None, "measuring the link")
    largest = min(MAX_LINK_BYTES, max((u.num_bytes for u in anatomy.units), default=PAGEABLE_BYTES))
    link, pageable, pin = link_rates(engine, largest)
    # Inputs, and workspaces that libraries made for the products: they stay.
    kept_bytes = max(0, cuda.memory_allocated(engine.device) - baseline_bytes)
    known = Calibration(device=str(engine.device), link_bytes_per_s=link, pageable_bytes_per_s=pageable, pin_bytes_per_s=pin)
    cuda.empty_cache()
    seeing: dict[str, Any] = {"skip_prompt": skip_prompt, "others_bytes": others_bytes, "cuda": cuda, "now": now}

    def bound(resident: bool) -> _Found:
        progress(None, "timing units with everything resident" if resident else "timing units with weights that stay in their slots")
        watched = Watched(engine, cuda, now)
        plan = provisional(anatomy, spec, known, resident=resident)
        with binding.bind(module, plan, watched, fill=fill, shelf=shelf) as streamed:
            watched.is_still = True
            still = Still()
            for lane in streamed.streamer.lanes.values():
                lane.source = still
            return _look(module, plan, watched, call, brief or call, **seeing)

    found = None
    if _fits(anatomy, spec, cache_bytes, cuda.mem_get_info(engine.device)[0]):
        try:
            found = bound(True)
        except (OutOfMemory, torch.OutOfMemoryError):
            cuda.empty_cache()
    resident = found is not None
    found = found or bound(False)
    # What was taken for this is not the plan's.
    cuda.empty_cache()
    return replace(
        known,
        compute_ms=found.compute_ms,
        host_ms=found.host_ms,
        host_waits=skip_prompt,
        resident_ms=found.whole_ms,
        workload=workload,
        activation_bytes=kept_bytes + max(0, found.peak_bytes - cache_bytes),
        cache_bytes=cache_bytes,
        context_bytes=found.context_bytes,
        source=f"measured here: {found.num_forwards} forwards {'with everything resident' if resident else 'with weights that stayed in their slots'}, "
        f"copies of {largest} bytes beside products",
    )


def _fits(anatomy: Anatomy, spec: StreamSpec, cache_bytes: int, free_bytes: int) -> bool:
    """Whether everything may be resident for a while. A budget in bytes is of the device, at all times."""
    wanted = anatomy.weight_bytes - sum(anatomy.host.values()) + cache_bytes
    room = free_bytes if spec.budget_bytes is None else min(free_bytes, spec.budget_bytes)
    return wanted <= ROOM * room


def _as_whole(compute_ms: Mapping[str, float], host_ms: float, whole_ms: float) -> Mapping[str, float]:
    """Units timed one by one, held against a forward without pauses: their shares of its time, where it says better how long they take.

    Together they take no longer than the forward that has all of them (a CUDA graph launched behind a device that is held back does, alone). They may be shorter, as units timed with
    pauses run on a device that is cooler and clocked higher than one that never rests; that counts only where the device is what the forward waits for.
    """
    alone_ms = sum(compute_ms.values())
    is_slow = alone_ms > whole_ms > 0
    is_cool = BUSY * whole_ms < alone_ms < whole_ms and host_ms < BUSY * whole_ms
    return {name: ms * whole_ms / alone_ms for name, ms in compute_ms.items()} if is_slow or is_cool else compute_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    compute_ms: Mapping[str, float]
    host_ms: Mapping[str, float]
    whole_ms: float
    num_forwards: int
    peak_bytes: int
    """During a call, above the weights: workspaces that stay after it count."""
    context_bytes: int


def _look(
    module: Any,
    plan: Plan,
    watched: Watched,
    call: Callable[[], Any],
    brief: Callable[[], Any],
    *,
    skip_prompt: bool,
    others_bytes: int,
    cuda: Any,
    now: Callable[[], float],
) -> _Found:
    cuda.empty_cache()
    held, reserved = cuda.memory_allocated(watched.device), cuda.memory_reserved(watched.device)
    cuda.reset_peak_memory_stats(watched.device)
    brief()
    watched.drain()
    cuda.empty_cache()
    if not plan.spec.graphs:  # a forward that is looked at before it is recorded takes more than one that is replayed
        cuda.reset_peak_memory_stats(watched.device)
    call()
    watched.drain()
    # The device is short of what the allocator reserves, which is more than what it hands out: a third more in a prompt of 4,096 tokens with 128 thousand logits each.
    peak = max(cuda.max_memory_allocated(watched.device) - held, cuda.max_memory_reserved(watched.device) - reserved)
    # After the calls, for kernels are loaded and workspaces made when they are first used.
    free, total = cuda.mem_get_info(watched.device)
    context_bytes = max(0, total - free - cuda.memory_reserved(watched.device) - others_bytes)
    watched.watching = "whole" if skip_prompt else ""
    whole_ms = median(_forwards(watched, brief, skip_prompt=True, now=now)[1]) if skip_prompt else _back_to_back(watched, brief)
    with ExitStack() as stack:
        for name in plan.resident:
            part = module.get_submodule(name)
            stack.callback(guards.put(part, "forward", watched.around(name, part.forward)))
        watched.watching = "host"
        hosts, _, outside_ms = _forwards(watched, brief, skip_prompt=skip_prompt, now=now)
        host_ms = _hosted(hosts)
        watched.watching = "device"
        watched.tune()
        # What lies around the units is queued at both ends of a forward: hold the device back for all of it at the start.
        watched.queued_ms = host_ms
        devices, *_ = _forwards(watched, brief, skip_prompt=skip_prompt, now=now)
        watched.watching = ""
    compute_ms: Mapping[str, float] = times(devices)
    if skip_prompt:
        # The host waits for each token, so what it does between two forwards, and within them around the units, is what is left of the time from one to the next.
        host_ms[""] = 0.0
        units = plan.anatomy.units
        known = timeline.simulate(
            units, [unit.name for unit in units], {}, {}, compute_ms, 1.0, forwards=1, host_ms=host_ms, host_waits=True, spans=False
        )
        host_ms[""] = max(0.0, whole_ms - known.compute_ms)
    else:
        host_ms[""] = max(0.0, outside_ms)
        compute_ms = _as_whole(compute_ms, sum(host_ms.values()), whole_ms)
    return _Found(
        compute_ms=compute_ms,
        host_ms=host_ms,
        whole_ms=whole_ms,
        num_forwards=len(devices),
        peak_bytes=peak,
        context_bytes=context_bytes,
    )


def _back_to_back(watched: Watched, call: Callable[[], Any]) -> float:
    """Milliseconds of a call, one after the other as a service makes them."""
    begin = watched.mark()
    for _ in range(FORWARDS):
        call()
    end = watched.mark()
    watched.drain()
    return float(begin.elapsed_time(end)) / FORWARDS


def _forwards(
    watched: Watched, call: Callable[[], Any], *, skip_prompt: bool, now: Callable[[], float]
) -> tuple[list[Seen], list[float], float]:
    """(forwards as they were seen, milliseconds from one's begin to the next's, median milliseconds of the host in a call outside units): each call on a device that has nothing to do."""
    kept: list[Seen] = []
    apart: list[float] = []
    outside: list[float] = []
    for _ in range(FORWARDS):
        watched.forwards.clear()
        watched.drain()
        began = now()
        call()
        took_ms = 1e3 * (now() - began)
        watched.drain()
        seen = [one for one in watched.forwards if one.whole is not None]
        if skip_prompt and len(seen) > 1:
            seen = seen[1:]
        kept += seen
        apart += [float(one.begin.elapsed_time(other.begin)) for one, other in pairwise(seen)]
        outside.append(took_ms - sum(ms for one in seen for name, ms in one.host_ms.items() if name))
        if len(kept) > FORWARDS:
            break
    watched.forwards.clear()
    return kept, apart, median(outside)


def _hosted(forwards: Sequence[Seen]) -> dict[str, float]:
    """Unit -> median milliseconds of the host; `""` is a forward without them."""
    names = dict.fromkeys(name for seen in forwards for name in seen.host_ms if name)
    found = {name: median(seen.host_ms.get(name, 0.0) for seen in forwards) for name in names}
    found[""] = max(0.0, median(seen.host_ms.get("", 0.0) for seen in forwards) - sum(found.values()))
    return found


def times(forwards: Sequence[Seen]) -> dict[str, float]:
    """Unit -> median milliseconds of its forwards, summed where a forward runs it several times; `""` is what is left of a forward, moments when the device was held back aside."""
    names = dict.fromkeys(name for seen in forwards for name in seen.units)
    found = {name: median(sum(p.ms for p in seen.units.get(name, ())) for seen in forwards) for name in names}
    rest = [
        # The first hold lies before the forward's own begin.
        seen.whole.ms - sum(p.ms for pairs in seen.units.values() for p in pairs) - sum(p.ms for p in seen.held[1:])
        for seen in forwards
        if seen.whole is not None
    ]
    found[""] = max(0.0, median(rest)) if rest else 0.0
    return found


def estimated(
    engine: Any, anatomy: Anatomy, spec: StreamSpec, work: Work, *, cache_bytes: int, rings: frozenset[str] | None
) -> Calibration:
    """Link and disk measured, compute estimated: for weights that need not fit host memory, and for a module that comes without inputs."""
    largest = min(MAX_LINK_BYTES, max((unit.num_bytes for unit in anatomy.units), default=PAGEABLE_BYTES))
    link, pageable, pin = link_rates(engine, largest)
    rates = parse(f"{SIMULATED}:link={link!r},pageable={pageable!r}")
    guessed = made_up(rates, anatomy, tokens=work.tokens, workload=work.words, cache_bytes=cache_bytes, rings=rings)
    return replace(
        guessed,
        device=str(engine.device),
        pin_bytes_per_s=pin,
        disk_bytes_per_s=diskrate.measure_disk(spec.disk).bytes_per_s if spec.disk is not None else None,
        source="the link was measured here; a unit's compute is an estimate from its weights, activations are not counted",
    )


def link_rates(engine: Any, num_bytes: int) -> tuple[float, float, float | None]:
    """(bytes a second locked, pageable, of locking). The device multiplies meanwhile, as it will when weights are streamed."""
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
            found = []
            for _ in range(LINK_ROUNDS):
                for _ in range(PRODUCTS):
                    side = side @ side
                with cuda.stream(stream):
                    begin.record(stream)
                    for _ in range(LINK_COPIES):
                        slot.copy_(home.bytes, non_blocking=True)
                    end.record(stream)
                engine.drain()
                found.append(LINK_COPIES * num_bytes / (begin.elapsed_time(end) / 1e3))
            link = max(found)  # a ceiling: what else the machine did meanwhile is none of the link's
        return link, pageable, num_bytes / pin_s if home.pinned and pin_s > 0 else None
    finally:
        engine.drain()
        home.close()


def _pageable_rate(engine: Any, num_bytes: int) -> float:
    source = torch.zeros(num_bytes, dtype=torch.uint8)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=engine.device)
    target.copy_(source)
    engine.drain()
    began = time.monotonic()
    target.copy_(source)
    engine.drain()
    return num_bytes / max(1e-9, time.monotonic() - began)


@contextmanager
def held_to(plan: Plan, device: str) -> Iterator[None]:
    """torch's allocator gets what the plan has for it and no byte more: what would pass the budget first gives back what it keeps in reserve, then fails."""
    _hold(plan, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def let_out(plan: Plan, device: str) -> Iterator[None]:
    """Within `held_to`: all of the device, for something to be held against the plan that is none of it."""
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    try:
        yield
    finally:
        _hold(plan, device)


def _hold(plan: Plan, device: str) -> None:
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.empty_cache()
    growth = min(CONTEXT_GROWTH_BYTES, plan.ledger.reserve // 2)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (plan.budget_bytes - plan.ledger.context - growth) / total), device)
