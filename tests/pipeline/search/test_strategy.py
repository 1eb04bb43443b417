"""The strategy of `optimize` against made-up worlds: whatever happens there, it never returns what is slower or wrong, keeps to its budgets, and says why."""

from __future__ import annotations

import importlib.util
import itertools
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gpuopt.core.search import Screened, SearchSpec, Trial
from gpuopt.core.spec import BackendSpec, Candidate, Change, Precision
from gpuopt.pipeline.search import predict, tune
from gpuopt.pipeline.search.books import GOOD, Books
from gpuopt.pipeline.search.frontier import knee, pareto
from gpuopt.pipeline.search.questions import Explain, Explained, Finals, Proposal, Screen
from gpuopt.pipeline.search.screening import screen
from gpuopt.pipeline.search.strategy import search

_spec = importlib.util.spec_from_file_location("pipeline_worlds", Path(__file__).with_name("worlds.py"))
assert _spec is not None and _spec.loader is not None
w: Any = sys.modules.get("pipeline_worlds")
if w is None:  # its dataclasses look their module up by name
    w = sys.modules["pipeline_worlds"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(w)

FEW = settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.generate), derandomize=True)  # a seed does not shrink
NARROW: dict[str, Any] = {"backends": ("eager", "inductor", "cudagraphs"), "precisions": ("fp32", "fp16"), "rewrites": ("no_mask",)}


def world(effects: dict[str, float] | None = None, **fields: Any) -> Any:
    """20 ms in fp32 on a GPU at batch 8; effects multiply."""
    known = fields.pop("facts", tune.Facts(wall_ms=20.0, on_gpu=True, batch=8, rewrites={"no_mask": ""}))
    return w.World(facts=known, ms=fields.pop("ms", lambda c: 20.0 * w.product(effects or {}, c)), noise=0.0, **fields)


specs = st.builds(
    SearchSpec,
    goal=st.sampled_from(["latency", "throughput"]),
    latency_budget_ms=st.sampled_from([None, None, 5.0, 15.0, 30.0]),
    max_memory_bytes=st.sampled_from([None, None, 2**30, 3 * 2**30]),
    time_budget_s=st.sampled_from([None, 30.0, 200.0, 1000.0]),
    max_trials=st.sampled_from([1, 3, 12, 64]),
    finalists=st.integers(2, 5),
    rewrites=st.sampled_from([None, (), ("no_mask",)]),
)


# -- what holds in every world ---------------------------------------------------------------------------------------------------------


def per_sample(spec: SearchSpec, made: Any, candidate: Candidate) -> float:
    ms: float = made.ms(candidate)
    return ms / candidate.dims["N"] if spec.goal == "throughput" else ms


@FEW
@given(seed=st.integers(0, 10**6), spec=specs)
def test_the_answer_is_never_slower_than_the_input_and_never_something_that_failed(seed: int, spec: SearchSpec) -> None:
    made = w.random_world(seed)
    found = made.found(spec)
    assert found.choice is not None
    chosen = made.candidate(found.choice.key)
    (trial,) = [t for t in found.trials if t.outcome == "chosen"]
    assert trial.key == found.choice.key and found.choice.keeps_input == (chosen == made.base)
    assert found.choice.because
    if found.choice.keeps_input:
        assert found.choice.because.startswith("keep what you have: ") and found.choice.speedup is None
        return
    assert per_sample(spec, made, chosen) < per_sample(spec, made, made.base)
    assert made.fails(chosen) is None and made.fails_late(chosen) is None
    assert found.choice.speedup is not None and found.choice.speedup > 1
    if spec.latency_budget_ms is not None:
        assert trial.measured_ms is not None and trial.measured_ms <= spec.latency_budget_ms
    if spec.max_memory_bytes is not None:
        assert made.peak(chosen) <= spec.max_memory_bytes


@FEW
@given(seed=st.integers(0, 10**6), spec=specs)
def test_every_trial_ends_with_an_outcome_and_a_reason(seed: int, spec: SearchSpec) -> None:
    made = w.random_world(seed)
    found = made.found(spec)
    assert len({t.key for t in found.trials}) == len(found.trials)
    assert found.trials[0].origin == "input" and found.stopped
    for trial in found.trials:
        assert trial.outcome != "planned" and trial.label
        assert trial.outcome in GOOD or trial.reason, trial
        assert (trial.seconds is not None) == (trial.key in {tune.key(c) for c in made.screens()})
    assert found.seconds == pytest.approx(sum(found.by_phase_s.values()))


@FEW
@given(seed=st.integers(0, 10**6), spec=specs)
def test_budgets_are_kept_and_nothing_is_asked_twice(seed: int, spec: SearchSpec) -> None:
    made = w.random_world(seed)
    steps, answer, spent = search(made.base, spec), None, 0.0
    keys: list[str] = []
    while True:
        try:
            question = next(steps) if answer is None else steps.send(answer)
        except StopIteration:
            break
        if spec.time_budget_s is not None and len(keys) >= 2 and not isinstance(question, Finals):
            assert spent < spec.time_budget_s, "something was begun after the time was spent"
        keys.append(question.key)
        answer = made.answer(question)
        spent += answer.seconds
    assert len(set(keys)) == len(keys)
    assert sum(key.startswith("screen") for key in keys) <= spec.max_trials


@FEW
@given(seed=st.integers(0, 10**6), spec=specs)
def test_the_same_answers_lead_to_the_same_questions(seed: int, spec: SearchSpec) -> None:
    first = w.random_world(seed)
    found = first.found(spec)
    recorded = {q.key: first.answer(q) for q in list(first.asked)}
    again = w.random_world(seed)
    asked: list[Any] = []

    def replayed(question: Any) -> Any:
        asked.append(question)
        return recorded[question.key]

    again.answer = replayed
    assert again.found(spec) == found
    assert asked == first.asked[: len(asked)]


@FEW
@given(seed=st.integers(0, 10**6), spec=specs)
def test_a_floor_prunes_only_what_cannot_win(seed: int, spec: SearchSpec) -> None:
    made = w.random_world(seed)
    found = made.found(spec)
    known = {tune.key(c): c for c in tune.space(made.base, made.facts, rewrites=spec.rewrites)}
    best = min(per_sample(spec, made, c) for c in made.screens() if made.fails(c) is None)
    for trial in found.trials:
        if trial.reason.startswith("its floor") and trial.key in known:
            assert per_sample(spec, made, known[trial.key]) >= best * 0.99


@FEW
@given(seed=st.integers(0, 10**6), spec=specs)
def test_nothing_on_the_front_beats_the_chosen_one_in_both(seed: int, spec: SearchSpec) -> None:
    found = w.random_world(seed).found(spec)
    trials = {t.key: t for t in found.trials}
    assert found.choice is not None and found.choice.key in found.pareto
    assert found.knee is None or found.knee in found.pareto
    front = [trials[key] for key in found.pareto]
    for one, other in itertools.pairwise(front):
        assert one.time_ms < other.time_ms and one.samples_per_s < other.samples_per_s  # type: ignore[operator]


# -- keep what you have ----------------------------------------------------------------------------------------------------------------


def test_where_nothing_is_faster_the_input_stays_and_there_are_no_finals() -> None:
    made = world({"inductor": 1.3, "cudagraphs": 1.1, "fp16": 1.5})
    found = made.found(SearchSpec(**NARROW))
    assert found.choice is not None and found.choice.keeps_input and "faster in screening" in found.choice.because
    assert not any(isinstance(q, Finals) for q in made.asked)


@pytest.mark.parametrize("status", ["accuracy_fail", "nan", "crash", "timeout", "oom_device"])
def test_a_candidate_that_fails_never_wins_however_fast_it_is(status: str) -> None:
    made = world({"fp16": 0.5, "inductor": 0.01}, fails=lambda c: status if c.backend.name == "inductor" else None)
    found = made.found(SearchSpec(**NARROW))
    assert found.choice is not None and not found.choice.keeps_input
    assert made.candidate(found.choice.key).backend.name in ("eager", "cudagraphs")
    assert {t.outcome for t in found.trials if "inductor" in t.label and t.seconds} <= {status}


def test_where_all_fail_the_input_stays() -> None:
    made = world({"fp16": 0.5}, fails=lambda c: "crash" if c != w.BASE else None)
    found = made.found(SearchSpec(**NARROW))
    assert found.choice is not None and found.choice.keeps_input
    assert len(made.screens()) <= 8, "what never works is not tried to the last"


def test_one_that_fails_in_the_finals_makes_way_for_the_next() -> None:
    made = world({"fp16": 0.5, "inductor fp16": 0.5}, fails_late=lambda c: "accuracy_fail" if c.backend.name == "inductor" else None)
    found = made.found(SearchSpec(**NARROW, finalists=2))
    assert found.choice is not None and not found.choice.keeps_input
    chosen = made.candidate(found.choice.key)
    assert chosen.backend.name != "inductor" and chosen.precision is Precision.FP16
    assert any(t.outcome == "accuracy_fail" and "inductor" in t.label for t in found.trials)


def test_finals_that_cannot_tell_keep_the_input() -> None:
    made = world({"cudagraphs": 0.95})
    made.noise = 0.2  # an interval of 6% about 5%
    found = made.found(SearchSpec(**NARROW))
    assert found.choice is not None
    if any(isinstance(q, Finals) for q in made.asked):
        assert found.choice.keeps_input


def test_an_input_that_fails_ends_the_search_without_an_answer() -> None:
    made = world(fails=lambda c: "crash")
    found = made.found(SearchSpec())
    assert found.choice is None and len(made.asked) == 1 and "could not be timed" in found.stopped


def test_an_input_that_cannot_be_traced_ends_the_search_with_its_reason() -> None:
    made = world()
    steps = search(made.base, SearchSpec())
    first = next(steps)
    steps.send(made.answer(first))
    with pytest.raises(StopIteration) as ended:
        steps.send(Explained(reason="the profiler broke"))
    assert "the profiler broke" in ended.value.value.stopped


# -- budgets ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"time_budget_s": 0.0}, {"dry_run": True}])
def test_a_plan_builds_nothing_but_the_input(fields: dict[str, Any]) -> None:
    made = world({"fp16": 0.5})
    found = made.found(SearchSpec(**NARROW, **fields))
    assert [type(q) for q in made.asked] == [Screen, Explain] and made.screens() == [made.base]
    planned = [t for t in found.trials if t.outcome == "planned"]
    assert len(planned) == 11 and all(t.predicted_ms and t.predicted_low_ms < t.predicted_ms < t.predicted_high_ms for t in planned)  # type: ignore[operator]
    assert [t.predicted_ms for t in planned] == sorted(t.predicted_ms for t in planned)  # type: ignore[type-var]
    assert found.choice is not None and found.choice.keeps_input


def test_what_will_not_fit_into_the_time_left_is_not_begun() -> None:
    made = world({"fp16": 0.5, "inductor": 0.3})
    found = made.found(SearchSpec(**NARROW, time_budget_s=40.0))
    assert found.choice is not None and not found.choice.keeps_input
    assert all(c.backend.name != "inductor" for c in made.screens()), "25 s and more"
    assert any("time" in t.reason for t in found.trials if "inductor" in t.label)


def test_the_number_of_trials_is_kept_by_fixes_and_batches_too() -> None:
    some = [
        Proposal(change=Change(rewrites=(name,)), origin="GPO101", gain_high_ms=9.0)
        for name in ("fuse_linears", "fuse_conv", "gelu_epilogue:tanh")
    ]
    made = world({"fp16": 0.5}, proposals=lambda c: some, peak=lambda c: c.dims["N"])
    made.found(SearchSpec(**NARROW, goal="throughput", max_trials=3))
    assert len(made.screens()) <= 3


def test_a_candidate_over_the_latency_or_memory_budget_is_told_so_and_not_chosen() -> None:
    made = world({"fp16": 0.5, "inductor": 0.8}, peak=lambda c: 3 * 2**30 if c.backend.name == "inductor" else 2**30)
    found = made.found(SearchSpec(**NARROW, max_memory_bytes=2 * 2**30))
    assert found.choice is not None and made.candidate(found.choice.key).backend.name != "inductor"
    assert any(t.outcome == "over budget" and "3.00 GiB" in t.reason for t in found.trials)


# -- throughput ------------------------------------------------------------------------------------------------------------------------


def saturating(candidate: Candidate) -> float:
    """1 ms and 0.25 ms a sample; fp16 halves both."""
    return (1.0 + 0.25 * candidate.dims["N"]) * (0.5 if candidate.precision is Precision.FP16 else 1.0)


def test_throughput_climbs_over_batches_until_they_stop_paying() -> None:
    made = world(ms=saturating, facts=tune.Facts(wall_ms=3.0, on_gpu=True, batch=8))
    found = made.found(SearchSpec(**{**NARROW, "rewrites": ()}, goal="throughput"))
    assert found.choice is not None
    chosen = made.candidate(found.choice.key)
    assert chosen.precision is Precision.FP16 and chosen.dims["N"] >= 64
    assert found.knee is not None
    rates = {t.batch: t.samples_per_s for t in found.trials if t.samples_per_s and t.outcome in GOOD}
    assert max(rates) <= 1024, "two doublings that gain next to nothing end it"


def test_the_memory_model_stops_before_the_device_is_full() -> None:
    made = world(
        ms=saturating,
        peak=lambda c: 2**30 + 2**28 * c.dims["N"],
        facts=tune.Facts(wall_ms=3.0, on_gpu=True, batch=8, memory_bytes=20 * 2**30),
    )
    found = made.found(SearchSpec(**{**NARROW, "rewrites": ()}, goal="throughput"))
    assert all(made.peak(c) <= 0.9 * 20 * 2**30 for c in made.screens())
    stopped = [t for t in found.trials if t.origin == "batch" and t.outcome == "pruned"]
    assert stopped and all("GiB" in t.reason for t in stopped)
    assert max(c.dims["N"] for c in made.screens()) >= 48, "and what fits is tried, between the powers of two as well"


def test_a_latency_budget_ends_the_climb_at_the_largest_batch_under_it() -> None:
    made = world(ms=saturating, facts=tune.Facts(wall_ms=3.0, on_gpu=True, batch=8))
    found = made.found(SearchSpec(**{**NARROW, "rewrites": ()}, goal="throughput", latency_budget_ms=6.7))
    assert found.choice is not None
    chosen = made.candidate(found.choice.key)
    assert chosen.dims["N"] == 48, "0.5 + 0.125 x 48 is 6.5 ms"
    assert any(t.outcome == "over budget" for t in found.trials)


def test_an_input_over_the_latency_budget_is_no_bar_to_smaller_batches() -> None:
    made = world(ms=saturating, base=w.plain(batch=64), facts=tune.Facts(wall_ms=17.0, on_gpu=True, batch=64))
    found = made.found(SearchSpec(**{**NARROW, "rewrites": ()}, goal="throughput", latency_budget_ms=5.0))
    assert found.choice is not None
    assert not found.choice.keeps_input and made.ms(made.candidate(found.choice.key)) <= 5.0
    assert "over the latency budget of 5 ms" in found.choice.because, "why a call of another size is the answer"


@pytest.mark.parametrize(("budget", "largest"), [(5.0, 32), (2.0, 12), (1.2, 5), (0.7, 1)])
def test_where_nothing_at_the_batch_given_keeps_to_the_latency_budget_smaller_ones_are_tried(budget: float, largest: int) -> None:
    """In fp16 (0.5 + 0.125 x N) ms, in fp32 twice that: at 64 nothing is under any of these budgets."""
    made = world(ms=saturating, base=w.plain(batch=64), facts=tune.Facts(wall_ms=17.0, on_gpu=True, batch=64))
    found = made.found(SearchSpec(**{**NARROW, "rewrites": ()}, goal="throughput", latency_budget_ms=budget))
    smaller = [c for c in made.screens() if c.dims["N"] < 64]
    assert smaller and all(c.precision is Precision.FP16 for c in smaller), "with the settings that were fastest"
    assert found.choice is not None
    chosen = made.candidate(found.choice.key)
    if found.choice.keeps_input:  # a sample takes longer there than in the input: never slower holds whatever the budget
        assert made.ms(w.plain(precision="fp16", batch=largest)) / largest >= made.ms(made.base) / 64 * 0.98
    else:
        assert made.ms(chosen) <= budget and chosen.dims["N"] >= largest
    assert len(smaller) <= 6, "halvings that cannot be under the budget are left out"


def test_an_input_over_the_memory_budget_is_tried_smaller_too() -> None:
    made = world(
        ms=saturating, base=w.plain(batch=64), facts=tune.Facts(wall_ms=17.0, on_gpu=True, batch=64),
        peak=lambda c: 2**26 * c.dims["N"],
    )  # fmt: skip
    found = made.found(SearchSpec(**{**NARROW, "rewrites": ()}, goal="throughput", max_memory_bytes=2 * 2**30))
    assert found.choice is not None and not found.choice.keeps_input
    assert made.candidate(found.choice.key).dims["N"] == 32 and made.peak(made.candidate(found.choice.key)) <= 2 * 2**30


def test_batches_that_were_named_are_the_only_ones() -> None:
    made = world(ms=saturating, base=w.plain(batch=4), facts=tune.Facts(wall_ms=2.0, on_gpu=True, batch=4))
    found = made.found(SearchSpec(**{**NARROW, "rewrites": ()}, goal="throughput", batches=(4, 32)))
    assert {c.dims["N"] for c in made.screens()} <= {4, 32}
    assert found.choice is not None and made.candidate(found.choice.key).dims["N"] == 32


# -- fixes and rewrites ----------------------------------------------------------------------------------------------------------------


def test_what_the_doctor_proposes_is_tried_and_carries_its_rule() -> None:
    fix = Proposal(change=Change(rewrites=("gelu_epilogue:tanh",)), origin="GPO205", gain_low_ms=1.0, gain_high_ms=4.0)
    made = world({"fp16": 0.5, "gelu_epilogue:tanh": 0.8}, proposals=lambda c: [fix])
    found = made.found(SearchSpec(**{**NARROW, "rewrites": None}))
    assert found.choice is not None and "gelu_epilogue:tanh" in found.choice.change
    assert {t.origin for t in found.trials if "gelu" in t.label} == {"GPO205"}


def test_a_fix_outside_what_was_asked_for_is_not_built() -> None:
    fixes = [
        Proposal(change=Change(precision=Precision.BF16), origin="GPO101", gain_high_ms=4.0),
        Proposal(change=Change(rewrites=("gelu_epilogue:tanh",)), origin="GPO205", gain_high_ms=4.0),
        Proposal(change=Change(dims={"N": 64}), origin="GPO301", gain_high_ms=4.0),
    ]
    made = world({"fp16": 0.5}, proposals=lambda c: fixes)
    found = made.found(SearchSpec(**NARROW))
    assert all(c.precision is not Precision.BF16 and c.dims == {"N": 8} for c in made.screens())
    assert all("gelu_epilogue:tanh" not in c.transforms.rewrites for c in made.screens()), "--rewrite named the only ones"
    assert sum(t.outcome == "pruned" and "asked for" in t.reason for t in found.trials) >= 2


def test_a_rewrite_that_cannot_be_made_is_banned_and_the_rest_is_planned_without_it() -> None:
    def fails(candidate: Candidate) -> str | None:
        return "unsupported" if "no_mask" in candidate.transforms.rewrites else None

    made = world(
        {"fp16": 0.5, "fuse_linears": 0.7},
        fails=fails,
        facts=tune.Facts(wall_ms=20.0, on_gpu=True, batch=8, rewrites={"no_mask": "", "fuse_linears": ""}),
    )
    found = made.found(SearchSpec(**{**NARROW, "rewrites": ("no_mask", "fuse_linears")}))
    assert found.choice is not None and not found.choice.keeps_input
    assert made.candidate(found.choice.key).transforms.rewrites == ("fuse_linears",)
    assert sum(fails(c) is not None for c in made.screens()) <= 3
    assert any(t.outcome == "pruned" and "no_mask" in t.reason for t in found.trials)


@pytest.mark.parametrize("backends", [("eager", "inductor"), ("inductor", "cudagraphs")])
def test_a_reason_that_names_a_rewrite_bans_that_one_without_trying_each_alone(backends: tuple[str, ...]) -> None:
    def fails(candidate: Candidate) -> str | None:
        return "unsupported" if "attention:cudnn" in candidate.transforms.rewrites else None

    made = world(
        {"fuse_linears": 0.6, "attention:cudnn": 0.1},
        fails=fails,
        why=lambda c: "attention:cudnn: heads of one width are wanted" if fails(c) else "",
        facts=tune.Facts(wall_ms=20.0, on_gpu=True, batch=8, rewrites={"fuse_linears": "", "attention:cudnn": ""}),
    )
    found = made.found(
        SearchSpec(**{**NARROW, "backends": backends, "precisions": ("fp32",), "rewrites": ("fuse_linears", "attention:cudnn")})
    )
    assert found.choice is not None
    assert made.candidate(found.choice.key).transforms.rewrites == ("fuse_linears",)
    assert sum(fails(c) is not None for c in made.screens()) <= 1
    assert not any(t.origin == "rewrite alone" for t in found.trials)
    assert any(t.outcome == "pruned" and t.reason.startswith("attention:cudnn: ") for t in found.trials)


def test_a_reason_that_names_a_rewrite_which_worked_elsewhere_bans_nothing() -> None:
    books = Books(w.BASE, SearchSpec())
    for backend, answer in (
        ("inductor", Screened(status="ok", ms=10.0)),
        ("eager", Screened(status="unsupported", reason="no_mask: nothing to change")),
    ):
        waiting = books.plan(w.plain("cudagraphs", rewrites=("no_mask",)), "space")
        steps = screen(books, w.plain(backend, rewrites=("no_mask",)), "space")
        next(steps)
        with pytest.raises(StopIteration):
            steps.send(answer)
    assert books.trials[waiting].outcome == "planned"


def test_a_rewrite_that_one_precision_rules_out_stays_for_the_others() -> None:
    def fails(candidate: Candidate) -> str | None:
        return "unsupported" if "no_mask" in candidate.transforms.rewrites and candidate.precision is None else None

    made = world({"fp16": 0.5, "no_mask fp16": 0.7}, fails=fails)
    found = made.found(SearchSpec(**NARROW))
    assert found.choice is not None
    chosen = made.candidate(found.choice.key)
    assert chosen.precision is Precision.FP16 and chosen.transforms.rewrites == ("no_mask",)


# -- front and knee --------------------------------------------------------------------------------------------------------------------


def trial(key: str, ms: float, batch: int) -> Trial:
    return Trial(key=key, label=key, origin="space", screened_ms=ms, samples_per_s=batch / ms * 1e3, batch=batch)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    found = pareto([trial("slow", 2.0, 1), trial("fast", 1.0, 1), trial("wide", 4.0, 8), trial("worse", 5.0, 8), trial("wider", 16.0, 16)])
    assert [t.key for t in found] == ["fast", "wide"]


def test_the_knee_is_where_throughput_starts_to_cost_more_than_its_share() -> None:
    points = [trial("a", 1.0, 1), trial("b", 1.1, 2), trial("c", 1.5, 4), trial("d", 2.9, 6), trial("e", 5.7, 8)]
    assert knee(pareto(points)) == "c"
    assert knee(points[:1]) is None


# -- prediction ------------------------------------------------------------------------------------------------------------------------


def test_one_measurement_moves_what_shares_its_settings_and_not_much_else() -> None:
    known = tune.Facts(wall_ms=20.0, on_gpu=True)
    predictor = predict.Predictor(known)
    predictor.tell(w.BASE, 20.0)
    half, other = w.plain("inductor", "fp16"), w.plain("ort")
    before = predictor.expect(half), predictor.expect(other)
    seen = w.plain("inductor:freezing", "fp16")
    predictor.tell(seen, tune.prior_ms(seen, known) * 2)
    after = predictor.expect(half), predictor.expect(other)
    assert after[0].ms > 1.4 * before[0].ms and after[0].sd < before[0].sd
    assert abs(math.log(after[1].ms / before[1].ms)) < abs(math.log(after[0].ms / before[0].ms)) / 2
    assert after[0].low_ms < after[0].ms < after[0].high_ms


def test_what_was_measured_is_expected_again_whatever_else_was_seen() -> None:
    known = tune.Facts(wall_ms=20.0, on_gpu=True)
    predictor = predict.Predictor(known)
    for candidate, ms in [(w.BASE, 20.0), (w.plain("inductor"), 3.0), (w.plain("ort"), 60.0), (w.plain("ort", "fp16"), 0.5)]:
        predictor.tell(candidate, ms)
    assert predictor.expect(w.plain("inductor")).ms == pytest.approx(3.0, rel=0.1)
    assert predictor.expect(w.plain("ort", "fp16")).ms == pytest.approx(0.5, rel=0.1)
    assert predictor.expect(w.BASE).chance_below(0.0) == 0.0


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    inside = told = 0
    for declared in w.DECLARED:
        for seed in range(4):
            for trial in declared.world(seed).found(declared.spec()).trials:
                if trial.screened_ms and trial.origin == "space":
                    told += 1
                    inside += trial.predicted_low_ms <= trial.screened_ms <= trial.predicted_high_ms  # type: ignore[operator]
    assert told > 100 and 0.75 <= inside / told <= 1.0


def test_blame_falls_on_what_never_worked() -> None:
    predictor = predict.Predictor(tune.Facts(wall_ms=20.0, on_gpu=True))
    predictor.worked(w.BASE)
    predictor.worked(w.plain("inductor"))
    assert predictor.chance_ok(w.plain("trt")) == 1.0
    predictor.failed(w.plain("inductor", "fp8"))
    predictor.failed(w.plain("eager", "fp8"))
    assert predictor.chance_ok(w.plain("cudagraphs", "fp8")) < 0.3
    assert predictor.chance_ok(w.plain("inductor", "fp16")) == 1.0


def test_every_precision_that_can_be_asked_for_has_a_prior() -> None:
    for precision in Precision:
        assert tune.prior_ms(w.plain(precision=precision.value), tune.Facts(wall_ms=20.0)) > 0


def test_the_key_of_a_candidate_is_its_settings() -> None:
    one = w.plain("inductor", "fp16", rewrites=("no_mask",))
    assert tune.key(one) == tune.key(replace(one, device="cpu")) == tune.key(replace(one, dims=dict(reversed({**one.dims}.items()))))
    assert len({tune.key(c) for c in (one, w.plain("inductor", "fp16"), w.plain("inductor", "bf16"), replace(one, dims={"N": 9}))}) == 4


# -- what it costs ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", w.DECLARED, ids=lambda d: d.name)
def test_within_2_percent_of_the_best_in_30_percent_of_the_time(declared: Any) -> None:
    """Over drawn interactions: in the middle of them, and never far off. All of it is counted in the seconds that the answers say they took."""
    costs = [w.cost(declared, seed) for seed in range(12)]
    assert costs[0].of in (24, 25), "24, and the input where it is none of them"
    limit = 0.45 if "fails the gate" in declared.name else 0.3  # a whole precision and a backend that fail have to be met to be known
    assert statistics.median(c.until for c in costs) <= limit
    assert statistics.median(c.reached for c in costs) >= 0.98
    assert sum(c.reached >= 0.98 for c in costs) >= 9
    assert min(c.reached for c in costs) >= 0.8
    assert statistics.median(c.share for c in costs) <= 0.5


def test_pairs_that_are_too_few_are_not_called_noise() -> None:
    from gpuopt.core.search import Timed, Trial
    from gpuopt.pipeline.search import tune, verdict
    from gpuopt.pipeline.search.books import Books

    books = Books(w.BASE, SearchSpec())
    other = replace(w.BASE, backend=BackendSpec(name="inductor"))
    for candidate in (w.BASE, other):
        key = tune.key(candidate)
        books.known[key], books.trials[key] = candidate, Trial(key=key, label=str(candidate.backend), origin="")
    base = Timed(status="ok", ms=2.0)
    said = {
        name: verdict._chosen(
            books, {tune.key(w.BASE): base, tune.key(other): replace(base, ms=1.0, ratio=2.0, low=low, high=2.1, verdict="inconclusive")}
        )
        for name, low in (("few", 1.9), ("noise", 0.9))
    }
    assert all(choice.keeps_input for choice in said.values())
    assert "--pairs 6 or more" in said["few"].because and "noise" not in said["few"].because
    assert "not more than the noise" in said["noise"].because
