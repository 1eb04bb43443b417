"""The real profiler on a CPU, end to end: count, trace, attribute, waterfall, roofline."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch

from gpuopt.core.errors import Unavailable
from gpuopt.core.live import Inputs
from gpuopt.core.result import Ceiling, Ceilings
from gpuopt.core.trace import Kernel, Step, Trace
from gpuopt.profiling import attribute, roofline, trace, waterfall
from gpuopt.profiling.count import count


@pytest.fixture(scope="module")
def model():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=100)).eval()


def generous():
    """Ceilings no CPU reaches: this test is about the sums, not about this machine."""
    rows = [
        Ceiling(quantity="fp32", value=1e15, unit="FLOP/s", kind="measured", source="made up"),
        Ceiling(quantity="memory", value=1e15, unit="byte/s", kind="measured", source="made up"),
    ]
    return Ceilings(rows=tuple(rows))


def test_a_tiny_bert_is_profiled_end_to_end_on_a_cpu(model):
    ids = torch.randint(0, 100, (2, 16))
    calls = []

    @torch.inference_mode()
    def call():
        calls.append(1)
        return model(ids)

    for _ in range(3):
        call()
    start = time.perf_counter()
    for _ in range(5):
        call()
    wall_ms = (time.perf_counter() - start) * 1e3 / 5
    calls.clear()
    traced = trace.record(call, "cpu", steps=3, warmup=1, with_modules=model)
    assert len(calls) == 1 + 1 + 3
    assert len(traced.steps) == 3
    assert not traced.on_device
    counted = count(model, Inputs(args=(ids,)))
    records = attribute.attribute(traced, counted)
    assert attribute.coverage(records) == 1.0
    points = roofline.points(records, generous(), cache_bytes=32 << 20)
    assert len(points) == len(records)
    assert all(p.pct_of_ceiling is not None and p.pct_of_ceiling <= 100 for p in points if p.flops)
    found = waterfall.build(traced, wall_ms, generous(), records)
    assert math.isclose(math.fsum(p.ms for p in found.parts), wall_ms, rel_tol=1e-9)
    whole = roofline.whole(counted, wall_ms / 1e3, generous())
    assert whole.tflops == pytest.approx(counted.flops / wall_ms / 1e9)


def test_a_trace_without_modules_still_knows_its_ops_but_not_whose_they_are(model):
    ids = torch.randint(0, 100, (2, 16))
    with torch.inference_mode():
        traced = trace.record(lambda: model(ids), "cpu", steps=1, warmup=0)
    assert traced.modules == ()
    records = attribute.attribute(traced, count(model, Inputs(args=(ids,))))
    assert {r.module for r in records} == {"?"}
    assert attribute.coverage(records) > 0.9
    assert sum(r.flops or 0 for r in records) == pytest.approx(count(model, Inputs(args=(ids,))).flops)


def test_module_ranges_hold_qualified_names_and_classes(model):
    ids = torch.randint(0, 100, (2, 16))
    with torch.inference_mode():
        traced = trace.record(lambda: model(ids), "cpu", steps=1, warmup=0, with_modules=model)
    names = {(m.name, m.module_class) for m in traced.modules}
    assert ("encoder.layer.1.attention.self.query", "Linear") in names
    assert ("", "BertModel") in names
    assert all(op.module is not None for op in traced.ops if op.step is not None and op.name == "aten::addmm")


def both(model, call):
    light = trace._run(call, "cpu", steps=2, warmup=1, with_modules=None, with_shapes=False)
    full = trace._run(call, "cpu", steps=2, warmup=1, with_modules=model, with_shapes=True)
    return light, full


def test_a_light_run_takes_over_the_modules_and_shapes_of_a_full_one_and_keeps_its_own_times(model):
    ids = torch.randint(0, 100, (2, 16))
    with torch.inference_mode():
        light, full = both(model, lambda: model(ids))
    assert not any(op.module for op in light.ops) and not any(op.shapes for op in light.ops)
    found = trace.grafted(light, full)
    assert [(op.name, op.start_ns, op.dur_ns, op.self_ns) for op in found.ops] == [
        (op.name, op.start_ns, op.dur_ns, op.self_ns) for op in light.ops
    ]
    assert found.steps == light.steps and found.notes == light.notes
    by_step = lambda t: [(op.name, op.module, op.shapes) for op in t.ops if op.step is not None]  # noqa: E731
    assert by_step(found) == by_step(full)
    query = [op for op in found.ops if op.module == "encoder.layer.1.attention.self.query" and op.name == "aten::addmm"]
    assert len(query) == 2 and query[0].shapes[1] == (32, 64)


def test_runs_that_dispatch_other_ops_are_not_joined(model):
    ids = torch.randint(0, 100, (2, 16))
    calls = []

    def call():
        calls.append(1)
        out = model(ids).last_hidden_state
        return out.relu() if len(calls) > 4 else out.tanh()  # the full run meets another op

    with torch.inference_mode():
        light, full = both(model, call)
    found = trace.grafted(light, full)
    assert found.ops == full.ops and "did not dispatch the same ops" in found.notes[-1]


def test_a_light_run_that_saw_no_kernel_is_refused_like_a_full_one(monkeypatch):
    """Its ops would else stand as the work of a machine without a device."""
    kernel = Kernel(name="k", start_ns=0, dur_ns=1, stream=7, correlation=1, op=None, step=0)
    full = Trace(device="cuda:0", steps=(Step(start_ns=0, dur_ns=9),), kernels=(kernel,))
    runs = iter([replace(full, kernels=()), full])
    monkeypatch.setattr(trace, "_run", lambda *_, **__: next(runs))
    with pytest.raises(Unavailable, match="no kernel"):
        trace.record(lambda: None, "cuda:0", with_modules=torch.nn.Identity())
