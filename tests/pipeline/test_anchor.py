"""The ceiling under load: which products are timed, how long, and what becomes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpuopt.core.errors import OutOfMemory
from gpuopt.core.progress import Silent
from gpuopt.core.result import Ceiling, Ceilings, Count, Device, Environment, Samples
from gpuopt.core.spec import BackendSpec, BenchSpec, Candidate, InputSpec, Job, ModelRef, TensorSpec
from gpuopt.pipeline import anchor, facts, jobs, pairs, seats
from gpuopt.pipeline import machine as machines
from gpuopt.profiling import roofline

GPU = Device(id="cuda:0", name="GPU", kind="cuda")
CPU = Device(id="cpu", name="CPU", kind="cpu")


def counted(**by_dtype: float) -> Count:
    return Count(records=(), flops=sum(by_dtype.values()), flops_by_dtype=by_dtype, bytes=0.0, coverage=1.0)


def test_products_are_timed_in_every_precision_that_carries_more_than_a_rare_part_of_the_flops() -> None:
    mixed = counted(float16=990.0, float32=5.0, tf32=5.0)
    assert anchor.wanted([mixed, counted(float32=1.0), None], GPU, "auto") == ("fp16", "fp32")


@pytest.mark.parametrize(("device", "mode", "some"), [(GPU, "auto", True), (CPU, "auto", False), (CPU, "on", True), (GPU, "off", False)])
def test_automatic_means_on_gpus_alone(device: Device, mode: str, some: bool) -> None:
    assert bool(anchor.wanted([counted(float16=1.0)], device, mode)) is some


def test_nothing_is_timed_for_a_precision_without_a_plain_product() -> None:
    assert anchor.wanted([counted(int8=1.0), counted(float8_e4m3fn=1.0)], GPU, "on") == ()


def test_a_forward_without_flops_wants_no_products() -> None:
    assert anchor.wanted([counted(float16=0.0)], GPU, "on") == ()


def test_blocks_are_as_long_as_the_candidates_own_within_limits() -> None:
    spec = BenchSpec(block_ms=50, min_iterations=3)
    assert anchor.block_spec(spec, 48.0).block_ms == pytest.approx(144)
    assert anchor.block_spec(spec, 1.0).block_ms == 50
    assert anchor.block_spec(spec, 10_000.0).block_ms == anchor.LONGEST_BLOCK_MS


def test_the_ceiling_is_the_median_call_of_all_blocks() -> None:
    blocks = [Samples(samples_ns=(2_000, 2_000, 2_000), block_sizes=(3,)), Samples(samples_ns=(1_000, 9_000_000), block_sizes=(2,))]
    row = anchor.ceiling("fp16", pairs.joined(blocks), 4e6, "GEMM")
    assert row.value == pytest.approx(4e6 / 2e-6)
    assert row.kind == "sustained" and "2 blocks" in row.source


def test_the_share_of_what_is_sustained_is_weighed_by_dtype_and_no_limit() -> None:
    rows = (
        Ceiling(quantity="fp16", value=100.0, unit="FLOP/s", kind="sustained", source=""),
        Ceiling(quantity="fp16", value=200.0, unit="FLOP/s", kind="measured", source=""),
        Ceiling(quantity="fp32", value=10.0, unit="FLOP/s", kind="measured", source=""),
    )
    ceilings = Ceilings(rows=rows)
    assert roofline.whole(counted(float16=50.0), 1.0, ceilings).pct_of_sustained == pytest.approx(50)
    over = roofline.whole(counted(float16=150.0), 1.0, ceilings)
    assert over.pct_of_sustained == pytest.approx(150) and over.pct_of_measured == pytest.approx(75)
    assert "less power" in over.ceiling_note
    # A tenth in fp32 has no sustained ceiling to stand against: no figure rather than half of one. A thousandth may use the measured one.
    assert roofline.whole(counted(float16=9.0, float32=1.0), 1.0, ceilings).pct_of_sustained is None
    rare = roofline.whole(counted(float16=49.9, float32=0.1), 1.0, ceilings).pct_of_sustained
    assert rare == pytest.approx(49.9 + 1.0)
    assert roofline.whole(counted(float32=1.0), 1.0, ceilings).pct_of_sustained is None


def test_what_goes_beside_the_candidates_never_keeps_a_bench_going() -> None:
    calls = {"a": 0, "beside": 0}

    def side(name: str) -> Samples:
        calls[name] += 1
        if name == "a" and calls["a"] == 3:
            raise RuntimeError("gone")
        return Samples(samples_ns=(1,), block_sizes=(1,))

    found = pairs.interleave(
        {"a": lambda: side("a")},
        BenchSpec(num_pairs=20, max_time_s=0.0),
        beside={"beside": lambda: side("beside")},
        on_failure=lambda key, error: None,
    )
    assert len(found["a"]) == 2 and calls["beside"] <= 3


def test_a_bench_on_a_cpu_reports_the_sustained_ceiling_when_asked(tmp_path, monkeypatch, forked) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    candidate = Candidate(
        model=ModelRef(text="torch.nn:Identity"),
        inputs=InputSpec(tensors=(TensorSpec(name="input", dtype="float32", shape=("N", 4)),)),
        backend=BackendSpec(name="null", options={"sleep_ms": 2}),
        dims={"N": 1},
    )
    job = Job(verb="bench", candidates=(candidate, candidate), bench=BenchSpec(num_pairs=6, max_time_s=0.2, sustained="on", verify="off"))
    monkeypatch.setattr(anchor, "wanted", lambda counts, device, mode: ("fp32",))
    report = jobs.bench(job)
    assert report.device is not None
    rows = [row for row in report.device.ceilings.rows if row.kind == "sustained"]
    assert len(rows) == 1 and 1e6 < rows[0].value < 1e15  # a busy machine may be slow at either ceiling


def test_products_faster_than_the_measured_ceiling_have_it_measured_again(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def surveyed(value: float) -> facts.Survey:
        row = Ceiling(quantity="fp32", value=value, unit="FLOP/s", kind="measured", source="")
        return facts.Survey(environment=Environment(gpuopt="", python="", platform=""), device=replace(CPU, ceilings=Ceilings(rows=(row,))))

    again: list[bool] = []

    def survey(job: Job, progress: object) -> facts.Survey:
        again.append(job.refresh)
        return surveyed(100.0)

    monkeypatch.setattr(machines, "survey", survey)
    machine = machines.Machine(job=Job(verb="bench"), progress=Silent(), survey=surveyed(10.0))
    machine.keep({"fp32": Ceiling(quantity="fp32", value=11.0, unit="FLOP/s", kind="sustained", source="")})
    assert not again  # within the slack of a CPU
    machine.keep({"fp32": Ceiling(quantity="fp32", value=99.0, unit="FLOP/s", kind="sustained", source="")})
    assert again == [True] and machine.device.ceilings.find("fp32", "measured").value == 100.0  # type: ignore[union-attr]
    assert machine.device.ceilings.find("fp32", "sustained") is not None


def test_no_room_beside_the_model_is_a_warning_and_no_failure(tmp_path, monkeypatch, forked) -> None:  # type: ignore[no-untyped-def]
    from gpuopt.core.result import Status
    from gpuopt.pipeline.isolate import Child, ChildFailed

    told: list[str] = []
    ask = Child.call

    def call(self, verb, result, **arguments):  # type: ignore[no-untyped-def]
        if verb == "anchor":
            raise ChildFailed(Status.OOM_DEVICE, "no memory left", error=OutOfMemory("no memory left"))
        return ask(self, verb, result, **arguments)

    monkeypatch.setattr(Child, "call", call)
    monkeypatch.setattr(anchor, "wanted", lambda counts, device, mode: ("fp32",))
    seat = seats.Seat.__new__(seats.Seat)
    seat.count, seat.sampled = counted(float32=1.0), Samples(samples_ns=(1_000_000,))

    class Tell:
        def warn(self, text: str) -> None:
            told.append(text)

    machine = machines.Machine(job=Job(verb="bench"), progress=Tell(), survey=type("S", (), {"device": CPU})())  # type: ignore[arg-type]
    with seats.products([seat], Job(verb="bench"), machine) as found:
        assert found.sides == {}
    assert told and "no memory left" in told[0]
