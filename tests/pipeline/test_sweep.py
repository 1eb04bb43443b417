"""`bench --device cpu,cuda`: a GPU that is made up, with known costs, launches and memory, beside the CPU of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gpuopt.core import codec
from gpuopt.core.errors import OutOfMemory, Unavailable
from gpuopt.core.result import Count, Device, Report, Samples, Status, Waterfall, WaterfallPart
from gpuopt.core.spec import Gates, Precision
from gpuopt.devices import null
from gpuopt.pipeline import facts, gates, isolate, jobs, seats, sweep
from gpuopt.pipeline import machine as machines
from gpuopt.pipeline.isolate import ChildFailed

Models = Callable[[str], str]

WEIGHTS, EACH = 1_000_000_000, 50_000_000


@dataclass
class Lab:
    """What the made-up devices cost, and which blocks were asked for."""

    cpu_ms: Callable[[int], float] = lambda batch: 1.0 * batch
    gpu_ms: Callable[[int], float] = lambda batch: 5.0 + 0.05 * batch
    peak: Callable[[int], int] = lambda batch: WEIGHTS + EACH * batch
    cpu_peak: Callable[[int], int] = lambda batch: WEIGHTS
    holds: int = 10_000
    """The largest batch that fits the GPU in truth."""
    free: int = 2_000_000_000
    gaps: float = 0.9
    """Share of the GPU's wall time between launches."""
    blocks: list[str] = field(default_factory=list)
    children: list[Any] = field(default_factory=list)

    def fall(self) -> Waterfall:
        parts = (("launch gaps", self.gaps), ("other compute", 1 - self.gaps))
        return Waterfall(wall_ms=10.0, parts=tuple(WaterfallPart(name=n, ms=10.0 * share) for n, share in parts), unaccounted_ms=0.0)

    def device(self, name: str) -> Device:
        if name == "cpu":
            return Device(id="cpu", name="CPU", kind="cpu", memory_bytes=2**40, free_bytes=2**40, ceilings=null.CEILINGS)
        index = name.partition(":")[2] or "0"
        return replace(null.DEVICE, id=f"cuda:{index}", kind="cuda", memory_bytes=2 * self.free, free_bytes=self.free)


@pytest.fixture
def lab(tools: Any, local: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    found = Lab()
    plain = isolate.Child  # the local one

    def survey(job: Any, progress: Any, **_: Any) -> facts.Survey:
        name = job.candidates[0].device if job.candidates else job.device
        if name == "cuda:9":
            raise Unavailable("device cuda:9 cannot be used: there is 1 GPU", fix="--device cuda:0")
        return replace(tools.fake_survey(), device=found.device(name))

    class Child:
        """Loads the model in this process; what it would take on its device is made up."""

        def __init__(self, **more: Any) -> None:
            self.inner: Any = plain(**more)
            self.pid, self.device, self.batch = self.inner.pid, "", 1
            found.children.append(self)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self.inner.close()

        def close(self) -> None:
            self.inner.close()

        def kill(self) -> None:
            self.inner.kill()

        def call(self, verb: str, result: Any, **arguments: Any) -> Any:
            is_gpu = self.device.startswith("cuda")
            ms = (found.gpu_ms if is_gpu else found.cpu_ms)(self.batch)
            peak = (found.peak if is_gpu else found.cpu_peak)(self.batch)
            match verb:
                case "load":
                    asked = arguments["candidate"]
                    self.device, self.batch = asked.device, asked.dims.get("N", 1)
                    if asked.precision is Precision.TF32 and self.device == "cpu":
                        return self.inner.call(verb, result, **arguments)  # which refuses it
                    answer = self.inner.call(verb, result, **{**arguments, "candidate": replace(asked, device="cpu", precision=None)})
                    precision = asked.precision.value if asked.precision else answer.precision
                    return replace(answer, device=self.device, precision=precision)
                case "build":
                    if is_gpu and self.batch > found.holds:
                        raise ChildFailed(Status.OOM_DEVICE, "build: CUDA out of memory", error=OutOfMemory("build: CUDA out of memory"))
                    flops = 1e6 * self.batch
                    counted = Count(records=(), flops=flops, flops_by_dtype={"float32": flops}, bytes=1e6, coverage=1.0)
                    return facts.Built(compile_s=0.1, cold_start_s=0.2, audit=None, count=counted)
                case "warm":
                    return facts.Measured(samples=Samples(warmup_ns=(round(ms * 1e6),), clock="fake"))
                case "block" | "measure":
                    found.blocks.append(self.device)
                    samples = tuple(round(ms * 1e6) + i for i in range(2))
                    return facts.Measured(samples=Samples(samples_ns=samples, block_sizes=(2,), clock="fake"), peak_bytes=peak)
                case "meters":
                    return facts.Measured(samples=Samples(), peak_bytes=peak)
                case "anchor":
                    return facts.Anchored(samples=Samples(samples_ns=(1_000_000,), block_sizes=(1,)), flops=1e9, how="made up")
                case "profile":
                    assert is_gpu, "a CPU's time is its own"
                    return facts.Profiled(waterfall=found.fall(), roofline=(), modules=(), coverage=None, attributed=None)
            raise AssertionError(f"{verb} was not expected")

    monkeypatch.setattr(isolate, "Child", Child)
    monkeypatch.setattr(machines, "survey", survey)
    monkeypatch.setattr(seats, "SETTLE_S", 0.0)
    yield found


def asked(tools: Any, models: Models, *batches: int, devices: tuple[str, ...] = ("cpu", "cuda"), **fields: Any) -> Any:
    found = []
    for batch in batches or (None,):
        dims = {} if batch is None else {"N": batch}
        found += [replace(tools.candidate(models("net"), **dims), device=device) for device in devices]
    bench = replace(tools.QUICK, verify="off", block_ms=2.0, min_iterations=2)
    return tools.job("bench", *found, **{"bench": bench, **fields})


def test_the_batch_from_which_the_gpu_wins_is_found_with_its_cause_and_its_memory(lab: Lab, tools: Any, models: Models) -> None:
    watcher = tools.Watcher()
    report = jobs.bench(asked(tools, models, 1, 2, 4, 8), watcher)
    assert [device.id for device in report.devices] == ["cpu", "cuda:0"] and report.device == report.devices[0]
    assert [(run.batch, run.device) for run in report.runs] == [(n, d) for n in (1, 2, 4, 8) for d in ("cpu", "cuda:0")]
    assert all(run.relative is None for run in report.runs), "one device is never the base of another"
    assert report.sweep is not None
    (found,) = report.sweep.crossovers
    assert (found.first, found.second, found.verdict, found.winner) == ("cpu", "cuda:0", "crosses", "cuda:0")
    assert found.between == (4, 8) and found.from_batch in (5, 6) and found.interpolated
    assert found.points[0].ratio == pytest.approx(1 / 5.05, rel=1e-3)
    assert found.cause is not None
    assert (found.cause.kind, found.cause.device, found.cause.batch) == ("launches", "cuda:0", 1)
    gpu = next(curve for curve in report.sweep.curves if curve.device == "cuda:0")
    assert gpu.memory is not None and gpu.memory.bytes_per_sample == pytest.approx(EACH)
    assert gpu.memory.largest_batch == 18 and gpu.memory.probed_batch == 16 and gpu.memory.probed_bytes == WEIGHTS + 16 * EACH
    assert "checked" in gpu.memory.note
    assert [device.id for device in watcher.reports[0].devices] == ["cpu", "cuda:0"], "what is shown on the way knows its devices too"
    assert codec.from_json(Report, codec.to_json(report)) == report
    assert gates.exit_code(report) == 0


def test_blocks_of_the_two_devices_take_turns(lab: Lab, tools: Any, models: Models) -> None:
    jobs.bench(asked(tools, models, 4))
    assert sorted(lab.blocks) == ["cpu"] * 6 + ["cuda:0"] * 6
    for number in range(6):
        assert set(lab.blocks[2 * number : 2 * number + 2]) == {"cpu", "cuda:0"}


def test_every_figure_stands_against_its_own_devices_ceilings(
    lab: Lab, tools: Any, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = replace(null.CEILINGS, rows=tuple(replace(row, value=row.value / 1e4) for row in null.CEILINGS.rows))
    plain = lab.device
    monkeypatch.setattr(lab, "device", lambda name: replace(plain(name), ceilings=slow) if name == "cpu" else plain(name))
    lab.gpu_ms = lab.cpu_ms = lambda batch: 3.0
    report = jobs.bench(asked(tools, models, 4))
    cpu, gpu = report.runs
    assert cpu.pct_of_measured is not None and gpu.pct_of_measured is not None
    assert cpu.pct_of_measured == pytest.approx(1e4 * gpu.pct_of_measured, rel=1e-3)
    assert report.device_of(gpu) == report.devices[1]


def test_without_batches_they_double_until_time_or_memory_ends_each_curve(lab: Lab, tools: Any, models: Models) -> None:
    lab.cpu_ms = lambda batch: 1.1 + 0.5 * batch
    job = asked(tools, models)
    report = jobs.bench(replace(job, bench=replace(job.bench, max_time_s=0.2)))  # twenty calls of 10 ms
    assert report.sweep is not None
    cpu, gpu = report.sweep.curves
    assert [p.batch for p in cpu.points] == [1, 2, 4, 8] and "would take about 0.01 s" in cpu.stopped
    assert [p.batch for p in gpu.points] == [1] and "--max-time" in gpu.stopped


def test_memory_ends_a_curve_before_it_is_full(lab: Lab, tools: Any, models: Models) -> None:
    lab.gpu_ms = lambda batch: 1.0
    lab.free = WEIGHTS + 5 * EACH
    job = asked(tools, models)
    report = jobs.bench(replace(job, bench=replace(job.bench, max_time_s=0.2)))
    assert report.sweep is not None
    gpu = report.sweep.curves[1]
    assert [p.batch for p in gpu.points] == [1, 2] and "GiB that are free" in gpu.stopped
    assert all(run.status is Status.OK for run in report.runs)


def test_out_of_memory_is_a_row_and_larger_batches_are_not_tried_again(lab: Lab, tools: Any, models: Models) -> None:
    lab.holds, lab.free = 4, 10**12
    report = jobs.bench(asked(tools, models, 2, 4, 8, 16))
    gpu = {run.batch: run for run in report.runs if run.device == "cuda:0"}
    assert [gpu[n].status for n in (2, 4, 8, 16)] == [Status.OK, Status.OK, Status.OOM_DEVICE, Status.SKIPPED]
    assert "batch 8 was out of memory" in gpu[16].reason
    assert all(run.status is Status.OK for run in report.runs if run.device == "cpu")
    assert report.sweep is not None and "out of memory" in report.sweep.curves[1].stopped
    memory = report.sweep.curves[1].memory
    assert memory is not None and memory.probed_batch is None


def test_a_machine_is_never_driven_out_of_memory(lab: Lab, tools: Any, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = lab.device
    monkeypatch.setattr(lab, "device", lambda name: replace(plain(name), free_bytes=WEIGHTS) if name == "cpu" else plain(name))
    lab.cpu_ms = lab.gpu_ms = lambda batch: 1.0
    lab.cpu_peak = lambda batch: WEIGHTS // 4 * batch
    report = jobs.bench(asked(tools, models, 1, 2, 1024))
    assert report.sweep is not None
    last = [run for run in report.runs if run.device == "cpu"][-1]
    assert last.status is Status.SKIPPED and "would take about 238 GiB of the 0.838 GiB that are free" in last.reason
    assert [child.batch for child in lab.children if child.device == "cpu"] == [1, 2]
    assert report.sweep.curves[0].memory is not None and "not checked" in report.sweep.curves[0].memory.note


def test_a_probe_that_does_not_fit_is_told_and_ends_nothing(lab: Lab, tools: Any, models: Models) -> None:
    lab.holds = 10
    report = jobs.bench(asked(tools, models, 1, 2, 4))
    assert report.sweep is not None
    memory = report.sweep.curves[1].memory
    assert memory is not None and memory.probed_batch == 16 and memory.probed_bytes is None and "failed: oom device" in memory.note


def test_two_names_of_one_device_are_one_device(lab: Lab, tools: Any, models: Models) -> None:
    report = jobs.bench(asked(tools, models, 2, devices=("cuda", "cuda:0")))
    assert report.devices == () and report.sweep is None and len(report.runs) == 1
    assert report.runs[0].device == "cuda:0"


def test_three_devices_are_each_compared_with_the_first(lab: Lab, tools: Any, models: Models) -> None:
    report = jobs.bench(asked(tools, models, 2, devices=("cpu", "cuda:0", "cuda:1")))
    assert report.sweep is not None
    assert [(row.first, row.second) for row in report.sweep.crossovers] == [("cpu", "cuda:0"), ("cpu", "cuda:1")]


def test_a_device_that_is_not_here_ends_the_command_before_anything_is_measured(lab: Lab, tools: Any, models: Models) -> None:
    with pytest.raises(Unavailable):
        jobs.bench(asked(tools, models, 2, devices=("cpu", "cuda:9")))
    assert lab.blocks == []


def test_gates_name_the_device_they_judge(lab: Lab, tools: Any, models: Models) -> None:
    report = jobs.bench(asked(tools, models, 8, gates=Gates(max_latency_ms=6.5)))
    assert [(gate.run.rpartition(" on ")[2], gate.passed) for gate in report.gates] == [("cpu", False), ("cuda:0", True)]


def test_a_precision_that_a_device_has_not_is_a_row(lab: Lab, tools: Any, models: Models) -> None:
    job = asked(tools, models, 2)
    both = [replace(c, precision=p) for c in job.candidates for p in (Precision.FP32, Precision.TF32)]
    report = jobs.bench(replace(job, candidates=tuple(both)))
    assert report.sweep is not None
    rows = {row.what: row for row in report.sweep.crossovers}
    assert "eager fp32" in rows
    failed = [run for run in report.runs if run.status is not Status.OK]
    assert failed and all(run.status is Status.UNSUPPORTED and run.precision == "tf32" for run in failed)


def test_the_null_device_is_a_row_beside_the_cpu(local: Any, tools: Any, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def survey(job: Any, progress: Any, **_: Any) -> facts.Survey:
        name = job.candidates[0].device if job.candidates else job.device
        return replace(tools.fake_survey(), device=null.DEVICE) if name == "null" else tools.fake_survey()

    monkeypatch.setattr(machines, "survey", survey)
    report = jobs.bench(asked(tools, models, 1, 2, devices=("cpu", "null")))
    assert [run.status for run in report.runs] == [Status.OK, Status.UNSUPPORTED] * 2
    assert report.sweep is not None and report.sweep.crossovers == ()


def test_columns_keep_batches_apart_and_devices_together(tools: Any, models: Models) -> None:
    job = asked(tools, models, 8, 1)
    (column,) = sweep.columns(job.candidates)
    assert column.batches == (1, 8) and [c.device for c in column.candidates] == ["cpu", "cuda"]
    host = [replace(c, input_mode="host") for c in job.candidates]
    assert len(sweep.columns([*job.candidates, *host])) == 2
