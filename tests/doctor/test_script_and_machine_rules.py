"""Edges of the rules about compilers, machines and scripts: what must not raise an alarm, and what a message must say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from broken import Hungry, raised
from builders import GPU, MS, US, Tape, evidence

from gpuopt.core.live import Inputs
from gpuopt.core.result import Finding, OpRecord, PrecisionAudit
from gpuopt.doctor.diagnose import diagnose
from gpuopt.doctor.evidence import CallSite, Compiled, Evidence, Load, ModelCalls, Script
from gpuopt.doctor.rules import graph_breaks


def of(code: str, subject: Evidence) -> list[Finding]:
    return [f for f in diagnose(subject) if f.code == code]


def calls(num: int = 50, *, name: str = "model", wall_s: float = 5.0, inputs: tuple[str, ...] = ("x:float32[8,3,224,224]",)) -> ModelCalls:
    return ModelCalls(name=name, module_class="Net", num_calls=num, wall_s=wall_s, inputs=inputs)


def test_many_graph_breaks_are_five_lines_and_a_sum_that_lose_none() -> None:
    breaks = tuple((f"reason {i}", f"model.py:{i}", i + 1) for i in range(9))
    found = of("GPU501", evidence(backend="inductor", preset="max-autotune", compiled=Compiled(graph_breaks=breaks)))
    assert len(found) == 6 and sum(f.count or 0 for f in found) == sum(range(1, 10))
    assert found[0].gain_high_ms is None, "no trace, no price"


def test_idle_time_inside_a_region_is_not_the_break_s() -> None:
    tape = Tape()
    for index in range(2):
        region = tape.op(f"{graph_breaks.REGION}: {index}/0")
        tape.kernel("nvjet_a", 1 * MS, op=region, gap_ns=3 * MS if index else 0)
        tape.kernel("nvjet_b", 1 * MS, op=region, gap_ns=7 * MS)
    assert graph_breaks.border_ms(evidence(tape)) == pytest.approx(3.0)
    alone = Tape()
    region = alone.op(f"{graph_breaks.REGION}: 0/0")
    alone.kernel("nvjet_a", 1 * MS, op=region)
    alone.kernel("nvjet_b", 1 * MS, op=region, gap_ns=7 * MS)
    assert graph_breaks.border_ms(evidence(alone)) is None


def test_eager_work_between_two_regions_counts_as_neither() -> None:
    tape = Tape()
    first = tape.op(f"{graph_breaks.REGION}: 0/0")
    tape.kernel("nvjet_a", 1 * MS, op=first)
    eager = tape.op("aten::nonzero")
    tape.kernel("nonzero", 100 * US, op=eager, gap_ns=1 * MS)
    second = tape.op(f"{graph_breaks.REGION}: 1/0")
    tape.kernel("nvjet_b", 1 * MS, op=second, gap_ns=2 * MS)
    assert graph_breaks.border_ms(evidence(tape)) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("guard", "word"),
    [
        ("0/0: tensor 'x' size mismatch at index 0. expected 8, actual 16", "--dim"),
        ("0/0: self.step == 3", "tensor"),
        ("0/0: tensor 'x' dtype mismatch. expected Float, actual Half", "dtype"),
        ("0/0: ___check_type_id(L['mask'], 123)", "types"),
        ("0/0: GLOBAL_STATE changed: grad_mode", "gradient mode"),
        ("", "TORCH_LOGS"),
    ],
)
def test_a_guard_has_its_own_remedy(guard: str, word: str) -> None:
    (found,) = of("GPU502", evidence(compiled=Compiled(recompiles=(("forward (model.py:12)", guard),))))
    assert word in found.fix and found.line == "model.py:12"


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "eager"},
        {"preset": "max-autotune"},
        {"flops": 1e8},  # small
        {"bytes": 1e12},  # bound by memory
        {"kernels": ("triton_tem_fused_mm_0",)},  # tuned already
        {"dtype": None},
        {"time_ns": None},
        {"op": "aten.add"},
    ],
)
def test_a_product_that_autotuning_cannot_help_is_left_alone(change: dict[str, object]) -> None:
    record = OpRecord(op="aten.mm", module="a", dtype="bfloat16", time_ns=2.0 * MS, flops=5e11, bytes=1e8, kernels=("nvjet",))
    asked = {"backend": "inductor", "preset": "default"}
    assert of("GPU504", evidence(records=(record,), wall_ms=3.0, **asked))
    asked |= {k: v for k, v in change.items() if k in asked}
    record = replace(record, **{k: v for k, v in change.items() if k not in asked})
    assert not of("GPU504", evidence(records=(record,), wall_ms=3.0, **asked))


def test_the_copies_of_inputs_are_no_memcpy_nodes() -> None:
    rows = (OpRecord(op="memcpy h2d (pageable)", module="?", time_ns=1e6, kernels=("Memcpy HtoD (Pageable -> Device)",)),)
    assert not of("GPU506", evidence(records=rows))
    tape = Tape()
    tape.op("MemcpyToHost", dur_ns=200 * US)
    (found,) = of("GPU506", evidence(tape))
    assert found.count == 1 and found.time_ms == pytest.approx(0.2)


def test_a_precision_nobody_asked_for_is_honoured_by_anything() -> None:
    audit = PrecisionAudit(shares={"float32": 1.0}, method="m", honoured=False)
    assert not of("GPU507", evidence(audit=audit))
    (found,) = of("GPU507", evidence(audit=replace(audit, requested="tf32")))
    assert "set_float32_matmul_precision" in found.fix


def test_heat_and_power_are_told_apart_and_the_same_heat_is_not_counted_twice() -> None:
    hot = {"power": 4000.0, "thermal": 3000.0, "software thermal": 3000.0, "hardware thermal": 100.0}
    subject = evidence(throttled_ms=hot, measured_ms=10_000.0)
    (found,) = of("GPU601", subject)
    assert "30%" in found.message and "heat" in found.message and not of("GPU602", subject)
    assert "power brake" in of("GPU601", evidence(throttled_ms={"power brake": 3000.0}, measured_ms=10_000.0))[0].message
    assert not of("GPU601", evidence(throttled_ms=hot, measured_ms=0.0))


def test_a_gpu_whose_users_are_unknown_is_not_called_shared() -> None:
    assert not of("GPU603", evidence(device=replace(GPU, other_processes=None)))


def test_memory_rules_are_silent_without_a_size_or_on_a_cpu() -> None:
    assert not of("GPU604", evidence(device=replace(GPU, memory_bytes=None), peak_bytes=10**15))
    assert not of("GPU605", evidence(memory_stats={"num_alloc_retries": 0}))


def test_two_models_loaded_once_each_are_not_reloaded_and_a_loader_in_the_loop_is() -> None:
    load = Load(line="infer.py:3", what="torch.load", count=2, seconds=1.0)
    assert not of("GPU711", evidence(script=Script(modules=(calls(name="a"), calls(name="b")), loads=(load,))))
    assert not of("GPU711", evidence(script=Script(loads=(replace(load, count=40),)))), "nothing was called"
    pieces = replace(load, count=40, seconds=20.0, at_start=40)
    assert not of("GPU711", evidence(script=Script(modules=(calls(40),), loads=(pieces,)))), "loaded once, in forty pieces, before the loop"
    (found,) = of("GPU711", evidence(script=Script(modules=(calls(40),), loads=(replace(load, count=40, seconds=20.0),))))
    assert found.line == "infer.py:3" and found.gain_high_ms is not None and found.gain_high_ms <= 500.0 + 1e-9


def test_reading_a_result_once_a_call_is_no_alarm_and_synchronizing_is() -> None:
    once = CallSite(line="infer.py:9", what="Tensor.cpu", count=50, seconds=0.1)
    assert not of("GPU713", evidence(script=Script(modules=(calls(),), syncs=(once,))))
    (found,) = of("GPU713", evidence(script=Script(modules=(calls(),), syncs=(replace(once, what="torch.cuda.synchronize"),))))
    assert found.severity == "info"


@pytest.mark.parametrize(
    "inputs",
    [
        ("input_ids:int64[1,1]", "cache_position:int64[1]"),
        ("x:float32[4,128]",),
        (),
        ("scale:float32[]",),
        ("x:float32[1,128]", "y:float32[64,128]"),
    ],
)
def test_decoding_batches_and_unknown_inputs_are_no_host_loop(inputs: tuple[str, ...]) -> None:
    assert not of("GPU714", evidence(script=Script(modules=(calls(20_000, inputs=inputs),))))


def test_long_calls_one_at_a_time_are_no_host_loop() -> None:
    assert not of("GPU714", evidence(script=Script(modules=(calls(2_000, wall_s=2_000.0, inputs=("x:float32[1,3,1024,1024]",)),))))


def test_the_batch_that_should_fit_needs_no_more_than_there_is() -> None:
    x = torch.ones(2048, 1024)
    device = replace(GPU, memory_bytes=64 * 2**20)
    subject = evidence(
        module=Hungry(hungry=True), inputs=Inputs(args=(x,), dims={"N": 2048}), device=device, failure=raised(Hungry(hungry=True), x)
    )
    (found,) = of("GPU704", subject)
    assert found.change is not None and found.bytes == 20 * 2**20
    fits = found.change.dims["N"]
    needed = 4 * (2 * 1024 * 4096 + 5 * 1024) + fits * 4 * (1024 + 4096 + 1024)
    assert fits % 8 == 0 and needed <= 0.9 * 64 * 2**20 < needed + 16 * 4 * 6144


def test_weights_that_do_not_fit_by_themselves_get_no_batch() -> None:
    x = torch.ones(4, 1024)
    subject = evidence(
        module=Hungry(hungry=True),
        inputs=Inputs(args=(x,)),
        device=replace(GPU, memory_bytes=2**24),
        failure=raised(Hungry(hungry=True), x),
    )
    (found,) = of("GPU704", subject)
    assert found.change is None and "weights alone" in found.fix
