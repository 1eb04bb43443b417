"""A pipeline of modules and a run of it -> the same pipeline with what was found faster in the place of its modules, verified and measured as a whole.

A module keeps its identity: only its `forward` is replaced, on the object. So whoever holds it (an attribute, a list, a closure) sees the change, and
`restore()` takes it away without a trace.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import nn

from gpuopt.core import stats
from gpuopt.core.errors import GpuoptError, UsageError
from gpuopt.core.live import Inputs
from gpuopt.core.result import OutputError, Relative, Report
from gpuopt.core.search import SearchSpec
from gpuopt.core.spec import BenchSpec, Tolerance
from gpuopt.pipeline import livemodel, pairs
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.search.live import answers, calls, overheard, searched, standin
from gpuopt.timing import clocks, loop

MIN_SHARE = 0.02
"""Of the run's time: what takes less cannot make the whole 2% faster if it took no time at all (Amdahl), which is what a winner has to gain."""
MAX_ERROR = 0.1
"""Relative RMSE of the whole's outputs, 20 dB: each module passed its own gate, and errors add up over steps. `Tolerance.max_error` replaces it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One kind of call of one module."""

    module: str
    """Where the pipeline holds it: `unet`, `vae.decoder`."""
    kind: str
    """Its class."""
    call: str
    """Dtypes and shapes of its tensors."""
    calls: int
    """A run."""
    ms: float
    """Of a run, all its calls together."""
    share: float
    """Of the run's time, 0..1."""
    outcome: str
    """`replaced`, `kept` (nothing was faster), `left alone` or `failed`."""
    reason: str = ""
    chosen: str = ""
    """The winner's settings."""
    speedup: float | None = None
    """Of the call, from the interleaved pairs of its search."""
    predicted_speedup: float | None = None
    """Of the whole by this one alone: 1 / (1 - share (1 - 1 / speedup)), Amdahl's law."""
    report: Report | None = None
    """Of its search."""


@dataclass(slots=True, kw_only=True)
class OptimizedPipeline:
    """What became of a pipeline. Use it as a context manager, or call `restore()`, to have the modules back as they were.

    While winners are in place, modules answer the calls that were recorded without gradients, from copies of their weights: `restore()` before weights are
    changed (an adapter that is loaded, a training step) and before the pipeline is saved, copied or moved.
    """

    parts: tuple[Part, ...]
    """The longest time first."""
    is_in_place: bool
    because: str
    """Why the winners are in place, or why nothing was changed."""
    predicted_speedup: float | None = None
    """Of the whole, by Amdahl's law from the parts."""
    measured: Relative | None = None
    """Of the whole, from interleaved blocks of runs without and with the winners."""
    before_ms: float | None = None
    after_ms: float | None = None
    outputs: tuple[OutputError, ...] = ()
    """What a run returned with the winners against without, of one seed."""
    own_error: float | None = None
    """By how much two runs without them differ: 0 for a run that repeats itself."""
    notes: tuple[str, ...] = ()
    _placed: list[_Placed] = field(default_factory=list)

    @property
    def error(self) -> float | None:
        """Relative RMSE of the worst output; None where nothing could be compared."""
        return answers.worst(self.outputs)

    @property
    def fallbacks(self) -> dict[str, dict[str, int]]:
        """Module -> signature -> calls so far that nothing was built for, and that the module itself has answered."""
        return {p.stand.name: dict(p.stand.fallbacks) for p in self._placed if p.stand.fallbacks}

    @property
    def served(self) -> dict[str, int]:
        """Module -> calls so far that went to what was built."""
        return {p.stand.name: sum(way.served for way in p.stand.ways) for p in self._placed}

    def restore(self) -> None:
        """Every module as it was. Harmless twice."""
        for placed in self._placed:
            placed.take_out()
            placed.stand.close()
        self._placed.clear()
        self.is_in_place = False

    def __enter__(self) -> OptimizedPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __str__(self) -> str:
        lines = [self.because]
        for part in self.parts:
            gain = (
                f", {part.speedup:.2f}×, which makes the whole {part.predicted_speedup:.2f}×"
                if part.speedup and part.predicted_speedup
                else ""
            )
            what = part.chosen if part.outcome == "replaced" else part.reason
            lines.append(f"{part.share:6.1%}  {part.module} ({part.kind}), {part.calls} calls of {part.call}: {part.outcome}, {what}{gain}")
        lines += [f"{name} ran as it was {sum(told.values())} times" for name, told in self.fallbacks.items()]
        return "\n".join((*lines, *self.notes))


@dataclass(slots=True, kw_only=True)
class _Placed:
    """A module and its stand-in."""

    module: nn.Module
    stand: standin.StandIn

    def put_in(self) -> None:
        self.module.forward = self.stand

    def take_out(self) -> None:
        if vars(self.module).get("forward") is self.stand:
            del self.module.forward


class _Raised(Exception):
    """run() raised with the winners in place."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def optimized(
    holder: Any, run: Callable[[], Any], *, spec: SearchSpec, bench: BenchSpec, tolerance: Tolerance, device: str = "auto"
) -> OptimizedPipeline:
    """Record, optimize, replace, verify, measure. What `run` raises by itself is raised; what it raises with the winners in place undoes them and is a result."""
    modules = overheard.modules_of(holder)
    if not modules:
        raise UsageError(
            f"no nn.Module was found in a {type(holder).__name__}",
            fix="pass the object that holds them; optimize(module, inputs) is for a single one",
        )
    barred = {id(m): overheard.why_not(m) for root in modules.values() for m in root.modules()}
    seeded = _seeded(run)
    found = overheard.outermost(modules, seeded)
    if not found:
        raise UsageError(
            f"run() called none of the modules: {', '.join(modules)}", fix="run=lambda: pipe(...), a whole run of what was passed"
        )
    where = _device(found, device)
    synchronize = clocks.for_device(where).synchronize
    recording = overheard.record(found, seeded, synchronize)
    before = answers.kept(recording.output)
    own_error = answers.worst(answers.compared(before, answers.kept(seeded())))
    parts, placed = _searched(recording, barred, where, spec=spec, bench=bench, tolerance=tolerance)
    result = OptimizedPipeline(
        parts=parts, is_in_place=False, because="", own_error=own_error, predicted_speedup=_amdahl(parts), _placed=placed
    )
    if not placed:
        result.because = "keep what you have: " + _nothing(parts)
        return result
    try:
        _judge(result, before, seeded, synchronize, bench=bench, tolerance=tolerance, spec=spec)
    except _Raised as raised:
        result.restore()
        error = raised.error
        result.because = f"keep what you have: with the winners in place run() raised {type(error).__name__}: {_first_line(error)}"
    except BaseException:
        result.restore()
        raise
    if not result.is_in_place:
        result.restore()
        result.parts = tuple(replace(p, outcome="kept", reason=result.because) if p.outcome == "replaced" else p for p in parts)
    return result


# -- the modules ----------------------------------------------------------------------------------------------------------------------


def _searched(
    recording: overheard.Recording, barred: Mapping[int, str], where: str, *, spec: SearchSpec, bench: BenchSpec, tolerance: Tolerance
) -> tuple[tuple[Part, ...], list[_Placed]]:
    parts: list[Part] = []
    placed: dict[int, _Placed] = {}
    left = spec.time_budget_s
    todo = [g for g in recording.groups if not (g.reason or barred.get(id(g.module)) or g.ns < MIN_SHARE * recording.ns)]
    waiting = sum(g.ns for g in todo)
    try:
        for group in recording.groups:
            share = group.ns / max(1, recording.ns)
            why = barred.get(id(group.module)) or group.reason
            if not why and share < MIN_SHARE:
                why = f"it takes {share:.1%} of the time, and could not make the whole {MIN_SHARE:.0%} faster if it took none"
            part = Part(
                module=group.name,
                kind=type(group.module).__name__,
                call=group.text,
                calls=group.calls,
                ms=group.ns / 1e6,
                share=share,
                outcome="left alone",
                reason=why,
            )
            if why:
                parts.append(part)
                continue
            own = replace(spec, time_budget_s=None if left is None else max(0.0, left) * group.ns / max(1, waiting))
            waiting -= group.ns
            part, way, seconds = _one(group, part, where, spec=own, bench=bench, tolerance=tolerance)
            left = None if left is None else left - seconds
            parts.append(part)
            if way is not None:
                if id(group.module) not in placed:
                    stand = standin.StandIn(name=group.name, original=group.module.forward)
                    placed[id(group.module)] = _Placed(module=group.module, stand=stand)
                placed[id(group.module)].stand.ways.append(way)
    except BaseException:
        for one in placed.values():
            one.stand.close()
        raise
    for one in placed.values():
        one.stand.expected = frozenset(g.text for g in recording.groups if g.module is one.module)
    return tuple(parts), list(placed.values())


def _one(
    group: overheard.Group, part: Part, where: str, *, spec: SearchSpec, bench: BenchSpec, tolerance: Tolerance
) -> tuple[Part, standin.Way | None, float]:
    """Search for one kind of call; what goes wrong with it is its own."""
    assert group.template is not None
    more = () if group.last is group.first else (_inputs(group.last),)
    try:
        found = searched.optimized(
            calls.Fixed(group.module, group.template),
            _inputs(group.first),
            spec=spec,
            bench=bench,
            tolerance=tolerance,
            device=where,
            more=more,
        )
    except ChildFailed as failure:
        return replace(part, outcome="failed", reason=failure.reason), None, 0.0
    except GpuoptError as error:
        return replace(part, outcome="failed", reason=error.message), None, 0.0
    choice, seconds = found.search.choice, found.search.seconds
    if found.keeps_input or choice is None or not isinstance(found.model, standin.StandIn):
        return replace(part, outcome="kept", reason=choice.because if choice else "", report=found.report), None, seconds
    way = found.model.ways[0]
    way.template, way.shape = group.template, group.shape
    try:
        way(group.first)
    except ValueError as error:
        found.close()
        return replace(part, outcome="failed", reason=f"the winner gives {error}", report=found.report), None, seconds
    way.served = 0
    speedup = choice.speedup
    predicted = 1 / (1 - part.share * (1 - 1 / speedup)) if speedup else None
    part = replace(part, outcome="replaced", chosen=choice.change, speedup=speedup, predicted_speedup=predicted, report=found.report)
    return part, way, seconds


def _inputs(tensors: Sequence[torch.Tensor]) -> Inputs:
    return replace(livemodel.of_call(tuple(tensors)), source="the calls of run()")


def _amdahl(parts: Sequence[Part]) -> float | None:
    """Of all that were replaced together."""
    won = [p for p in parts if p.outcome == "replaced" and p.speedup]
    return 1 / (1 - sum(p.share * (1 - 1 / p.speedup) for p in won if p.speedup)) if won else None


def _nothing(parts: Sequence[Part]) -> str:
    if parts and all(p.outcome == "left alone" for p in parts):
        return f"every module was left alone; the first, {parts[0].module}: {parts[0].reason}"
    failed = next((p for p in parts if p.outcome == "failed"), None)
    return f"{failed.module} failed: {failed.reason}" if failed is not None else "no module has anything faster that passes the gates"


# -- the whole ------------------------------------------------------------------------------------------------------------------------


def _judge(
    result: OptimizedPipeline,
    before: Any,
    run: Callable[[], Any],
    synchronize: Callable[[], None],
    *,
    bench: BenchSpec,
    tolerance: Tolerance,
    spec: SearchSpec,
) -> None:
    """Outputs and times of the whole, without and with the winners; they stay where both hold."""

    def with_winners() -> Any:
        try:
            return run()
        except Exception as error:  # the pipeline's own code with other modules in it: whatever it raises undoes them
            raise _Raised(error) from error

    with _in_place(result._placed):
        after = answers.kept(with_winners())
    result.outputs = answers.compared(before, after)
    why = _wrong(result, before, after, tolerance)
    if why:
        result.because = f"keep what you have: {why}"
        return

    def ended(call: Callable[[], Any]) -> Callable[[], None]:
        def once() -> None:
            call()
            synchronize()

        return once

    clock = clocks.for_device("cpu")  # a run is timed from its call to its last result, on the host
    block = replace(bench, min_iterations=1)

    def without() -> Any:
        return loop.block(ended(run), clock, block)

    def within() -> Any:
        with _in_place(result._placed):
            return loop.block(ended(with_winners), clock, block)

    sides = pairs.interleave({"before": without, "after": within}, bench)
    one, other = pairs.joined(sides["before"]), pairs.joined(sides["after"])
    result.before_ms, result.after_ms = median(one.samples_ns) / 1e6, median(other.samples_ns) / 1e6
    result.measured = stats.compare_pairs(pairs.split(one), pairs.split(other), threshold=spec.min_gain)
    told = f"{result.measured.ratio:.2f}× (95%: {result.measured.ci95_low:.3f} to {result.measured.ci95_high:.3f}), {result.before_ms:.4g} ms to {result.after_ms:.4g} ms"
    expected = f", {result.predicted_speedup:.2f}× was to be expected" if result.predicted_speedup else ""
    if result.measured.verdict != "faster":
        result.because = f"keep what you have: the whole is {result.measured.verdict}: {told}{expected}"
        return
    for placed in result._placed:
        placed.put_in()
    result.is_in_place = True
    error = result.error
    result.because = f"the whole is {told}{expected}; " + (
        f"its outputs differ by {error:.2g}" if error is not None else "its outputs hold no numbers to compare"
    )


def _wrong(result: OptimizedPipeline, before: Any, after: Any, tolerance: Tolerance) -> str:
    """What speaks against the outputs of the whole; "" where nothing does."""
    lost = next((row for row in result.outputs if row.num_nonfinite > row.num_nonfinite_reference), None)
    if lost is not None:
        return f"output {lost.name} of the whole has {lost.num_nonfinite} values that are NaN or Inf"
    misfit = next((row for row in result.outputs if not row.passed and row.exact_mismatches is None), None)
    if misfit is not None:
        return f"output {misfit.name} of the whole: {misfit.reason}"
    limit = tolerance.max_error if tolerance.max_error is not None else MAX_ERROR
    limit = max(limit, 2 * (result.own_error or 0.0))
    if result.error is not None and result.error > limit:
        return f"the outputs of the whole differ by {result.error:.2g} of their size, and {limit:.2g} is allowed"
    if answers.texts(before) != answers.texts(after):
        result.notes = (*result.notes, "run() returns other text than before")
    return ""


@contextlib.contextmanager
def _in_place(placed: Sequence[_Placed]) -> Iterator[None]:
    try:
        for one in placed:
            one.put_in()
        yield
    finally:
        for one in placed:
            one.take_out()


def _seeded(run: Callable[[], Any]) -> Callable[[], Any]:
    """The run with the same random numbers every time, and the caller's generators left as they were."""

    def again() -> Any:
        state = random.getstate()
        numpy = sys.modules.get("numpy")
        kept = numpy.random.get_state() if numpy is not None else None
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(0)
                random.seed(0)
                if numpy is not None:
                    numpy.random.seed(0)
                return run()
        finally:
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(kept)

    return again


def _device(modules: Mapping[str, nn.Module], asked: str) -> str:
    """Where the pipeline is: it is measured there, and not moved."""
    places = {str(p.device) for m in modules.values() for p in m.parameters()}
    found = next((place for place in sorted(places) if place.startswith("cuda")), "cpu")
    if asked not in ("auto", found, found.partition(":")[0]):
        raise UsageError(f"the pipeline is on {found}, not on {asked}", fix=f"move it to {asked} first")
    return found


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
