"""What streaming adds to plain eager where nothing is streamed: one module, bound and not bound by turns, and a verdict that a slower one does not pass."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import streams

from gpuopt.cli import app
from gpuopt.core import codec
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.progress import Silent
from gpuopt.core.result import Device, Report, Status
from gpuopt.core.spec import BenchSpec, Candidate, ModelRef
from gpuopt.core.streamed import OverEager, Ratio, StreamRequest
from gpuopt.core.streaming import Calibration, StreamSpec
from gpuopt.pipeline import isolate
from gpuopt.pipeline.streamed import bench, command, eager, measured
from gpuopt.pipeline.streamed.arms import BLOCK_CALLS, Arm
from gpuopt.pipeline.streamed.device import StreamDevice, parse
from gpuopt.pipeline.streamed.facts import Plained, Timed
from gpuopt.pipeline.streamed.plain import Plain
from gpuopt.pipeline.streamed.session import StreamSession
from gpuopt.streaming import anatomy, guards
from gpuopt.streaming import bound as binding
from gpuopt.streaming.engines.simulated import SimulatedEngine
from gpuopt.timing import clocks

WHOLE = StreamSpec(budget_share=1.0)
IDS = torch.arange(8)[None] % 50
DEPTH = 20


def stack(depth: int = 4) -> nn.Module:
    space: dict[str, Any] = {}
    exec(compile(streams.FACTORY.replace("depth=8", f"depth={depth}"), "stack.py", "exec"), space)
    module: nn.Module = space["build"]()
    return module


class Quiet(SimulatedEngine):
    """Host memory as a device that keeps no time, as a real one: nothing stands around forwards where nothing is streamed."""

    listens = False


@pytest.fixture
def bound() -> Iterator[tuple[nn.Module, Plain]]:
    module = stack()
    module.layers[1].up.weight = module.layers[0].up.weight  # type: ignore[union-attr]
    found = anatomy.dissect(module)
    plan = measured.provisional(found, WHOLE, Calibration(device="d", link_bytes_per_s=1, pageable_bytes_per_s=1), resident=True)
    plain = Plain(module)
    with binding.bind(module, plan, Quiet(1e9)):
        plain.note()
        yield module, plain


# -- one object, two states ----------------------------------------------------------------------------------------------------------------------


def state(module: nn.Module) -> list[Any]:
    """All that binding could change: attributes, hooks, and where values lie."""
    told: list[Any] = [[(name, id(value)) for name, value in vars(part).items()] for part in module.modules()]
    told += [sorted((name, len(value)) for name, value in vars(part).items() if isinstance(value, dict)) for part in module.modules()]
    return [*told, [p.data_ptr() for p in module.parameters()]]


def test_nothing_of_a_binding_is_left_within_and_all_of_it_is_back_after(bound: tuple[nn.Module, Plain]) -> None:
    module, plain = bound
    with torch.inference_mode():
        wanted = module(IDS)
    plain.learn(module.parameters(), apart=True)
    before = state(module)
    moved = [p.data_ptr() for p in module.parameters()]
    for _ in range(3):
        with plain.entered(), torch.inference_mode():
            assert not {"to", "_apply", "__deepcopy__", "forward"} & {name for part in module.modules() for name in vars(part)}
            assert not module._load_state_dict_pre_hooks
            assert not set(moved) & {p.data_ptr() for p in module.parameters()}, "weights of its own"
            assert torch.equal(module(IDS), wanted)
        assert state(module) == before
    with pytest.raises(UsageError), plain.entered():
        raise UsageError("broke off")
    assert state(module) == before
    with pytest.raises(UsageError, match="moved or cast"):
        module.to(torch.float64)


def test_without_room_plain_eager_reads_the_weights_of_the_plan(bound: tuple[nn.Module, Plain]) -> None:
    module, plain = bound
    where = [p.data_ptr() for p in module.parameters()]
    plain.learn(module.parameters(), apart=False)
    with plain.entered():
        assert [p.data_ptr() for p in module.parameters()] == where and "_apply" not in vars(module)
    plain.close()
    with pytest.raises(AssertionError), plain.entered():
        pass  # nothing is known any more: what ran here would be the bound module, taken for plain eager


def test_what_was_wrapped_around_a_forward_counts_as_streaming(bound: tuple[nn.Module, Plain]) -> None:
    module, plain = bound
    seen: list[str] = []
    layer = module.get_submodule("layers.2")
    undo = guards.put(layer, "forward", lambda x, run=layer.forward: seen.append("wrapped") or run(x))
    plain.note()
    plain.learn(module.parameters(), apart=True)
    with torch.inference_mode():
        with plain.entered():
            module(IDS)
        assert not seen
        module(IDS)
    assert seen == ["wrapped"]
    undo()


def test_what_a_call_keeps_on_the_module_for_the_next_one_is_there_for_plain_eager_too(bound: tuple[nn.Module, Plain]) -> None:
    module, plain = bound
    module._mask = "made by the first call"  # type: ignore[assignment]
    plain.learn(module.parameters(), apart=True)
    with plain.entered():
        assert module._mask == "made by the first call"
        module._mask = "made again"  # type: ignore[assignment]
    assert module._mask == "made again"


# -- the figure ----------------------------------------------------------------------------------------------------------------------------------


class Work(clocks.WallClock):
    """Counts blocks instead of seconds, on a host that is never as fast as a moment ago: 2% of noise a call, and slow seconds and fast ones."""

    BLOCK_NS = 50_000

    def __init__(self, seed: int = 0) -> None:
        self.blocks = 0
        self._chance = random.Random(seed)
        self._pace = 1.0

    def ran(self, *_: Any) -> None:
        self.blocks += 1

    def time_calls(self, call: Callable[[], Any], n: int, inner: int = 1) -> tuple[tuple[int, ...], int]:
        self._pace = min(1.3, max(0.8, self._pace * self._chance.gauss(1.0, 0.01)))
        samples = []
        for _ in range(n):
            before = self.blocks
            call()
            samples.append(round((self.blocks - before) * self.BLOCK_NS * self._pace * self._chance.gauss(1.0, 0.02)))
        return tuple(samples), sum(samples)


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], Arm]]:
    """A child that was bound on a CPU as on a device that is there, with this share of its blocks run twice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(SimulatedEngine, "listens", False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 40, 1 << 40))
    for name in ("synchronize", "reset_peak_memory_stats", "set_per_process_memory_fraction", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    opened: list[streams.Inline] = []

    def made(slower: float, clock: Work | None = None) -> Arm:
        child = streams.Inline("gpuopt.pipeline.streamed.child")
        opened.append(child)
        session = child.session
        candidate, request = Candidate(model=ModelRef(text=""), device=streams.DEVICE), StreamRequest(action="bench", specs=(WHOLE,))
        module = stack(DEPTH)
        if clock is not None:
            monkeypatch.setattr(clocks, "for_device", lambda device: clock)
            for block in module.layers:  # type: ignore[union-attr]
                block.register_forward_hook(clock.ran)
        given = Inputs(kwargs={"ids": IDS}, dims={"N": 1, "S": IDS.shape[1]})
        session.adopt(candidate, request, Model(form="module", name="Stack", module=module), parse(streams.DEVICE), given)
        session._is_live = False  # its memory is a child's
        monkeypatch.setattr(measured, "held_to", lambda plan, device: pytest.fail("nothing is held on paper"))
        session.bind(WHOLE)
        session._device = StreamDevice(id="cpu")
        if slower:
            again = [module.get_submodule(f"layers.{index}") for index in range(round(slower * DEPTH))]

            def forward(ids: torch.Tensor, run: Any = module.forward) -> Any:
                for block in again:
                    block(torch.zeros(1, IDS.shape[1], 64))
                return run(ids)

            guards.put(module, "forward", forward)
            assert session._plain is not None
            session._plain.note()
        session.warm()
        return Arm(child=child, progress=Silent(), timeout_s=60, key="own")  # type: ignore[arg-type]

    yield made
    for child in opened:
        child.session._device = parse(streams.DEVICE)
        child.session.close()
    torch.set_num_threads(threads)


def timed(arm: Arm, rounds: int = 40) -> OverEager:
    return eager.over_eager(
        arm, {}, StreamRequest(action="bench", specs=(WHOLE,)), Silent(), turns=BenchSpec(num_pairs=rounds, max_time_s=20)
    )


@pytest.mark.parametrize(("slower", "verdict"), [(0.0, "met"), (0.05, "missed")])
def test_five_percent_are_seen_and_none_are_not_on_a_host_that_does_not_keep_its_pace(arm: Any, slower: float, verdict: str) -> None:
    found = timed(arm(slower, Work()), rounds=60)
    assert found.over is not None and found.over.under(1.0) == verdict, found
    assert found.apart and found.block_forwards == BLOCK_CALLS and found.over.num_pairs == 60
    low, high = found.over.percents or (0.0, 0.0)
    assert low <= 100 * slower <= high and high - low < 2.0


def test_the_clock_of_this_machine_tells_what_runs_twice_from_what_does_not(arm: Any) -> None:
    alike, twice = timed(arm(0.0), rounds=12), timed(arm(1.0), rounds=12)
    assert alike.over is not None and alike.over.under(50.0) == "met", alike
    assert twice.over is not None and twice.over.under(1.0) == "missed", twice


def test_a_figure_is_met_or_missed_where_the_whole_interval_says_so() -> None:
    for low, high, verdict in ((0.99, 1.009, "met"), (0.99, 1.01, "inconclusive"), (1.009, 1.05, "inconclusive"), (1.01, 1.05, "missed")):
        assert Ratio(ratio=1.0, low=low, high=high, num_pairs=9).under(1.0) == verdict
    few = eager.ratio([(2, 2)] * 5, [(1, 1)] * 5)
    assert few.ratio == 2.0 and few.percents is None and few.under(1.0) == "inconclusive" and few.num_pairs == 5


# -- who is asked what ---------------------------------------------------------------------------------------------------------------------------


class Told:
    """A child that takes what it is told to take, and may fail at some block."""

    def __init__(
        self, ns: int, *, fails_at: int | None = None, fails: str = "block", dies: bool = False, plain_ns: int | None = None
    ) -> None:
        self.ns, self.plain_ns, self.fails_at, self.fails, self.dies = ns, plain_ns or ns, fails_at, fails, dies
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.alive = True

    def call(self, verb: str, result: Any, *, timeout_s: float, on_progress: Any = None, **arguments: Any) -> Any:
        self.asked.append((verb, arguments))
        if verb == self.fails and self.fails_at is not None and sum(verb == one for one, _ in self.asked) > self.fails_at:
            self.alive = not self.dies
            raise isolate.ChildFailed(Status.CRASH, "it fell over")
        if verb == "block":
            return Timed(samples_ns=(self.plain_ns if arguments["plain"] else self.ns,) * 3)
        return Plained(apart=True) if verb == "plain" else None


def asked(own: Told, others: dict[str, Told], **request: Any) -> tuple[OverEager, list[tuple[str, str]]]:
    lost: list[tuple[str, str]] = []
    arms = {name: Arm(child=child, progress=Silent(), timeout_s=1, key=name) for name, child in {"own": own, **others}.items()}  # type: ignore[arg-type]
    made = StreamRequest(action="bench", specs=(WHOLE,), **request)
    turns = BenchSpec(num_pairs=10, max_time_s=60)
    found = eager.over_eager(arms.pop("own"), arms, made, Silent(), on_lost=lambda name, reason: lost.append((name, reason)), turns=turns)
    return found, lost


def test_other_processes_stand_beside_plain_eager_and_one_that_falls_over_has_what_it_had() -> None:
    own = Told(1010, plain_ns=1000)
    found, lost = asked(own, {"everything resident": Told(970), "again": Told(1030, fails_at=4), "never": Told(1, fails_at=0)}, generate=99)
    assert found.over is not None and found.over.percent == pytest.approx(1.0) and (found.streamed_ms, found.eager_ms) == (0.00101, 0.001)
    whole, again = found.others
    assert whole.over.percent == pytest.approx(-3.0) and whole.over.num_pairs == 10 and whole.median_ms == 0.00097
    assert again.over.percent == pytest.approx(3.0) and again.over.num_pairs == 4 and again.over.percents is None
    assert sorted(lost) == [("again", "it fell over"), ("never", "it fell over")]
    assert {arguments["tokens"] for verb, arguments in own.asked if verb == "block"} == {eager.BLOCK_TOKENS}
    assert [verb for verb, _ in own.asked if verb != "block"] == ["plain", "unplain"]


@pytest.mark.parametrize("fails", ["plain", "block"])
def test_what_cannot_be_timed_says_why_and_a_child_that_is_gone_ends_it(fails: str) -> None:
    found, _ = asked(Told(1, fails=fails, fails_at=0), {})
    assert found.over is None and found.reason == "it fell over"
    with pytest.raises(isolate.ChildFailed):
        asked(Told(1, fails=fails, fails_at=0, dies=True), {})


def test_on_paper_and_where_something_is_streamed_there_is_nothing_to_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_command import did, job

    monkeypatch.setattr(isolate, "Child", streams.Inline)
    told = did(command.stream(job(streams.factory(tmp_path), "bench", WHOLE, rivals=("resident",))))
    assert told.rows[0].over_eager is None and not told.rows[0].measured.plan.binding and len(told.arms) == 1
    with StreamSession() as session:
        session.adopt(
            Candidate(model=ModelRef(text="")), StreamRequest(), Model(form="module", name="S", module=stack()), parse(streams.DEVICE),
            Inputs(kwargs={"ids": IDS}, dims={"N": 1, "S": 8}),
        )  # fmt: skip
        session.bind(WHOLE)
        with pytest.raises(Unsupported, match="on a device that is there"):
            session.plain()


def a_bench(own: Told, whole: Told | None, others: Told | None, **request: Any) -> Any:
    arms = [child and Arm(child=child, progress=Silent(), timeout_s=1, key=str(i)) for i, child in enumerate((own, whole, others))]  # type: ignore[arg-type]
    arms[0].opened = SimpleNamespace(device="there")  # type: ignore[union-attr, assignment]
    made = StreamRequest(action="bench", specs=(WHOLE,), **request)
    return bench._Bench(None, made, Silent(), None, arms[0], arms[1], None, arms[2])  # type: ignore[arg-type]


def test_the_second_resident_process_goes_along_where_it_is_asked_for_and_gives_the_device_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "TURNS", BenchSpec(num_pairs=8))
    monkeypatch.setattr(eager, "ALONE", BenchSpec(num_pairs=3))
    plan: Any = SimpleNamespace(binding={}, anatomy=SimpleNamespace(host={}), spec=WHOLE)
    again = Told(1040)
    under_way = a_bench(Told(1000), Told(1020, fails_at=2), again, rivals=("accelerate", "resident"))
    found = bench._over_eager(under_way, plan)
    assert found is not None and [one.name for one in found.others] == ["everything resident", "everything resident, again"]
    assert [verb for verb, _ in again.asked if verb != "block"] == ["resident", "warm", "release"]
    assert under_way.whole is None and under_way.others is not None
    for other in (
        SimpleNamespace(binding={"layers.0": 0}, anatomy=SimpleNamespace(host={})),
        SimpleNamespace(binding={}, anatomy=SimpleNamespace(host={"embed.weight": 1})),
    ):
        assert bench._over_eager(under_way, other) is None  # type: ignore[arg-type]
    compiled: Any = SimpleNamespace(binding={}, anatomy=SimpleNamespace(host={}), spec=StreamSpec(budget_share=1.0, compile=True))
    assert bench._over_eager(under_way, compiled) is None, "everything resident is compiled as well then: no plain eager"
    assert bench._over_eager(a_bench(Told(1), None, None, alone=True), plan) is None
    broken = Told(1, fails="resident", fails_at=0)
    found = bench._over_eager(a_bench(Told(1), None, broken, rivals=("resident",)), plan)
    assert found is not None and found.over is not None and not found.others and broken.asked[-1][0] == "release"


def test_a_report_written_before_this_was_measured_is_read(tmp_path: Path) -> None:
    for path in sorted(Path(__file__).parents[3].glob("recipes/stream_llama_8b_fits_*/h200.json")):
        read = codec.read_json(Report, path).streamed
        assert read is not None and read.rows[0].measured is not None


class There(streams.Inline):
    """A child that takes its device on paper for one that is there, and plain eager for what is bound."""

    def call(self, verb: str, result: Any, **arguments: Any) -> Any:
        if verb == "plain":
            streams.Inline.asked.append(verb)
            return Plained(apart=False)
        if verb == "block":
            arguments.pop("plain", None)
            arguments.pop("tokens", None)
        found = super().call(verb, result, **arguments)
        return replace(found, device=Device(id="cuda:0", name="A device", kind="cuda")) if verb == "load" else found


def test_a_bench_of_what_fits_and_what_does_not_tells_the_first_beside_plain_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_command import job

    monkeypatch.setattr(isolate, "Child", There)
    monkeypatch.setattr(bench, "device", SimpleNamespace(parse=lambda text: SimpleNamespace(is_simulated=False)))
    monkeypatch.setattr(eager, "TURNS", BenchSpec(num_pairs=6))
    monkeypatch.setattr(eager, "ALONE", BenchSpec(num_pairs=3))
    streams.Inline.asked.clear()
    half = StreamSpec(budget_share=0.5)
    report = command.stream(job(streams.factory(tmp_path), "bench", WHOLE, half, device="simulated:block=0.05ms", rivals=("resident",)))
    path = tmp_path / "report.json"
    path.write_text(codec.to_json(report), encoding="utf-8")
    read = codec.read_json(Report, path)
    assert read == report and read.streamed is not None
    fits, moves = read.streamed.rows
    assert moves.over_eager is None and fits.over_eager is not None and fits.over_eager.over is not None
    assert fits.over_eager.over.num_pairs == 9 and not fits.over_eager.apart
    assert [one.name for one in fits.over_eager.others] == ["everything resident", "everything resident, again"]
    assert streams.Inline.asked.count("plain") == streams.Inline.asked.count("unplain") == 1
    assert all(arm.rival is None for arm in read.streamed.arms), "plain eager once more is no library"
    assert app.run(["report", str(path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Beside plain eager" in text and "+0.00%" in text and "there was no room for its own" in text and "streamed, 100%" in text
    assert "Beside other libraries" not in text
