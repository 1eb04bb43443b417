"""What a search costs, on made-up records: the replay spends what the record says and no more, a damaged record is refused, and the page says what the records say."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuopt.core.errors import BadInput, GpuoptError, UsageError
from gpuopt.core.result import Environment, Samples, Status
from gpuopt.core.search import Screened, SearchSpec
from gpuopt.core.spec import BackendSpec, Candidate, Change, Precision
from gpuopt.devices import info
from gpuopt.pipeline import facts as pipeline_facts
from gpuopt.pipeline import figures
from gpuopt.pipeline.machine import Machine
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.questions import Explained, Finals, Proposal, Screen

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # recipes are no part of the package

from recipes.search_cost import measure, record, run, space, table  # noqa: E402
from recipes.search_cost.record import Record, Row  # noqa: E402
from recipes.search_cost.replay import replay  # noqa: E402

_spec = importlib.util.spec_from_file_location("pipeline_worlds", Path(__file__).parent / "pipeline" / "search" / "worlds.py")
assert _spec is not None and _spec.loader is not None
w: Any = sys.modules.get("pipeline_worlds")
if w is None:  # its dataclasses look their module up by name
    w = sys.modules["pipeline_worlds"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(w)

BASE = space.CASES["resnet101"].base("cuda:0")
SPEC = SearchSpec(backends=("eager", "inductor", "cudagraphs"), precisions=("fp32", "fp16"), rewrites=("no_mask",), finalists=2)
FACTS = tune.Facts(wall_ms=20.0, on_gpu=True, batch=64, rewrites={"no_mask": ""})
BUILD_S, TIMING_S, VERIFY_S, EXPLAIN_S = 10.0, 1.0, 3.0, 7.0
GPU = replace(info.describe("cpu"), id="cuda:0", name="a GPU", kind="cuda")

PLACE = Environment(gpuopt="0", python="3", platform="here")

Ms = Callable[[Candidate], float]


def row_of(candidate: Candidate, ms: float | None, status: str = "ok", base: Candidate = BASE) -> Row:
    label = tune.words(candidate, base)
    failed = {} if status == "ok" else {"reason": f"made up: {status}"}
    verify_s = VERIFY_S if status in ("ok", "accuracy_fail") and candidate != base else 0.0
    return Row(candidate=candidate, label=label, status=status, ms=ms, verified=status == "ok", build_s=BUILD_S, timing_s=TIMING_S, verify_s=verify_s, **failed)  # fmt: skip


def made(
    ms: Ms, *, fails: Callable[[Candidate], str | None] = lambda c: None, facts: tune.Facts = FACTS, spec: SearchSpec = SPEC, **fields: Any
) -> Record:
    """A whole record; what fails in the accuracy gate was timed before."""
    rows = []
    for candidate in space.candidates(BASE, facts, spec):
        status = fails(candidate) if candidate != BASE else None
        rows.append(row_of(candidate, ms(candidate) if status in (None, "accuracy_fail") else None, status or "ok"))
    explained = fields.pop("explained", Explained(facts=facts, seconds=EXPLAIN_S))
    given: dict[str, Any] = {"name": "resnet101", "command": "typed", "tiny": False, "jobs": 4, "device": GPU, "environment": PLACE,
                             "base": BASE, "spec": spec, "explained": explained, "rows": tuple(rows)}  # fmt: skip
    return signed(Record(**(given | fields)))


def signed(found: Record) -> Record:
    return replace(found, checksum=record._checksum(found))


def by(**effects: float) -> Ms:
    return lambda c: 20.0 * w.product({name.replace("__", " "): factor for name, factor in effects.items()}, c)


def is_(candidate: Candidate, backend: str, precision: str | None = None, *rewrites: str) -> bool:
    ours = (str(candidate.backend), (candidate.precision or Precision.FP32).value, candidate.transforms.rewrites)
    return ours == (backend, precision or "fp32", rewrites)


# -- the replay ------------------------------------------------------------------------------------------------------------------------


def test_where_nothing_beats_the_input_it_is_the_optimum_as_soon_as_it_was_tried() -> None:
    found = replay(made(by(inductor=1.5, cudagraphs=1.2, fp16=1.3, no_mask=1.1)))
    assert found.until_s == BUILD_S + TIMING_S and found.reached == 1.0 and found.chosen == found.optimum
    assert found.whole_s == 12 * (BUILD_S + TIMING_S) + 11 * VERIFY_S and found.num_space == 12
    assert found.search_s > found.until_s + EXPLAIN_S


def test_what_the_search_spends_is_what_the_record_says_of_what_it_asked() -> None:
    one = made(by(inductor=0.5, fp16=0.4, no_mask=0.95))
    found = replay(one)
    assert found.until_s is not None and found.chosen == "fp16 inductor no_mask" and found.reached == 1.0
    answered = (found.num_screened - 1) * (BUILD_S + TIMING_S) + BUILD_S + TIMING_S
    verified = found.search_s - answered - found.explain_s
    assert verified % VERIFY_S == pytest.approx(0.0) and 0 < verified <= VERIFY_S * (found.num_screened - 1)
    assert found.explain_s % EXPLAIN_S == 0 and found.explain_s >= 2 * EXPLAIN_S, "the leader's trace is charged too"
    assert found.until_s <= found.search_s


@pytest.mark.parametrize("which", range(8))
def test_a_record_of_a_made_up_world_leads_to_what_the_world_itself_led_to(which: int) -> None:
    declared = w.DECLARED[which]
    world = declared.world(seed=3)
    spec = declared.spec(finalists=2)
    rows = []
    for candidate in space.candidates(world.base, world.facts, spec):
        answer = world.answer(Screen(candidate=candidate))
        label = tune.words(candidate, world.base)
        rows.append(Row(candidate=candidate, label=label, status=answer.status, reason=answer.reason, ms=answer.ms, verified=answer.verified, build_s=answer.seconds))  # fmt: skip
    explained = Explained(facts=world.facts, seconds=world.explain_s)
    one = made(by(), base=world.base, spec=spec, explained=explained, rows=tuple(rows))
    assert not record.wrong(one)
    found = replay(one)
    lived = world.found(spec)
    screened = {tune.key(q.candidate) for q in world.asked if isinstance(q, Screen)}
    assert found.num_screened == len(screened) and found.num_outside == 0
    assert found.stopped == lived.stopped
    assert found.search_s == pytest.approx(lived.seconds - lived.by_phase_s.get("finals", 0.0))
    assert found.whole_s == pytest.approx(sum(row.seconds for row in rows))
    finals = [q for q in world.asked if isinstance(q, Finals)]
    assert bool(finals) == (found.chosen != rows[0].label)


def test_what_failed_is_no_optimum_and_its_cost_counts() -> None:
    fails = {"fp16": "accuracy_fail", "cudagraphs": "crash"}
    one = made(by(fp16=0.1, inductor=0.5), fails=lambda c: next((s for k, s in fails.items() if w.product({k: 2.0}, c) > 1), None))
    found = replay(one)
    assert (
        found.optimum.startswith("inductor") and found.reached == 1.0 and found.num_failed == sum(r.status != "ok" for r in one.rows) == 8
    )
    assert found.whole_s == sum(row.seconds for row in one.rows)


def test_an_inaccurate_one_that_is_slow_is_answered_as_screening_would_without_its_verification() -> None:
    asked: list[tuple[Candidate, Screened]] = []
    one = made(by(inductor=1.4, cudagraphs=1.3, fp16=0.9), fails=lambda c: "accuracy_fail" if w.product({"inductor": 2.0}, c) > 1 else None)
    from recipes.search_cost.replay import _Desk

    desk = _Desk(record=one, rows={tune.key(r.candidate): r for r in one.rows})
    for row in one.rows:
        limited = desk.answer(Screen(candidate=row.candidate, limit_ms=22.0))
        assert isinstance(limited, Screened)
        asked.append((row.candidate, limited))
    slow = [answer for candidate, answer in asked if candidate.backend.name == "inductor"]
    assert {a.status for a in slow} == {"skipped"} and {a.seconds for a in slow} == {BUILD_S + TIMING_S} and all(a.ms for a in slow)
    free = desk.answer(Screen(candidate=next(r.candidate for r in one.rows if r.candidate.backend.name == "inductor")))
    assert isinstance(free, Screened) and free.status == "accuracy_fail" and free.ms, "as the tool answers: a wrong one was timed"
    assert free.seconds == BUILD_S + TIMING_S + VERIFY_S


def test_the_first_that_the_search_verifies_pays_for_what_all_are_held_against() -> None:
    """In the record the first of each precision did: 40 s for the reference, 8 s more for what fp16 is held against."""
    one = made(by(inductor=0.5, fp16=0.4))
    order = [row.candidate.precision for row in one.rows[1:]]
    assert order[0] is None and Precision.FP16 in order
    extra = {1: 40.0, 1 + order.index(Precision.FP16): 8.0}
    one = signed(replace(one, rows=tuple(replace(row, verify_s=row.verify_s + extra.get(i, 0.0)) for i, row in enumerate(one.rows))))
    from recipes.search_cost.replay import _Desk

    desk = _Desk(record=one, rows={tune.key(r.candidate): r for r in one.rows})
    asked = [desk.answer(Screen(candidate=row.candidate)) for row in (one.rows[0], *reversed(one.rows[1:]))]
    alone = BUILD_S + TIMING_S
    fp16 = one.rows[-1].candidate.precision
    assert fp16 is Precision.FP16 and [a.seconds for a in asked[:3]] == [alone, alone + VERIFY_S + 48.0, alone + VERIFY_S]
    assert sum(a.seconds for a in asked) == sum(row.seconds for row in one.rows), "who asks for all pays for all"


def test_what_a_floor_rules_out_is_never_paid_for() -> None:
    bounds = {"fp32": 15.0, "fp16": 5.0}
    facts = replace(FACTS, bounds_ms=bounds, floors_ms={"fp32": 14.0, "fp16": 4.0})
    one = made(by(fp16=0.4, inductor=0.8), facts=facts)
    found = replay(one)
    assert found.reached >= 0.98 and found.num_screened < found.num_space
    assert found.until_share is not None and found.passed == (found.until_share <= 0.3)


def test_an_optimum_that_the_search_never_finds_is_no_pass() -> None:
    # A floor that is wrong hides it: it says that nothing in fp16 takes less than 30 ms.
    facts = replace(FACTS, bounds_ms={"fp32": 10.0, "fp16": 31.0}, floors_ms={"fp32": 9.0, "fp16": 30.0})
    found = replay(made(by(fp16=0.2), facts=facts))
    assert found.until_s is None and found.until_share is None and not found.passed and found.reached < 0.98
    assert found.optimum.startswith("fp16")


def test_a_fix_outside_the_record_is_charged_and_teaches_nothing() -> None:
    ms = by(inductor=0.5)
    plain = replay(made(ms))
    change = Change(channels_last=True)
    explained = Explained(facts=FACTS, seconds=EXPLAIN_S, proposals=(Proposal(change=change, origin="GPO1", gain_high_ms=5.0),))
    found = replay(made(ms, explained=explained))
    assert plain.num_outside == 0 and found.num_outside >= 1
    assert found.outside_s > 0 and found.search_s >= plain.search_s + found.outside_s
    assert (found.until_s, found.chosen, found.num_screened) == (plain.until_s, plain.chosen, plain.num_screened)


def test_a_change_that_cannot_be_made_closes_its_neighbours_as_it_does_in_a_search() -> None:
    one = made(by(inductor=0.6, fp16=0.5), fails=lambda c: "unsupported" if c.transforms.rewrites else None)
    one = signed(replace(one, rows=tuple(replace(r, reason="no_mask: made up") if r.status == "unsupported" else r for r in one.rows)))
    found = replay(one)
    assert found.chosen == "fp16 inductor" and found.num_failed == 6 and found.num_screened < 12


def test_a_record_that_was_cut_short_is_not_replayed() -> None:
    one = made(by())
    with pytest.raises(BadInput, match="2 of 12 candidates were not measured"):
        replay(signed(replace(one, rows=one.rows[:-2])))


# -- the record ------------------------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    one = made(by(fp16=0.5), fails=lambda c: "crash" if is_(c, "inductor", "fp16") else None)
    record.write(one, tmp_path / "one.json")
    assert record.read(tmp_path / "one.json") == one


@pytest.mark.parametrize(
    ("old", "new"), [('"ms": 20.0', '"ms": 21.0'), ('"ok"', '"crash"'), (f'"build_s": {BUILD_S}', '"build_s": 1.0'), ('"wall_ms": 20.0', '"wall_ms": 2.0')]
)  # fmt: skip
def test_a_record_with_one_figure_changed_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "one.json"
    record.write(made(by()), path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(BadInput, match="checksum"):
        record.read(path)


@pytest.mark.parametrize("spoil", [lambda t: t[: len(t) // 2], lambda t: "", lambda t: t.replace('"rows"', '"lines"'), lambda t: "[]"])
def test_what_is_no_record_is_refused(tmp_path: Path, spoil: Callable[[str], str]) -> None:
    path = tmp_path / "one.json"
    record.write(made(by()), path)
    path.write_text(spoil(path.read_text()))
    with pytest.raises(BadInput):
        record.read(path)


def test_a_record_that_says_what_cannot_be_is_refused_whatever_its_checksum() -> None:
    one = made(by(), fails=lambda c: "crash" if is_(c, "inductor", "fp16") else None)
    first, second, *rest = one.rows
    failed = next(r for r in one.rows if r.status != "ok")
    stranger = replace(second, candidate=replace(second.candidate, backend=BackendSpec.parse("aoti")))
    for rows, words in (
        ((first, second, second, *rest), "twice"),
        ((first, stranger, *rest), "not in the space"),
        ((second, *rest), "first row"),
        ((), "first row"),
        ((replace(first, status="crash", reason="x"), second), "first row"),
        ((first, replace(second, ms=None)), "no time"),
        ((first, replace(second, ms=-1.0)), "no time"),
        ((first, replace(second, build_s=-1.0)), "no cost"),
        ((first, replace(second, build_s=0.0, timing_s=0.0, verify_s=0.0)), "no cost"),
        ((first, replace(second, status="splendid")), "no candidate does"),
        ((first, replace(failed, reason="")), "without a reason"),
    ):
        assert words in record.wrong(signed(replace(one, rows=tuple(rows)))), words
    assert "trace" in record.wrong(signed(replace(one, explained=Explained())))
    assert not record.wrong(one)


# -- the declared space ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rewrites=st.lists(st.sampled_from(["no_mask", "fuse_linears", "fuse_conv", "attention:flash", "attention:cudnn"]), unique=True),
    convolutions=st.booleans(),
    norms=st.booleans(),
    on_gpu=st.booleans(),
    own=st.sampled_from([Precision.FP32, Precision.FP16]),
    cannot=st.lists(st.sampled_from(["trt", "ort", "aoti", "inductor", "inductor@fp16", "eager@bf16"]), unique=True),
    most=st.integers(4, 24),
)
def test_a_declared_space_fits_is_diverse_and_has_the_input(
    rewrites: list[str], convolutions: bool, norms: bool, on_gpu: bool, own: Precision, cannot: list[str], most: int
) -> None:
    facts = replace(
        FACTS, on_gpu=on_gpu, own=own, rewrites=dict.fromkeys(rewrites, ""), has_convolutions=convolutions, has_batch_norm=norms, cannot=dict.fromkeys(cannot, "no")
    )  # fmt: skip
    if not on_gpu and {"ort", "aoti", "inductor"} <= set(cannot):
        cannot.remove("aoti")  # eager alone, with nothing to change, is no space
        facts = replace(facts, cannot=dict.fromkeys(cannot, "no"))
    spec = space.declared(BASE, facts, most=most)
    found = space.candidates(BASE, facts, spec)
    assert 2 <= len(found) <= most and found[0] == BASE and len({tune.key(c) for c in found}) == len(found)
    assert spec == space.declared(BASE, facts, most=most)
    assert not any("autotune" in str(c.backend) or c.backend.name in cannot for c in found)
    if most == 24 and "inductor" not in cannot and on_gpu:
        assert len({str(c.backend) for c in found}) >= 4 and len({c.precision for c in found}) >= 2
        assert len(found) >= 12


def test_where_nothing_but_the_input_can_run_there_is_no_space() -> None:
    facts = replace(
        FACTS, on_gpu=False, own=Precision.FP16, rewrites={}, cannot={"inductor": "no", "aoti": "no", "ort": "no", "eager@bf16": "no"}
    )
    with pytest.raises(UsageError, match="besides the input"):
        space.declared(BASE, facts)


def test_the_declared_models_are_six_at_least_and_every_way_is_one_of_the_search() -> None:
    assert len({case.model for case in space.CASES.values()}) >= 6
    assert len({case.model for case in list(space.CASES.values())[:6]}) == 6, "a run that is cut short still tells of six models"
    assert set(space.WAYS) <= {way.backend for way in tune.WAYS} and set(space.TINY_WAYS) <= set(space.WAYS)
    assert space.chosen("vit_base,resnet101") == ["resnet101", "vit_base"]
    with pytest.raises(UsageError, match="no model"):
        space.chosen("resnet")


# -- measuring -------------------------------------------------------------------------------------------------------------------------


class Steps:
    """A worker whose steps take as long as they are told."""

    pid, alive = 7, True

    def __init__(self, during: Callable[[], None] = lambda: None) -> None:
        self.during = during
        self.paused = 0

    def call(self, verb: str, result: type[Any], *, timeout_s: float, on_progress: Any = None, **arguments: Any) -> Any:
        self.during()
        if verb == "verify":
            raise RuntimeError("made up")
        return pipeline_facts.Measured(samples=Samples(samples_ns=(3_000_000, 1_000_000, 2_000_000))) if verb == "block" else None

    def pause(self) -> None:
        self.paused += 1

    def resume(self) -> None:
        self.paused -= 1

    def kill(self) -> None: ...

    def close(self) -> None: ...


def test_the_time_a_candidate_stands_still_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])
    watch: measure.Watch

    def during() -> None:
        now[0] += 2.0
        watch.pause()
        now[0] += 50.0
        watch.resume()
        now[0] += 1.0

    child = Steps(during)
    watch = measure.Watch(child=child)  # type: ignore[arg-type]
    watch.call("load", type(None), timeout_s=1.0)
    watch.call("build", type(None), timeout_s=1.0)
    watch.call("block", pipeline_facts.Measured, timeout_s=1.0)
    with pytest.raises(RuntimeError):
        watch.call("verify", type(None), timeout_s=1.0)
    assert watch.spent == {"load": 3.0, "build": 3.0, "block": 3.0, "verify": 3.0}, "a step that fails has its cost too"
    assert watch.took(measure.BUILDING) == 6.0 and watch.ms == 2.0 and child.paused == 0


def rigged(monkeypatch: pytest.MonkeyPatch, ms: Ms, status: Callable[[Candidate], str] = lambda c: "ok") -> list[Candidate]:
    """Children that answer at once; returns who was tried."""
    tried: list[Candidate] = []

    def screened(crew: measure.Timekeeping, question: Screen) -> Any:
        candidate = question.candidate
        tried.append(candidate)
        assert question.limit_ms is None and candidate not in question.ahead
        watch = crew.watches[tune.key(candidate)] = measure.Watch(child=Steps(), start_s=0.5)  # type: ignore[arg-type]
        watch.spent.update(load=1.0, build=2.0, warm=0.25, block=0.25, verify=4.0)
        ended = status(candidate)
        if ended == "interrupt":
            raise KeyboardInterrupt
        out = Screened(
            status=ended, reason="" if ended == "ok" else "made up: /a/b/c.py", ms=ms(candidate) if ended == "ok" else None, verified=True
        )
        return out, replace(figures.started(candidate), peak_bytes=5)

    def explained(crew: measure.Timekeeping, candidate: Candidate) -> Any:
        assert candidate == crew.base
        return Explained(facts=FACTS), figures.started(candidate)

    def surveyed(job: Any, progress: Any) -> Machine:
        return Machine(job=job, progress=progress, survey=pipeline_facts.Survey(environment=PLACE, device=GPU))

    monkeypatch.setattr(measure.trying, "tried", screened)
    monkeypatch.setattr(measure.explaining, "explained", explained)
    monkeypatch.setattr(measure.machine, "surveyed", surveyed)
    return tried


def quiet(text: str) -> None: ...


def test_a_measurement_leaves_a_whole_record_with_each_ones_own_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "resnet101.json"
    tried = rigged(monkeypatch, by(fp16=0.5), lambda c: "crash" if c.backend.name == "aoti" else "ok")
    found = measure.measured("resnet101", path, device="cuda", build_jobs=1, say=quiet)
    assert record.read(path) == signed(found) and not found.missing()
    assert tried[0] == found.base and found.base.device == "cuda:0" and len(tried) == len(found.rows) == len(found.space())
    assert (
        {row.seconds for row in found.rows} == {8.0}
        and {row.build_s for row in found.rows} == {3.5}
        and {row.timing_s for row in found.rows} == {0.5}
    )
    assert {row.reason for row in found.rows if row.status == "crash"} == {"made up: c.py"}, "no paths of a machine"
    assert replay(found).whole_s == 8.0 * len(found.rows)


def test_a_measurement_that_is_ended_keeps_what_it_has_and_resume_asks_for_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "resnet101.json"
    with monkeypatch.context() as patch:
        first = rigged(patch, by(fp16=0.5), lambda c: "interrupt" if c.backend.name == "cudagraphs" else "ok")
        with pytest.raises(KeyboardInterrupt):
            measure.measured("resnet101", path, device="cuda", build_jobs=1, say=quiet)
    cut = record.read(path)
    assert cut.missing() and len(cut.rows) == len(first) - 1
    again = rigged(monkeypatch, by(fp16=0.5))
    whole = measure.measured("resnet101", path, device="cuda", build_jobs=1, resume=True, say=quiet)
    assert not whole.missing() and whole.rows[: len(cut.rows)] == cut.rows
    assert {tune.key(c) for c in again} == {tune.key(c) for c in cut.missing()}
    with pytest.raises(UsageError, match="another model"):
        measure.measured("vit_base", path, device="cuda", build_jobs=1, resume=True, say=quiet)


def test_a_machine_at_fault_ends_the_measurement_instead_of_a_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "resnet101.json"
    rigged(monkeypatch, by(), lambda c: Status.DISK_FULL.value if c.backend.name == "aoti" else "ok")
    with pytest.raises(GpuoptError, match="disk_full"):
        measure.measured("resnet101", path, device="cuda", build_jobs=1, say=quiet)
    assert record.read(path).missing()


# -- all of them, and the page ---------------------------------------------------------------------------------------------------------


def test_each_gpu_has_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: set(range(32)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    (first, some), (second, others) = ((run.lanes.environment(gpu, on_gpu=True), run._cores(gpu, 2)) for gpu in range(2))
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("4", "5")
    assert (some, others) == (["--cores", "0-15"], ["--cores", "16-31"])
    assert run._cores(0, 1) == []


def test_commands_that_cannot_be_are_refused_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--only", "nothing"], ["--most", "25"], ["--most", "1"], ["--gpus", "0"]):
        assert run.main(["--output", str(tmp_path / "out"), *words]) == 2
    assert not (tmp_path / "out").exists() and "no model is called 'nothing'" in capsys.readouterr().err


def test_nothing_is_begun_where_the_deadline_is_near(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert run.main(["--output", str(tmp_path), "--deadline", "20", "--device", "cpu", "--tiny"]) == 1
    assert time.monotonic() - began < 5 and "not begun" in capsys.readouterr().out


def test_one_line_a_model_says_what_came_of_it() -> None:
    one = made(by(inductor=0.5, fp16=0.4))
    assert "98% of the optimum after" in run.line(run.Ended(name="resnet101", seconds=9.0, reason="", record=one))
    cut = signed(replace(one, rows=one.rows[:3]))
    assert "3 of 12 candidates (ended after 5 s)" in run.line(
        run.Ended(name="resnet101", seconds=9.0, reason="ended after 5 s", record=cut)
    )
    assert "no record (boom)" in run.line(run.Ended(name="resnet101", seconds=9.0, reason="boom", record=None))


def test_the_page_without_records_says_so_and_no_figure() -> None:
    page = table.render({})
    assert "Not measured yet on an H200" in page and "| model |" not in page and "**" not in page


def test_the_page_says_what_the_records_say(tmp_path: Path) -> None:
    fails = lambda c: "compile_error" if is_(c, "inductor", "fp16") else None  # noqa: E731
    whole = made(by(inductor=0.5, fp16=0.4), fails=fails)
    vit = made(by(fp16=0.5), name="vit_base", base=BASE)
    cut = signed(replace(vit, rows=vit.rows[:5]))
    for one in (whole, cut):
        record.write(one, tmp_path / f"{one.name}.json")
    page = table.render(table.read(tmp_path), where="there")
    found = replay(whole)
    assert f"{found.until_share:.0%}" in page and f"| 12 (1) | {found.whole_s:.0f} |" in page and "compile_error: made up" in page
    assert "vit_base (5 of 12 candidates)" in page and "## vit_base" not in page and "Not measured: bert_large_b1, smollm2_360m" in page
    assert f"**{int(found.passed)} of 1 spaces, of 1 models" in page and "The goal is not met." in page, "one model is not six"
    assert page.count("| fp16 inductor no_mask |") == 2, "in the summary, as the choice, and among its candidates"


def test_the_goal_is_met_by_six_models_and_by_none_that_misses() -> None:
    one = made(by(inductor=1.5, cudagraphs=1.2, fp16=1.3, no_mask=1.1))
    assert replay(one).passed
    hidden = replace(FACTS, bounds_ms={"fp32": 10.0, "fp16": 31.0}, floors_ms={"fp32": 9.0, "fp16": 30.0})
    missed = made(by(fp16=0.2), facts=hidden)

    def of(record_: Record, name: str) -> Record:
        model = space.CASES[name].base("cuda:0").model
        rows = tuple(replace(row, candidate=replace(row.candidate, model=model)) for row in record_.rows)
        return signed(replace(record_, name=name, base=replace(record_.base, model=model), rows=rows))

    six = {name: of(one, name) for name in list(space.CASES)[:6]}
    assert "**6 of 6 spaces, of 6 models" in table.render(six) and "The goal is met." in table.render(six)
    assert "The goal is not met." in table.render({**six, "bert_large_b64": of(missed, "bert_large_b64")})
    assert "The goal is not met." in table.render(dict(list(six.items())[:5]))


def test_the_page_takes_no_record_of_another_name_machine_or_of_a_rehearsal(tmp_path: Path) -> None:
    one = made(by())
    record.write(one, tmp_path / "vit_base.json")
    with pytest.raises(BadInput, match="is of resnet101"):
        table.read(tmp_path)
    record.write(replace(one, name="vit_base", tiny=True), tmp_path / "vit_base.json")
    with pytest.raises(BadInput, match="rehearsal"):
        table.read(tmp_path)
    with pytest.raises(BadInput, match="different devices"):
        table.render({"resnet101": one, "vit_base": replace(one, device=replace(GPU, name="another"))})


def test_the_page_in_the_tree_is_what_the_records_in_the_tree_say() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.render(table.read(table.RECORDS))


def test_a_records_json_is_plain_and_small(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    record.write(made(by()), path)
    plain = json.loads(path.read_text())
    assert plain["name"] == "resnet101" and len(plain["rows"]) == 12 and path.stat().st_size < 100_000
