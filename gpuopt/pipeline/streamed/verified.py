"""A session and a plan -> checks: is what is streamed equal, bit for bit, to everything resident; and a hunt for races, with slots poisoned, copies at other moments, blocks in other orders.

Imports torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from gpuopt.core.errors import GpuoptError, ResourceError
from gpuopt.core.streamed import StreamCheck
from gpuopt.core.streaming import Anatomy, Plan
from gpuopt.pipeline.streamed import measured
from gpuopt.pipeline.streamed.calls import digest
from gpuopt.streaming.slabs import checksum

if TYPE_CHECKING:
    from gpuopt.pipeline.streamed.session import StreamSession

SEEDS = 4
"""Of random schedules and orders."""
MAX_SHOWN = 3


def checks(session: StreamSession, plan: Plan, forwards: int) -> tuple[StreamCheck, ...]:
    """All of them, in order. What fails is a check that did not pass; what cannot be looked at says why."""
    orders = _orders(session.work.module, plan.anatomy)
    session.progress(None, "computing the reference, everything resident")
    try:
        with session.whole(plan):
            reference = digest(session.work.forward())
            tokens = digest(session.work.generated()) if session.work.new_tokens else None
            shuffled = [_in_order(session.work.module, ring, order, lambda: digest(session.work.forward())) for ring, order in orders]
    except ResourceError as error:
        return (
            StreamCheck(name="outputs", passed=None, detail=f"nothing to compare with: {error.message}"),
            *_sums(session, plan),
        )
    found = list(_sums(session, plan, reference, tokens))
    found.append(_hunt(session, plan, reference, forwards))
    found.append(_reordered(session, plan, orders, shuffled))
    return tuple(found)


def _sums(session: StreamSession, plan: Plan, reference: str | None = None, tokens: str | None = None) -> Iterator[StreamCheck]:
    """The bytes that computing finds in each slot against those of its slab, and the outputs."""
    session.progress(None, "comparing bytes and outputs")
    with capped(session, plan), session.streamed(plan, audit=True) as bound:
        first = digest(session.work.forward())
        # With graphs: looked at, recorded, replayed.
        again = [digest(session.work.forward()) for _ in range(2 if plan.spec.graphs else 1)]
        seen = bound.streamer.audited()
        wanted = {name: bound.checksums[name] if name in bound.checksums else _sum_of(bound, name) for name in bound.plan.binding}
        wrong = [name for name, sums in seen.items() if any(total != wanted[name] for total in sums)]
        counted = sum(len(sums) for sums in seen.values())
        yield StreamCheck(
            name="checksums",
            passed=not wrong and (bool(seen) or not plan.binding),
            detail=f"{counted} sums of {len(seen)} streamed units on the device" + (f"; other bytes in {_listed(wrong)}" if wrong else ""),
        )
        if reference is not None:
            equal = {first, *again} == {reference}
            times = {2: "twice", 3: "three times"}[1 + len(again)]
            held = "everything resident" + (", its blocks compiled too" if plan.spec.compile else "")
            yield StreamCheck(
                name="outputs",
                passed=equal,
                detail=f"equal to {held}, {times}" if equal else f"not equal to {held}",
            )
        if tokens is not None:
            equal = digest(session.work.generated()) == tokens
            count = session.work.new_tokens
            yield StreamCheck(
                name="tokens", passed=equal, detail=f"{count} greedy tokens a sequence {'equal' if equal else 'are not equal'}"
            )
        if bound.graphs is not None:
            # Those without a graph were computed as ever, and compared: nothing failed.
            whole = len(bound.graphs.graphed) == len(plan.anatomy.units)
            yield StreamCheck(name="graphs", passed=whole or None, detail="; ".join(bound.graphs.notes))
    session.release()


def _sum_of(bound: Any, name: str) -> int:
    """Of a unit whose bytes somebody else has."""
    return checksum(bound._sources[name].read(name))


def _hunt(session: StreamSession, plan: Plan, reference: str, forwards: int) -> StreamCheck:
    """Slots are filled with NaN bytes when they are freed, and copies happen late, early and at random (on a GPU: both queues sleep at random)."""
    schedules: Sequence[tuple[str | None, int]] = (
        [("late", 0), ("early", 0), *(("random", seed) for seed in range(SEEDS))]
        if session.device.is_simulated
        else [(None, seed) for seed in range(SEEDS)]
    )
    ran, bad, races = 0, [], []
    for number, (schedule, seed) in enumerate(schedules):
        session.progress(number / len(schedules), "hunting races")
        engine = session.engine(plan, schedule=schedule, seed=seed)
        with capped(session, plan), session.streamed(plan, engine=engine, poison=True):
            share = max(-(-forwards // len(schedules)), 3 if plan.spec.graphs else 1)
            for _ in range(share):
                ran += 1
                if digest(session.work.forward()) != reference:
                    bad.append(f"{schedule or 'sleeps'} {seed}")
        races += list(getattr(engine, "races", ()))
    passed = not bad and not races
    detail = f"{ran} forwards over {len(schedules)} schedules, freed slots full of NaN"
    if not passed:
        detail += f"; wrong under {_listed(bad)}" if bad else ""
        detail += f"; {races[0]}" if races else ""
    return StreamCheck(name="races", passed=passed, detail=detail)


def _reordered(session: StreamSession, plan: Plan, orders: list[tuple[str, list[int]]], wanted: list[str | None]) -> StreamCheck:
    """Blocks in another order, and some left out: what the prefetch did not expect is fetched on demand."""
    session.progress(None, "shuffling and skipping blocks")
    tried = [(ring, order, want) for (ring, order), want in zip(orders, wanted, strict=True) if want is not None]
    module = session.work.module
    if not tried:
        return StreamCheck(name="order", passed=None, detail="this model does not run with its blocks in another order")
    with capped(session, plan), session.streamed(plan, poison=True) as bound:
        wrong = 0
        for ring, order, want in tried:
            wrong += _in_order(module, ring, order, lambda: digest(session.work.forward())) != want
        fetched = bound.streamer.demand_fetches
    return StreamCheck(
        name="order",
        passed=wrong == 0,
        detail=f"{len(tried)} orders, shuffled and shortened, {fetched} units fetched on demand" + (f"; {wrong} wrong" if wrong else ""),
    )


def _orders(module: Any, anatomy: Anatomy) -> list[tuple[str, list[int]]]:
    """(ring, indices of its blocks in another order), for the longest list of blocks there is; [] where blocks are no list."""
    rings: dict[str, int] = {}
    for unit in anatomy.units:
        rings[unit.ring] = rings.get(unit.ring, 0) + 1
    lists = [name for name in rings if _container(module, name) is not None]
    if not lists:
        return []
    longest = max(lists, key=lambda name: rings[name])
    container = _container(module, longest)
    assert container is not None
    count = len(container)
    if count < 2:
        return []
    found = []
    for seed in range(SEEDS):
        order = random.Random(seed).sample(range(count), count)
        found.append((longest, order if seed % 2 == 0 else sorted(order[: max(1, count // 2)])))
    return found


def _container(module: Any, name: str) -> nn.ModuleList | nn.Sequential | None:
    try:
        found = module.get_submodule(name)
    except AttributeError:
        return None
    return found if isinstance(found, nn.ModuleList | nn.Sequential) else None


def _in_order(module: Any, ring: str, order: list[int], run: Callable[[], str]) -> str | None:
    """What `run` gives with the ring's blocks in this order; None where the model does not run so."""
    container = _container(module, ring)
    assert container is not None, "orders are made of lists"
    with _blocks(container, order):
        try:
            return run()
        except GpuoptError:
            raise
        except (RuntimeError, IndexError, KeyError, ValueError, TypeError, AttributeError):
            # Anybody's model: one that counts its blocks, or whose blocks differ, says so in one of these ways, streamed or not.
            return None


@contextmanager
def _blocks(container: nn.Module, order: list[int]) -> Iterator[None]:
    """A list of modules in another order, and shorter where the order is."""
    kept = dict(container._modules)
    members = list(kept.values())
    container._modules.clear()
    container._modules.update({str(place): members[index] for place, index in enumerate(order)})
    try:
        yield
    finally:
        container._modules.clear()
        container._modules.update(kept)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_SHOWN]) + (f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else "")


def capped(session: StreamSession, plan: Plan) -> AbstractContextManager[None]:
    """torch's allocator gets what the plan has for it and no byte more: a plan that takes more than it says fails here."""
    return nullcontext() if session.device.is_simulated else measured.held_to(plan, session.device.id)
