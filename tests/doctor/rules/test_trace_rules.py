"""Rules that read a trace: they say nothing of traces they cannot judge, never raise, and never promise more than the call takes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product as every
from typing import Any

import pytest
import torch
from builders import CPU, GPU, MS, US, evidence
from hypothesis import given, settings
from hypothesis import strategies as st
from playing import ADD, COPY, GEMM, Played
from torch import nn

from gpuopt.core.live import Inputs
from gpuopt.core.result import Ceilings, Count, Finding, OpRecord, Waterfall, WaterfallPart
from gpuopt.core.spec import TensorSpec
from gpuopt.core.trace import Copy, CpuOp, Fetch, Kernel, RuntimeCall, Step, Trace
from gpuopt.doctor import timeline, transfers
from gpuopt.doctor.diagnose import diagnose
from gpuopt.doctor.evidence import Compiled, Evidence
from gpuopt.doctor.price import AROUND, WIDEST
from gpuopt.doctor.rule import rules
from gpuopt.doctor.rules.kv_concat import appended
from gpuopt.doctor.rules.partial_wave import fill, resident
from gpuopt.profiling import waterfall

MINE = {
    code: rule
    for code, rule in rules().items()
    if code
    in "GPU102 GPU104 GPU105 GPU106 GPU107 GPU108 GPU109 GPU110 GPU111 GPU205 GPU208 GPU306 GPU311 GPU402 GPU403 GPU404 GPU405 GPU406 GPU407 GPU408".split()
}

NAMES = (GEMM, ADD, COPY, "triton_per_fused__safe_softmax_3", "void at::native::vectorized_gather_kernel<16, long>(char*)", "", "Kernel2")
OPS = (
    "aten::item", "aten::cat", "aten::index", "aten::index_put_", "aten::contiguous", "aten::to", "aten::_scaled_dot_product_attention_math", "aten::mm",
    "",
)  # fmt: skip
SHAPES = ((), ((),), ((0,),), ((4, 8, 64, 16), (4, 8, 1, 16)), ((3, 5),), ((7,), (7,), (7,)))


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Anything a parser could hand on: no steps, unknown ops, no correlations, zero times, shapes of zero elements."""
    small = st.integers(0, 3 * US)
    num_steps = draw(st.integers(0, 2))
    step = st.sampled_from([None, *range(num_steps)])
    ops: list[CpuOp] = []
    for index in range(draw(st.integers(0, 8))):
        parent = draw(st.sampled_from([None, *range(index)]))
        ops.append(
            CpuOp(
                index=index, name=draw(st.sampled_from(OPS)), start_ns=draw(small), dur_ns=draw(small), self_ns=0, num_children=0, thread="1/1", parent=parent,
                module=draw(st.sampled_from([None, "", "?", "layers.0.attention"])), step=draw(step), shapes=draw(st.sampled_from(SHAPES)),
            )
        )  # fmt: skip
    op, correlation = st.sampled_from([None, *range(len(ops))]), st.sampled_from([None, 1, 2, 3])
    return Trace(
        device="cuda:0",
        steps=tuple(Step(start_ns=n * 3 * US, dur_ns=draw(small)) for n in range(num_steps)),
        kernels=tuple(
            Kernel(
                name=draw(st.sampled_from(NAMES)), start_ns=draw(small), dur_ns=draw(small), stream=draw(st.integers(0, 1)), correlation=draw(correlation),
                op=draw(op), step=draw(step), graph_id=draw(st.sampled_from([None, 1])), grid=draw(st.sampled_from([None, (0, 0, 0), (1, 1, 1), (133, 1, 1)])),
            )
            for _ in range(draw(st.integers(0, 6)))
        ),
        copies=tuple(
            Copy(
                kind=draw(st.sampled_from(["h2d", "d2h", "d2d"])), memory=draw(st.sampled_from(["", "pageable", "pinned"])), bytes=draw(st.integers(0, 10**6)),
                start_ns=draw(small), dur_ns=draw(small), stream=0, correlation=draw(correlation), op=draw(op), step=draw(step),
            )
            for _ in range(draw(st.integers(0, 4)))
        ),
        runtime=tuple(
            RuntimeCall(
                name=name, kind=kind, start_ns=draw(small), dur_ns=draw(small), thread="1/1", correlation=draw(correlation), op=draw(op), step=draw(step)
            )
            for name, kind in draw(
                st.lists(st.sampled_from([("cudaStreamSynchronize", "sync"), ("cudaLaunchKernel", "launch"), ("cudaMalloc", "alloc"), ("x", "other")]), max_size=6)
            )
        ),
        ops=tuple(ops),
        fetches=tuple(
            Fetch(name="enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", start_ns=draw(small), dur_ns=draw(small), thread="1/1")
            for _ in range(draw(st.integers(0, 2)))
        ),
    )  # fmt: skip


RECORDS = (
    OpRecord(op="aten.mm", module="?", dtype=None, time_ns=None, flops=None, bytes=None),
    OpRecord(op="aten.embedding", module="", dtype="float16", time_ns=0.0, flops=0.0, bytes=0.0),
    OpRecord(op="aten.mm", module="a", dtype="float16", time_ns=1e6, flops=1e9, bytes=1e6, kernels=("ampere_hgemm_128x128_nn", "")),
    OpRecord(op="aten.mm", module="b", dtype="int4", time_ns=1e6, flops=1e9, bytes=1e6, kernels=("ampere_sgemm_128x64_tn",)),
)


@settings(max_examples=150, deadline=None)
@given(
    trace=traces(),
    wall_ms=st.sampled_from([None, 0.0, 0.001, 5.0]),
    where=st.sampled_from(["bare", "cpu", "full"]),
    backend=st.sampled_from(["eager", "inductor"]),
)
def test_no_rule_fails_on_any_trace_and_no_range_is_wider_or_larger_than_it_may_be(
    trace: Trace, wall_ms: float | None, where: str, backend: str
) -> None:
    device = {"bare": replace(GPU, ceilings=Ceilings(), num_sms=None, capability=None), "cpu": CPU, "full": GPU}[where]
    module = nn.Embedding(4, 4, device="meta") if where == "full" else nn.Identity() if where == "cpu" else None
    waterfall = Waterfall(wall_ms=wall_ms or 0.0, parts=(WaterfallPart(name="launch gaps", ms=(wall_ms or 0.0) / 2),), unaccounted_ms=0.0)
    count = Count(records=RECORDS, flops=0.0, flops_by_dtype={}, bytes=0.0, coverage=0.0) if where == "full" else None
    seen = Evidence(
        device=device, trace=trace, records=RECORDS, wall_ms=wall_ms, module=module, backend=backend, waterfall=waterfall, count=count,
        inputs=Inputs(args=(torch.zeros(2, 3),)),
    )  # fmt: skip
    for finding in diagnose(seen, table=MINE):
        assert "this rule failed" not in finding.message, (finding.rule, finding.message)
        assert "\n" not in finding.message and finding.fix
        if finding.gain_high_ms is not None:
            assert (
                finding.gain_low_ms is not None and 0 <= finding.gain_low_ms <= finding.gain_high_ms <= WIDEST * finding.gain_low_ms + 1e-9
            )
            assert not wall_ms or finding.gain_high_ms <= wall_ms + 1e-9
            assert finding.time_ms is None or finding.gain_high_ms <= AROUND * finding.time_ms + 1e-9


def test_all_of_them_are_there() -> None:
    assert len(MINE) == 20


def test_nothing_is_said_of_a_cpu_trace() -> None:
    op = CpuOp(
        index=0,
        name="aten::mm",
        start_ns=0,
        dur_ns=MS,
        self_ns=MS,
        num_children=0,
        thread="1/1",
        parent=None,
        module="a",
        step=0,
        shapes=((8, 8),),
    )
    seen = Evidence(device=CPU, trace=Trace(device="cpu", steps=(Step(start_ns=0, dur_ns=MS),), ops=(op,)), wall_ms=1.0, records=RECORDS)
    assert diagnose(seen, table=MINE) == ()


def test_sums_are_a_call_however_many_calls_were_traced() -> None:
    tape = Played()
    for at in range(8):
        tape.run("aten::contiguous", COPY, 100 * US, module="a")
        tape.run("aten::mm", GEMM, 100 * US, module="a")
        if at == 3:
            middle = tape.device_ns
    one = tape.trace()
    half = lambda e: replace(e, step=0 if e.start_ns < middle else 1)  # noqa: E731
    two = replace(
        one,
        steps=(Step(start_ns=0, dur_ns=middle), Step(start_ns=middle, dur_ns=one.steps[0].dur_ns - middle)),
        kernels=tuple(map(half, one.kernels)),
        runtime=tuple(map(half, one.runtime)),
        ops=tuple(map(half, one.ops)),
    )
    (whole,) = (f for f in diagnose(evidence(trace=one, wall_ms=1.6), table=MINE) if f.code == "GPU111")
    (a_call,) = (f for f in diagnose(evidence(trace=two, wall_ms=0.8), table=MINE) if f.code == "GPU111")
    assert whole.time_ms == pytest.approx(0.8) and a_call.time_ms == pytest.approx(0.4)
    assert (whole.count, a_call.count) == (8, 4)


def test_a_gap_is_worth_what_it_takes_untraced() -> None:
    """Tracing stretched the host to twice its time: a wait is priced at half of what the trace shows."""
    tape = Played()
    for _ in range(10):
        tape.run("aten::mm", GEMM, 100 * US, host_ns=20 * US)
        tape.read(module="a")
        tape.host_ns += 80 * US
    tape.run("aten::mm", GEMM, 100 * US)
    trace = tape.trace()
    idle = tape.ms - timeline.busy_ms(trace)
    (full,) = (f for f in diagnose(evidence(tape), table=MINE) if f.code == "GPU104")
    (half,) = (f for f in diagnose(evidence(tape, wall_ms=tape.ms - idle / 2), table=MINE) if f.code == "GPU104")
    read_ms = 10 * 0.002
    assert half.time_ms is not None and full.time_ms is not None
    assert half.time_ms - read_ms == pytest.approx((full.time_ms - read_ms) / 2)


def test_layers_that_are_alike_are_one_finding_and_many_places_end_in_a_sum() -> None:
    tape = Played()
    for layer, name in every(range(4), "abcdefghi"):
        tape.run("aten::contiguous", COPY, 100 * US, module=f"layers.{layer}.{name}")
    found = [f for f in diagnose(evidence(tape), table=MINE) if f.code == "GPU111"]
    assert len(found) == 6
    assert sum("and 3 like it" in f.message for f in found) == 5 and sum("in 4 other places" in f.message for f in found) == 1
    assert sum(f.time_ms or 0.0 for f in found) == pytest.approx(3.6)


def test_a_mask_is_only_asked_for_where_the_model_takes_one_and_has_none() -> None:
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("seed_trap", Path(__file__).parents[1] / "seeds" / "attention_in_math.py")
    assert spec is not None and spec.loader is not None
    seed = module_from_spec(spec)
    spec.loader.exec_module(seed)
    bad: Evidence = seed.bad()
    (trap,) = (f for f in diagnose(bad, table=MINE) if f.code == "GPU306")
    assert trap.change is not None and trap.change.inputs == ("attention_mask:int64[N,S]=1",) and trap.safe
    mask = TensorSpec.parse("attention_mask:int64[N,S]=1")
    assert bad.inputs is not None
    masked = replace(
        bad, inputs=replace(bad.inputs, kwargs={**bad.inputs.kwargs, "attention_mask": torch.ones(2, 2)}, specs=(*bad.inputs.specs, mask))
    )
    (given_one,) = (f for f in diagnose(masked, table=MINE) if f.code == "GPU306")
    assert given_one.change is None and not given_one.safe
    fp32 = replace(bad, precision="fp32", module=None)
    assert not [f for f in diagnose(fp32, table=MINE) if f.code == "GPU306"], "fp32 products are what fp32 asked for"


def test_where_the_rewrite_applies_no_mask_is_made_instead_of_one_passed() -> None:
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("seed_trap", Path(__file__).parents[1] / "seeds" / "attention_in_math.py")
    assert spec is not None and spec.loader is not None
    seed = module_from_spec(spec)
    spec.loader.exec_module(seed)

    def remedy(**more: Any) -> Any:
        (found,) = (f for f in diagnose(replace(seed.bad(), **more), table=MINE) if f.code == "GPU306")
        return found

    rewritten = remedy(rewrites={"no_mask": ""})
    assert rewritten.change is not None and rewritten.change.rewrites == ("no_mask",) and not rewritten.change.inputs and rewritten.safe
    assert "--rewrite no_mask" in rewritten.fix and "attention_mask:int64[N,S]=1" in rewritten.fix
    for elsewhere in ({"rewrites": {"no_mask": "its attention takes no mask"}}, {"rewrites": {"no_mask": ""}, "transforms": ("no_mask",)}):
        change = remedy(**elsewhere).change
        assert change is None or not change.rewrites
    given = seed.bad().inputs
    masked = replace(given, kwargs={**given.kwargs, "attention_mask": torch.ones(2, 2)})
    change = remedy(rewrites={"no_mask": ""}, inputs=masked).change
    assert change is None, "a mask that is given is kept by the rewrite: it would change nothing"


@pytest.mark.parametrize(
    ("compiled", "preset", "wanted"),
    [
        (None, None, "graphed"),
        (Compiled(num_graphs=1), "default", "graphed"),
        (Compiled(num_graphs=1), "max-autotune-no-cudagraphs", "max-autotune-graphed"),
        (Compiled(num_graphs=3), "default", "reduce-overhead"),
        (Compiled(num_graphs=1, recompiles=(("f m.py:1", "size"),)), "freezing", "freezing-reduce-overhead"),
    ],
)
def test_one_graph_of_the_whole_call_where_all_calls_take_one_way(compiled: Any, preset: str | None, wanted: str) -> None:
    tape = Played()
    for _ in range(100):
        tape.run("aten::mm", GEMM, 12 * US, host_ns=30 * US)
    seen = evidence(
        tape, backend="inductor", preset=preset, compiled=compiled, waterfall=waterfall.build(tape.trace(), tape.ms, GPU.ceilings, ())
    )
    (found,) = (f for f in diagnose(seen, table=MINE) if f.code == "GPU404")
    assert found.change is not None and found.change.backend is not None and found.change.backend.preset == wanted
    assert ("reduce-overhead" if "reduce" in wanted else "inductor:graphed") in found.fix
    from gpuopt.backends.inductor import PRESETS

    assert wanted in PRESETS


def test_copies_are_sorted_by_size_into_inputs_and_weights() -> None:
    model = nn.Linear(64, 64, bias=False)
    tape = Played()
    for num_bytes in (64 * 64 * 4, 64 * 64 * 4, 12_345):
        tape.move("h2d", num_bytes, US)
    seen = evidence(tape, module=model, inputs=Inputs(args=(torch.zeros(64, 64),)))
    sent = transfers.sent(seen)
    assert [len(group) for group in (sent.inputs, sent.weights, sent.others)] == [1, 1, 1], "an input as large as a weight is counted once"


def test_a_copy_under_a_kernel_is_not_exposed() -> None:
    kernel = Kernel(name=GEMM, start_ns=10, dur_ns=20, stream=7, correlation=1, op=None, step=0)
    more = replace(kernel, start_ns=35, dur_ns=5)
    copy = Copy(kind="h2d", memory="pinned", bytes=1, start_ns=0, dur_ns=50, stream=8, correlation=2, op=None, step=0)
    trace = Trace(device="cuda:0", steps=(Step(start_ns=0, dur_ns=60),), kernels=(kernel, more), copies=(copy,))
    assert transfers.exposed_ms(trace, (copy,)) == pytest.approx(25e-6)


@pytest.mark.parametrize(
    ("there", "added", "is_cache"),
    [
        ((1, 32, 512, 128), (1, 32, 1, 128), True),
        ((1, 512, 32, 128), (1, 1, 32, 128), True),
        ((8, 256, 56, 56), (8, 32, 56, 56), False),  # a dense block's channels
        ((8, 1, 768), (8, 196, 768), False),  # a class token before its patches
        ((8, 512, 768), (8, 512, 768), False),
        ((64, 512), (1, 512), False),  # rows of a batch
    ],
)
def test_appending_to_a_cache_is_told_from_other_cats(there: tuple[int, ...], added: tuple[int, ...], is_cache: bool) -> None:
    op = CpuOp(
        index=0, name="aten::cat", start_ns=0, dur_ns=1, self_ns=1, num_children=0, thread="1/1", parent=None, module="a", shapes=(there, added)
    )  # fmt: skip
    assert (appended(op) is not None) == is_cache


@pytest.mark.parametrize(
    ("blocks", "fit", "share"),
    [
        (66, 1, 0.5),
        (132, 1, 1.0),
        (133, 1, 133 / 264),
        (264, 1, 1.0),
        (264, 4, 1.0),
        (140, 4, 1.0),
        (132 * 4 + 1, 4, (132 * 4 + 1) / (132 * 5)),
        (0, 1, 0.0),
    ],
)
def test_waves_are_counted_in_blocks_that_fit_at_once(blocks: int, fit: int, share: float) -> None:
    assert fill(blocks, 132, fit) == pytest.approx(share)


def test_blocks_that_fit_are_limited_by_threads_registers_and_shared_memory() -> None:
    kernel = Kernel(name=GEMM, start_ns=0, dur_ns=1, stream=7, correlation=1, op=None, step=0, block=(256, 1, 1))
    assert resident(kernel, "9.0") == 8
    assert resident(replace(kernel, registers=128), "9.0") == 2
    assert resident(replace(kernel, registers=128, shared_bytes=200 * 1024), "9.0") == 1
    assert resident(kernel, None) == 1
    assert resident(replace(kernel, block=None), "9.0") == 1


def test_copies_that_were_asked_for_are_priced_as_what_computing_can_hide() -> None:
    def found(work_ns: int) -> tuple[Finding, Finding]:
        tape = Played()
        tape.move("h2d", 4_000_000, 100 * US)
        tape.run("aten::mm", GEMM, work_ns)
        seen = evidence(tape, inputs=Inputs(args=(torch.zeros(1_000_000),)))
        (own,) = (f for f in diagnose(seen, table=MINE) if f.code == "GPU102")
        (asked,) = (f for f in diagnose(replace(seen, input_mode="host"), table=MINE) if f.code == "GPU102")
        assert own.gain_high_ms is not None and asked.gain_high_ms is not None and "--input-mode host" in asked.message
        return own, asked

    own, asked = found(MS)
    assert asked.gain_high_ms == own.gain_high_ms, "a long call hides all of it"
    own, asked = found(20 * US)
    assert asked.gain_high_ms is not None and own.gain_high_ms is not None
    assert asked.gain_high_ms == pytest.approx(own.gain_high_ms / 5), "a short one hides as much as it computes"


def test_a_graph_is_not_promised_what_the_hosts_own_waits_cost() -> None:
    """Twice the same launches, once with a wait after every tenth: the launches are worth the same."""

    def seen(*, waits: bool) -> Evidence:
        tape = Played()
        for at in range(100):
            tape.host_ns += 15 * US
            tape.run("aten::mm", GEMM, 12 * US, host_ns=15 * US)
            if waits and at % 10 == 9 and at < 99:
                # A wait returns a little after the device is done.
                tape.call("cudaDeviceSynchronize", "sync", tape.device_ns - tape.host_ns + 3 * US)
                tape.host_ns += 400 * US
        tape.wait("cudaDeviceSynchronize")
        return evidence(tape, waterfall=waterfall.build(tape.trace(), tape.ms, GPU.ceilings, ()))

    (plain,) = (f for f in diagnose(seen(waits=False), table=MINE) if f.code == "GPU404")
    (waiting,) = (f for f in diagnose(seen(waits=True), table=MINE) if f.code == "GPU404")
    assert plain.gain_high_ms is not None and waiting.gain_high_ms == pytest.approx(plain.gain_high_ms, rel=0.05)
    assert "for the host's own waits" in waiting.message and "own waits" not in plain.message


def test_a_graph_is_not_promised_what_the_program_does_between_its_calls() -> None:
    """As in a script, where a call ends when the next one starts: five milliseconds of Python follow the last launch, or a loader is asked halfway."""

    def seen(after_ns: int, *, fetch_ns: int = 0) -> Evidence:
        tape = Played()
        for at in range(100):
            if at == 50 and fetch_ns:
                tape.fetch("_SingleProcessDataLoaderIter", fetch_ns)
            tape.run("aten::mm", GEMM, 12 * US, host_ns=30 * US)
        tape.host_ns += after_ns
        return evidence(tape, waterfall=waterfall.build(tape.trace(), tape.ms, GPU.ceilings, ()))

    cases = (seen(0), seen(5 * MS), seen(0, fetch_ns=5 * MS))
    (alone,), (after,), (halfway,) = ([f for f in diagnose(case, table=MINE) if f.code == "GPU404"] for case in cases)
    assert alone.gain_high_ms is not None
    assert after.gain_high_ms == pytest.approx(alone.gain_high_ms, rel=0.02) and halfway.gain_high_ms == pytest.approx(
        alone.gain_high_ms, rel=0.02
    )


def test_idle_time_is_the_waterfalls_parts_or_the_wall_less_the_busy_time() -> None:
    tape = Played()
    tape.run("aten::mm", GEMM, 100 * US, host_ns=100 * US)
    parts = tuple(WaterfallPart(name=n, ms=ms) for n, ms in (("launch gaps", 1.0), ("python and framework", 2.0), ("synchronisation", 4.0), ("idle", 8.0), ("memory-bound", 16.0)))  # fmt: skip
    seen = evidence(tape, waterfall=Waterfall(wall_ms=31.0, parts=parts, unaccounted_ms=0.0))
    assert (timeline.idle_ms(seen), timeline.idle_ms(seen, *timeline.LAUNCHING)) == (15.0, 3.0)
    assert timeline.idle_ms(replace(seen, waterfall=None)) == pytest.approx(0.1)
    assert timeline.idle_ms(replace(seen, waterfall=None, wall_ms=None)) is None


def test_the_weights_copies_are_priced_by_one_rule_alone() -> None:
    """Pageable weights are GPU108's, pageable inputs beside them GPU101's."""
    model = nn.Linear(1024, 1024, bias=False)
    tape = Played()
    tape.move("h2d", 4 * 1024 * 1024, 500 * US, memory="pageable")
    tape.move("h2d", 4_096_000, 450 * US, memory="pageable")
    tape.run("aten::mm", GEMM, MS)
    found = {
        f.code: f
        for f in diagnose(evidence(tape, module=model, inputs=Inputs(args=(torch.zeros(1000, 1024),))))
        if f.code in ("GPU101", "GPU108")
    }
    assert found["GPU101"].bytes == 4_096_000 and found["GPU108"].bytes == 4 * 1024 * 1024


def test_one_table_kept_on_the_host_on_purpose_is_no_weight_that_travels() -> None:
    model = nn.ModuleList([nn.Linear(1024, 1024, bias=False) for _ in range(12)] + [nn.Linear(64, 64, bias=False)])
    tape = Played()
    tape.move("h2d", 64 * 64 * 4, 500 * US, memory="pageable")
    tape.run("aten::mm", GEMM, MS)
    codes = {f.code for f in diagnose(evidence(tape, module=model)) if f.code in ("GPU101", "GPU108")}
    assert codes == {"GPU101"}


def test_a_fetch_before_the_traced_calls_and_device_work_during_one_do_not_count() -> None:
    """Workers start in the first fetch; what overlaps is no idle time."""
    tape = Played()
    tape.fetch("_MultiProcessingDataLoaderIter", 20 * MS)
    for _ in range(4):
        tape.run("aten::mm", GEMM, 2 * MS)
    late = replace(tape.trace(), steps=(Step(start_ns=20 * MS, dur_ns=9 * MS),))
    assert not [f for f in diagnose(evidence(trace=late, wall_ms=9.0), table=MINE) if f.code == "GPU110"]
    tape.fetch("_MultiProcessingDataLoaderIter", 7 * MS)  # the device works on for most of it
    busy = replace(tape.trace(), steps=(Step(start_ns=20 * MS, dur_ns=9 * MS),))
    assert not [f for f in diagnose(evidence(trace=busy, wall_ms=9.0), table=MINE) if f.code == "GPU110"]
    tape.fetch("_MultiProcessingDataLoaderIter", 7 * MS)  # and now it has nothing to do
    idle = replace(tape.trace(), steps=(Step(start_ns=20 * MS, dur_ns=15 * MS),))
    (found,) = (f for f in diagnose(evidence(trace=idle, wall_ms=15.0), table=MINE) if f.code == "GPU110")
    assert found.time_ms == pytest.approx((34 * MS - tape.device_ns) / 1e6, rel=0.01) and found.count == 2
