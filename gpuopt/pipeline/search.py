"""The strategy of `optimize`, pure: a generator that asks for one experiment after the other and is sent what came out.

It never looks at a clock, a file or a process. All it knows of time are the seconds that the answers say they took, so the same answers lead to the same
questions: a journal of answers is all that `--resume` needs, and a record of a whole space is all that a test of the strategy needs.

    Screen      build a candidate, time a few short blocks, verify it where it could still win
    Explain     trace one that was screened: its bounds, where its time goes, and the changes the doctor proposes
    Mend        find what must stay in fp32 for one that failed the accuracy gate
    Finals      the best of them and the input, verified in full, in interleaved pairs
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median

from gpuopt.core.result import Status
from gpuopt.core.search import Choice, Screened, Search, SearchSpec, Timed, Trial
from gpuopt.core.spec import BackendSpec, Candidate, Change
from gpuopt.pipeline import tune
from gpuopt.pipeline.predict import Predictor

GOOD = frozenset({"screened", "finalist", "chosen"})
"""Outcomes of a candidate that passed the gates and keeps to the budgets."""
LATE = 1.15
"""A candidate this much slower than the best verified one is not verified: screening is worth a few percent, and nothing further behind becomes a finalist."""
MIN_CHANCE = 0.05
"""A candidate less likely than this to work and to beat the best by `min_gain` is not built."""
WORTH = 0.003
"""Nor one that is not expected to gain this much (misses count as nothing) if it takes as long as a candidate takes on average; in proportion if it takes more or less."""
MAX_FIXES = 6
"""Changes of the doctor tried on one candidate, the dearest first."""
MAX_ROUNDS = 3
"""How often the best one so far is traced again for what its own trace proposes."""
GROWTH = 1.02
"""A doubled batch that gains less than this in samples a second, twice, ends the climb."""
MEMORY_SHARE = 0.9
"""Of the device's memory a batch may be predicted to need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """Try one."""

    candidate: Candidate
    limit_ms: float | None = None
    """Above it verification is left out: it cannot be chosen any more."""

    @property
    def key(self) -> str:
        """Of its answer in a journal."""
        return f"screen {tune.key(self.candidate)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explain:
    """Trace one that was screened."""

    candidate: Candidate

    @property
    def key(self) -> str:
        """Of its answer in a journal."""
        return f"explain {tune.key(self.candidate)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finals:
    """Time these against each other; the first is the input."""

    candidates: tuple[Candidate, ...]

    @property
    def key(self) -> str:
        """Of its answer in a journal."""
        return "finals " + " ".join(tune.key(c) for c in self.candidates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A change the doctor would make."""

    change: Change
    origin: str
    """The rule's code."""
    gain_low_ms: float = 0.0
    gain_high_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """What a trace said."""

    facts: tune.Facts | None = None
    """Of the input alone: the others are judged from it."""
    proposals: tuple[Proposal, ...] = ()
    seconds: float = 0.0
    reason: str = ""
    """Why it could not be traced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mend:
    """Find the modules that have to stay in fp32 for a candidate that failed the accuracy gate to pass it."""

    candidate: Candidate

    @property
    def key(self) -> str:
        """Of its answer in a journal."""
        return f"mend {tune.key(self.candidate)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """What has to stay."""

    kept: tuple[str, ...] | None = None
    """For `keep_fp32`; None where no set was found, () where the precision is not at fault."""
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalists:
    """Key -> what the pairs said."""

    timed: dict[str, Timed]
    seconds: float = 0.0


Ask = Screen | Explain | Mend | Finals
Answer = Screened | Explained | Mended | Finalists
Steps = Generator[Ask, Answer, Search]


@dataclass(slots=True)
class _State:
    """What is known so far."""

    base: Candidate
    spec: SearchSpec
    predictor: Predictor | None = None
    trials: dict[str, Trial] = field(default_factory=dict)
    known: dict[str, Candidate] = field(default_factory=dict)
    spent_s: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    stopped: str = ""
    peaks: dict[tuple[str, int], int] = field(default_factory=dict)
    finals_failed: bool = False
    """A finalist failed: those called slower on its account are in the race again."""

    @property
    def facts(self) -> tune.Facts:
        assert self.predictor is not None
        return self.predictor.facts

    def cost(self, candidate: Candidate, ms: float) -> float:
        """What is made small: the call, or its time a sample."""
        return ms / _batch(candidate) if self.spec.goal == "throughput" else ms

    def best(self) -> Candidate | None:
        """The cheapest that was verified and keeps to the budgets; the input while nothing is better."""
        good = [(self.cost(self.known[k], t.screened_ms), k) for k, t in self.trials.items() if t.outcome in GOOD and t.screened_ms]
        return self.known[min(good)[1]] if good else None

    def best_cost(self) -> float:
        """Its cost."""
        found = self.best()
        assert found is not None
        ms = self.trials[tune.key(found)].screened_ms
        assert ms is not None
        return self.cost(found, ms)

    def plan(self, candidate: Candidate, origin: str) -> str:
        """Take a candidate into the books; those known stay as they are."""
        key = tune.key(candidate)
        if key not in self.trials:
            self.known[key] = candidate
            self.trials[key] = Trial(key=key, label=tune.words(candidate, self.base), origin=origin, batch=candidate.dims.get("N"))
        return key

    def close(self, key: str, outcome: str, reason: str) -> None:
        self.trials[key] = replace(self.trials[key], outcome=outcome, reason=reason)

    def seconds(self, candidate: Candidate) -> float:
        """What trying it is expected to take: as long as its backend took here so far, else as the table says, stretched like the others were."""
        took = [(self.known[k], t.seconds) for k, t in self.trials.items() if t.seconds is not None and t.screened_ms is not None]
        same = [seconds for one, seconds in took if str(one.backend) == str(candidate.backend)]
        stretch = [seconds / tune.way_of(one).build_s for one, seconds in took]
        return median(same) if same else tune.way_of(candidate).build_s * (median(stretch) if stretch else 1.0)

    def over_time(self) -> bool:
        return self.spec.time_budget_s is not None and self.spent_s >= self.spec.time_budget_s

    def tried(self) -> int:
        return sum(t.seconds is not None for t in self.trials.values())

    def spent(self) -> bool:
        """No budget is left to try another."""
        return self.over_time() or self.tried() >= self.spec.max_trials


def search(base: Candidate, spec: SearchSpec) -> Steps:
    """Ask until nothing left is likely to be better, or a budget is spent. `base` is the input as it stands: it is screened first and is always a finalist."""
    state = _State(base, spec)
    yield from _screen(state, base, "input")
    if state.best() is None:
        state.stopped = "the input itself could not be timed"
        return _found(state, None)
    explained = yield from _explain(state, base)
    if explained.facts is None:
        state.stopped = f"the input could not be explained: {explained.reason}"
        return _found(state, None)
    state.predictor = Predictor(explained.facts)
    ms = state.trials[tune.key(base)].screened_ms
    assert ms is not None
    state.predictor.tell(base, ms)
    state.predictor.worked(base)
    _plan_space(state)
    if spec.dry_run or spec.time_budget_s == 0:
        state.stopped = "a plan: nothing but the input was built" if spec.dry_run else "a time budget of 0 builds nothing but the input"
        return _found(state, _keep(state, "no candidate was tried"))
    yield from _climb(state)
    yield from _mends(state)
    yield from _fixes(state, explained.proposals, base)
    for _ in range(MAX_ROUNDS):
        leader = state.best()
        assert leader is not None
        if leader == base or state.spent():
            break
        more = yield from _explain(state, leader)
        if not (yield from _fixes(state, more.proposals, leader)):
            break
    if spec.goal == "throughput" and not spec.batches:
        yield from _batches(state)
    return (yield from _finish(state))


# -- the space ------------------------------------------------------------------------------------------------------------------------


def _plan_space(state: _State) -> None:
    spec, base = state.spec, state.base
    for candidate in tune.space(base, state.facts, backends=spec.backends, precisions=spec.precisions, rewrites=spec.rewrites):
        for batch in spec.batches or (None,):
            state.plan(candidate if batch is None else _at(candidate, batch), "space")
    assert state.predictor is not None
    for key, trial in state.trials.items():
        if trial.outcome == "planned":
            state.trials[key] = _with_prediction(state, trial)


def _with_prediction(state: _State, trial: Trial) -> Trial:
    assert state.predictor is not None
    candidate = state.known[trial.key]
    expected = state.predictor.expect(candidate)
    return replace(
        trial,
        predicted_ms=expected.ms,
        predicted_low_ms=expected.low_ms,
        predicted_high_ms=expected.high_ms,
        bound_ms=tune.bound_ms(candidate, state.facts),
    )


def _climb(state: _State) -> Generator[Ask, Answer, None]:
    """The candidate with the most expected gain a second next, until none is left that is likely enough to win."""
    while True:
        if state.over_time():
            state.stopped = f"the time budget of {state.spec.time_budget_s:g} s is spent"
            return
        if state.tried() >= state.spec.max_trials:
            state.stopped = f"{state.spec.max_trials} candidates were tried"
            return
        key = _next(state)
        if key is None:
            state.stopped = state.stopped or f"nothing left is likely to beat the best by {state.spec.min_gain:.0%}"
            return
        yield from _screen(state, state.known[key], state.trials[key].origin)


def _next(state: _State) -> str | None:
    assert state.predictor is not None
    best = state.best_cost()
    wanted = best * (1 - state.spec.min_gain)
    found: tuple[float, str] | None = None
    usual_s = fmean(state.seconds(candidate) for candidate in state.known.values())
    for key, trial in state.trials.items():
        if trial.outcome != "planned":
            continue
        candidate = state.known[key]
        batch = _batch(candidate) if state.spec.goal == "throughput" else 1
        bound = tune.bound_ms(candidate, state.facts)
        if bound is not None and bound / batch > best:
            state.close(key, "pruned", f"its floor of {bound / batch:.4g} ms is above the best, {best:.4g} ms")
            continue
        expected, works = state.predictor.expect(candidate), state.predictor.chance_ok(candidate)
        gain = works * expected.expected_gain(wanted * batch)
        seconds = state.seconds(candidate)
        if works * expected.chance_below(wanted * batch) < MIN_CHANCE or gain < WORTH * seconds / usual_s:
            continue  # not closed: a later measurement may raise its chances
        if state.spec.time_budget_s is not None and state.spent_s + seconds > state.spec.time_budget_s:
            continue  # something quicker may still fit
        gain /= seconds
        if found is None or gain > found[0]:
            found = (gain, key)
    return found[1] if found else None


# -- what the doctor proposes -----------------------------------------------------------------------------------------------------------


def _fixes(state: _State, proposals: Sequence[Proposal], on: Candidate) -> Generator[Ask, Answer, bool]:
    """Try what a trace proposes, on the candidate it is a trace of and on the best one. True where one of them became the best."""
    before = state.best()
    wanted = sorted(proposals, key=lambda p: -(p.gain_low_ms + p.gain_high_ms))[:MAX_FIXES]
    for proposal in wanted:
        for target in _distinct((state.best() or on, on)):
            if state.spent():
                return state.best() != before
            changed = proposal.change.applied(target)
            key = state.plan(changed, proposal.origin)
            if state.trials[key].outcome != "planned" or not _allowed(state, changed):
                continue
            yield from _screen(state, changed, proposal.origin)
    return state.best() != before


def _allowed(state: _State, candidate: Candidate) -> bool:
    """Within what the user narrowed the search to."""
    spec = state.spec
    key = tune.key(candidate)
    if spec.backends and str(candidate.backend) not in {str(BackendSpec.parse(text)) for text in spec.backends}:
        state.close(key, "pruned", "its backend is not among those asked for")
        return False
    if spec.precisions and candidate.precision is not None and candidate.precision.value not in spec.precisions:
        state.close(key, "pruned", "its precision is not among those asked for")
        return False
    unasked = [r for r in candidate.transforms.rewrites if r not in (*(spec.rewrites or ()), *state.base.transforms.rewrites)]
    if spec.rewrites is not None and unasked:
        state.close(key, "pruned", f"its rewrite {unasked[0]} is not among those asked for")
        return False
    if spec.batches and candidate.dims.get("N") not in spec.batches:
        state.close(key, "pruned", "its batch is not among those asked for")
        return False
    if spec.goal == "latency" and candidate.dims != state.base.dims:
        state.close(key, "pruned", "it changes the sizes, and latency is wanted at these")
        return False
    return True


# -- what failed the accuracy gate -------------------------------------------------------------------------------------------------------


def _mends(state: _State) -> Generator[Ask, Answer, None]:
    """Of each precision that failed the gate, the fastest candidate: the smallest set of modules kept in fp32 with which it passes, if there is one."""
    failed: dict[str, list[tuple[float, str]]] = {}
    for key, trial in state.trials.items():
        candidate = state.known[key]
        if trial.outcome in (Status.ACCURACY_FAIL, Status.NAN) and candidate.precision is not None and trial.screened_ms:
            failed.setdefault(candidate.precision.value, []).append((state.cost(candidate, trial.screened_ms), key))
    for precision, ones in failed.items():
        cost, key = min(ones)
        candidate = state.known[key]
        passes = any(
            t.outcome in GOOD and (p := state.known[k].precision) is not None and p.value == precision for k, t in state.trials.items()
        )
        if passes or candidate.transforms.keep_fp32 or cost >= state.best_cost() or state.spent():
            continue
        answer = yield Mend(candidate=candidate)
        assert isinstance(answer, Mended)
        state.spent_s += answer.seconds
        state.phases["mending"] = state.phases.get("mending", 0.0) + answer.seconds
        if answer.kept:
            yield from _screen(
                state, replace(candidate, transforms=replace(candidate.transforms, keep_fp32=answer.kept)), "sensitive modules"
            )
        elif answer.note:
            state.trials[key] = replace(state.trials[key], reason=f"{state.trials[key].reason}; {answer.note}")


# -- batches --------------------------------------------------------------------------------------------------------------------------


def _batches(state: _State) -> Generator[Ask, Answer, None]:
    """Powers of two from the batch given, while samples a second grow and memory, by the peaks seen so far, allows it; then the steps between."""
    leader = state.best()
    if leader is None or "N" not in leader.dims:
        return
    start = leader.dims["N"]
    rates: dict[int, float] = {start: 1 / state.best_cost()}
    flat, batch = 0, start
    while flat < 2 and not state.spent():
        batch *= 2
        rate = yield from _at_batch(state, leader, batch)
        if rate is None:
            break
        flat = flat + 1 if rate < max(rates.values()) * GROWTH else 0
        rates[batch] = rate
    top = max(rates, key=lambda b: rates[b])
    for between in (top * 3 // 4, top * 3 // 2):
        if between not in rates and between > 0 and not state.spent():
            rate = yield from _at_batch(state, leader, between)
            if rate is not None:
                rates[between] = rate


def _at_batch(state: _State, leader: Candidate, batch: int) -> Generator[Ask, Answer, float | None]:
    """Samples a millisecond there; None where it does not fit, does not work or is over the latency budget."""
    candidate = _at(leader, batch)
    key = state.plan(candidate, "batch")
    needed = _memory(state, leader, batch)
    limits = [b for b in (state.spec.max_memory_bytes, int(MEMORY_SHARE * (state.facts.memory_bytes or 0)) or None) if b]
    if needed is not None and limits and needed > min(limits):
        state.close(key, "pruned", f"predicted to need {needed / 2**30:.1f} GiB, and {min(limits) / 2**30:.1f} may be used")
        return None
    state.trials[key] = _with_prediction(state, state.trials[key])
    yield from _screen(state, candidate, "batch")
    trial = state.trials[key]
    return batch / trial.screened_ms if trial.outcome == "screened" and trial.screened_ms else None


def _memory(state: _State, leader: Candidate, batch: int) -> int | None:
    """Peak bytes at this batch, on the line through the two largest batches seen with these settings; in proportion where one is known."""
    settings = tune.key(_at(leader, 1))
    seen = sorted((b, peak) for (name, b), peak in state.peaks.items() if name == settings)
    if not seen:
        return None
    if len(seen) == 1:
        return round(seen[0][1] * batch / seen[0][0])
    (b0, p0), (b1, p1) = seen[-2:]
    slope = max(0.0, (p1 - p0) / (b1 - b0))
    return round(p1 + slope * (batch - b1))


# -- the end --------------------------------------------------------------------------------------------------------------------------


def _finish(state: _State) -> Steps:
    """Finals; where a finalist fails them, the search goes on without it, and those that were left behind on its account come back."""
    base_key = tune.key(state.base)
    choice = _keep(state, "no candidate that passed the gates was faster in screening")
    for _ in range(MAX_ROUNDS):
        chosen = _finalists(state)
        if not chosen:
            break
        answer = yield Finals(candidates=(state.base, *(state.known[k] for k in chosen)))
        assert isinstance(answer, Finalists)
        state.spent_s += answer.seconds
        state.phases["finals"] = state.phases.get("finals", 0.0) + answer.seconds
        for key, timed in answer.timed.items():
            _judged(state, key, timed)
        choice = _choose(state, answer.timed)
        failed = [k for k in chosen if k in answer.timed and answer.timed[k].status != Status.OK]
        if not choice.keeps_input or not failed:
            break
        state.finals_failed = True
        if not state.over_time():
            yield from _climb(state)
    state.close(choice.key, "chosen", state.trials[choice.key].reason if choice.key != base_key else "")
    return _found(state, choice)


def _finalists(state: _State) -> list[str]:
    """Keys of the best by screening, close enough to the best of all; none where none is faster than the input."""
    base_key = tune.key(state.base)
    outcomes = GOOD | {"slower"} if state.finals_failed else GOOD

    def cost(key: str) -> float:
        return state.cost(state.known[key], state.trials[key].screened_ms or math.inf)

    ranked = sorted((k for k, t in state.trials.items() if t.outcome in outcomes and t.screened_ms and k != base_key), key=cost)
    faster = [k for k in ranked if cost(k) < cost(base_key) * (1 - state.spec.min_gain / 2)]
    return [k for k in faster if cost(k) <= cost(faster[0]) * LATE][: max(1, state.spec.finalists - 1)]


def _judged(state: _State, key: str, timed: Timed) -> None:
    trial = state.trials.get(key)
    if trial is None:
        return
    if timed.status == Status.OK:
        rate = _batch(state.known[key]) / timed.ms * 1e3 if timed.ms else None
        trial = replace(trial, outcome="finalist", measured_ms=timed.ms, samples_per_s=rate, reason="")
    elif key != tune.key(state.base):
        trial = replace(trial, outcome=timed.status, reason=timed.reason)
    state.trials[key] = replace(trial, peak_bytes=timed.peak_bytes or trial.peak_bytes)


def _choose(state: _State, timed: Mapping[str, Timed]) -> Choice:
    base_key = tune.key(state.base)
    winners = [
        (t.ratio, k)
        for k, t in timed.items()
        if k != base_key and t.status == Status.OK and t.verdict == "faster" and t.ratio and t.ms and _within(state, t)
    ]
    if not winners:
        base = timed.get(base_key)
        tried = [(t.ratio, k, t) for k, t in timed.items() if k != base_key and t.status == Status.OK and t.ratio]
        if not tried:
            return _keep(state, "no finalist passed verification: " + "; ".join(t.reason for k, t in timed.items() if k != base_key)[:300])
        ratio, key, nearest = max(tried)
        over = "" if _within(state, nearest) else ", and is over a budget"
        return _keep(
            state,
            f"the nearest, {state.trials[key].label}, is {ratio:.3f}x as fast ({_interval(nearest)}), which is not more than the noise{over}"
            + (f"; the input takes {base.ms:.4g} ms" if base and base.ms else ""),
        )
    ratio, key = max(winners)
    found, base = timed[key], timed.get(base_key)
    others = [k for r, k in winners if k != key and (timed[k].high or 0) >= (found.low or 0)]
    alike = f"; {len(others)} other finalist{'s are' if len(others) > 1 else ' is'} within the noise of it" if others else ""
    sample = " a sample" if state.spec.goal == "throughput" else ""
    before = state.cost(state.base, base.ms) if base and base.ms else None
    return Choice(
        key=key,
        keeps_input=False,
        because=f"{ratio:.2f}x as fast as the input ({_interval(found)}, interleaved pairs): "
        f"{state.cost(state.known[key], found.ms or 0):.4g} ms{sample}" + (f" against {before:.4g} ms" if before else "") + alike,
        speedup=ratio,
        speedup_low=found.low,
        speedup_high=found.high,
        change=state.trials[key].label,
    )


def _within(state: _State, timed: Timed) -> bool:
    spec = state.spec
    if spec.latency_budget_ms is not None and (timed.ms or math.inf) > spec.latency_budget_ms:
        return False
    return spec.max_memory_bytes is None or (timed.peak_bytes or 0) <= spec.max_memory_bytes


def _keep(state: _State, because: str) -> Choice:
    key, spec = tune.key(state.base), state.spec
    ms = state.trials[key].time_ms
    if spec.latency_budget_ms is not None and ms is not None and ms > spec.latency_budget_ms:
        because += f"; the input itself takes {ms:.4g} ms, over the latency budget of {spec.latency_budget_ms:g} ms: a smaller --batch, or a larger budget"
    return Choice(key=key, keeps_input=True, because=f"keep what you have: {because}")


def _interval(timed: Timed) -> str:
    return f"95%: {timed.low:.3f} to {timed.high:.3f}" if timed.low is not None and timed.high is not None else "no interval"


def _found(state: _State, choice: Choice | None) -> Search:
    best = state.best_cost() if state.best() is not None else None
    told = []
    for trial in state.trials.values():
        if trial.outcome == "planned" and choice is not None and not state.spec.dry_run and state.spec.time_budget_s != 0:
            trial = replace(_with_prediction(state, trial), outcome="pruned", reason=_not_tried(state, trial, best))
        if trial.samples_per_s is None and trial.time_ms:
            trial = replace(trial, samples_per_s=_batch(state.known[trial.key]) / trial.time_ms * 1e3)
        told.append(trial)
    taken = [t for t in told if t.seconds is not None]
    rest = sorted((t for t in told if t.seconds is None), key=lambda t: t.predicted_ms or math.inf)
    errors = [
        abs(t.predicted_ms - t.screened_ms) / t.screened_ms for t in taken if t.predicted_ms and t.screened_ms and t.origin != "input"
    ]
    # What screening alone put ahead of the chosen one in both is within its noise: the pairs have said which is the faster.
    chosen = next((t for t in taken if t.outcome == "chosen"), None)
    front = pareto(t for t in taken if t.outcome in GOOD and not (chosen is not None and t is not chosen and _beats(t, chosen)))
    return Search(
        goal=state.spec.goal,
        trials=(*taken, *rest),
        choice=choice,
        pareto=tuple(t.key for t in front),
        knee=knee(front),
        stopped=state.stopped,
        seconds=state.spent_s,
        by_phase_s=dict(state.phases),
        prediction_error=median(errors) if errors else None,
    )


def _not_tried(state: _State, trial: Trial, best: float | None) -> str:
    if state.stopped.startswith(("the time budget", f"{state.spec.max_trials} candidates")):
        return f"not tried: {state.stopped}"
    assert state.predictor is not None
    seconds, budget = state.seconds(state.known[trial.key]), state.spec.time_budget_s
    if budget is not None and state.spent_s + seconds > budget:
        return f"not tried: it takes about {seconds:.0f} s, and the time budget of {budget:g} s had {max(0.0, budget - state.spent_s):.0f} left"
    expected = state.predictor.expect(state.known[trial.key])
    batch = _batch(state.known[trial.key]) if state.spec.goal == "throughput" else 1
    return f"expected {expected.low_ms / batch:.4g} to {expected.high_ms / batch:.4g} ms, the best takes {best:.4g} ms"


def _beats(one: Trial, other: Trial) -> bool:
    """In latency and in samples a second, equal in both included."""
    return (one.time_ms or math.inf) <= (other.time_ms or math.inf) and (one.samples_per_s or 0) >= (other.samples_per_s or 0)


def pareto(trials: Iterable[Trial]) -> list[Trial]:
    """Those that no other beats in both latency and samples a second, by latency."""
    front: list[Trial] = []
    for trial in sorted((t for t in trials if t.time_ms and t.samples_per_s), key=lambda t: (t.time_ms or 0, -(t.samples_per_s or 0))):
        if not front or (trial.samples_per_s or 0) > (front[-1].samples_per_s or 0):
            front.append(trial)
    return front


def knee(front: Sequence[Trial]) -> str | None:
    """The last point up to which each percent of latency bought at least a percent of throughput; None for fewer than two points."""
    if len(front) < 2:
        return None
    at = front[0]
    for trial in front[1:]:
        if math.log((trial.samples_per_s or 1) / (at.samples_per_s or 1)) < math.log((trial.time_ms or 1) / (at.time_ms or 1)):
            break
        at = trial
    return at.key


# -- asking ---------------------------------------------------------------------------------------------------------------------------


def _screen(state: _State, candidate: Candidate, origin: str) -> Generator[Ask, Answer, None]:
    key = state.plan(candidate, origin)
    if state.predictor is not None:
        state.trials[key] = _with_prediction(state, state.trials[key])
    limit = state.best_cost() * LATE if state.best() is not None else None
    if limit is not None and state.spec.goal == "throughput":
        limit *= _batch(candidate)
    answer = yield Screen(candidate=candidate, limit_ms=limit)
    assert isinstance(answer, Screened)
    state.spent_s += answer.seconds
    state.phases["screening"] = state.phases.get("screening", 0.0) + answer.seconds
    outcome, reason = answer.status, answer.reason
    if answer.status == Status.OK:
        outcome = "screened"
        if candidate != state.base:
            outcome, reason = _against_budgets(state, answer)
    if state.predictor is not None:
        if answer.ms is not None and answer.status in (Status.OK, Status.SKIPPED):
            state.predictor.tell(candidate, answer.ms)
        if answer.status == Status.OK:
            state.predictor.worked(candidate)
        elif answer.status != Status.SKIPPED:
            state.predictor.failed(candidate)
    if answer.peak_bytes and "N" in candidate.dims:
        state.peaks[tune.key(_at(candidate, 1)), candidate.dims["N"]] = answer.peak_bytes
    state.trials[key] = replace(
        state.trials[key],
        outcome="slower" if outcome == Status.SKIPPED else outcome,
        reason=reason,
        screened_ms=answer.ms,
        peak_bytes=answer.peak_bytes,
        seconds=answer.seconds,
    )
    if outcome == Status.UNSUPPORTED:
        yield from _ban(state, candidate, reason)


def _ban(state: _State, candidate: Candidate, reason: str) -> Generator[Ask, Answer, None]:
    """A rewrite that cannot be made is the same through every backend: those planned at this precision that contain it are closed, and planned again without it.

    Seen where nothing else can be the cause: eager runs whatever the module has become. Where several rewrites are new, each is tried alone: that takes seconds,
    and a wrong guess would cost a good one. Other precisions are left alone: a kernel may be missing in one format only.
    """
    if candidate.backend.name != "eager":
        return
    worked = {r for k, t in state.trials.items() if t.outcome in GOOD or t.outcome == "slower" for r in state.known[k].transforms.rewrites}
    suspects = [r for r in candidate.transforms.rewrites if r not in worked]
    if len(suspects) > 1:
        for name in suspects:
            alone = replace(candidate, transforms=replace(candidate.transforms, rewrites=(*state.base.transforms.rewrites, name)))
            if not state.spent() and state.trials[state.plan(alone, "rewrite alone")].seconds is None:
                yield from _screen(state, alone, "rewrite alone")
        return
    for banned in suspects:
        for key in [k for k, t in state.trials.items() if t.outcome == "planned" and state.known[k].precision == candidate.precision]:
            other = state.known[key]
            if banned not in other.transforms.rewrites:
                continue
            state.close(key, "pruned", f"{banned}: {reason}")
            rest = tuple(name for name in other.transforms.rewrites if name != banned)
            again = state.plan(replace(other, transforms=replace(other.transforms, rewrites=rest)), state.trials[key].origin)
            if state.predictor is not None and state.trials[again].predicted_ms is None:
                state.trials[again] = _with_prediction(state, state.trials[again])


def _against_budgets(state: _State, answer: Screened) -> tuple[str, str]:
    spec = state.spec
    if spec.latency_budget_ms is not None and answer.ms is not None and answer.ms > spec.latency_budget_ms:
        return "over budget", f"{answer.ms:.4g} ms is over the latency budget of {spec.latency_budget_ms:g} ms"
    if spec.max_memory_bytes is not None and answer.peak_bytes is not None and answer.peak_bytes > spec.max_memory_bytes:
        return "over budget", f"{answer.peak_bytes / 2**30:.2f} GiB is over the {spec.max_memory_bytes / 2**30:.2f} GiB allowed"
    return "screened", ""


def _explain(state: _State, candidate: Candidate) -> Generator[Ask, Answer, Explained]:
    answer = yield Explain(candidate=candidate)
    assert isinstance(answer, Explained)
    state.spent_s += answer.seconds
    state.phases["explaining"] = state.phases.get("explaining", 0.0) + answer.seconds
    return answer


def _at(candidate: Candidate, batch: int) -> Candidate:
    return replace(candidate, dims={**candidate.dims, "N": batch})


def _batch(candidate: Candidate) -> int:
    return candidate.dims.get("N", 1)


def _distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    found: list[Candidate] = []
    for candidate in candidates:
        if candidate not in found:
            found.append(candidate)
    return found
