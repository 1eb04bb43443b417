"""What only a GPU shows: kernels joined to ops, little unaccounted, graphs as rows of their own. Ceilings are measured here, on the card."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpuopt.core.live import Inputs
from gpuopt.core.result import Ceiling, Ceilings
from gpuopt.profiling import attribute, memory, roofline, trace, waterfall
from gpuopt.profiling.count import count

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def event_ms(call, repeats=20):
    """Wall time of one call in a back-to-back loop, by events around the loop, after warm-up."""
    for _ in range(10):
        call()
    found = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / repeats)
    return statistics.median(found)


@pytest.fixture(scope="module")
def ceilings():
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    peak = 2 * 8192**3 / (event_ms(lambda: a @ b) * 1e-3)
    source, target = (torch.empty(1 << 30, device="cuda", dtype=torch.uint8) for _ in range(2))
    copied = 2 * source.numel() / (event_ms(lambda: target.copy_(source)) * 1e-3)
    rows = [
        Ceiling(quantity="fp16", value=peak, unit="FLOP/s", kind="measured", source="GEMM"),
        Ceiling(quantity="memory", value=copied, unit="byte/s", kind="measured", source="copy"),
    ]
    return Ceilings(rows=tuple(rows))


@pytest.fixture(scope="module")
def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=1024, num_hidden_layers=6, num_attention_heads=16, intermediate_size=4096)
    return BertModel(config, add_pooling_layer=False).eval().half().cuda()


def ids(batch, length):
    return torch.randint(0, 30000, (batch, length), device="cuda")


def inference(function):
    @torch.inference_mode()
    def call():
        return function()

    return call


def cache_bytes():
    return torch.cuda.get_device_properties(0).L2_cache_size


@pytest.mark.parametrize("batch, length", [(32, 512), (1, 128)])
def test_at_most_two_percent_of_the_wall_is_unaccounted(bert, ceilings, batch, length):
    x = ids(batch, length)
    call = inference(lambda: bert(x))
    wall_ms = event_ms(call)
    traced = trace.record(call, "cuda:0", with_modules=bert)
    counted = count(bert, Inputs(args=(x,)))
    records = attribute.attribute(traced, counted)
    found = waterfall.build(traced, wall_ms, ceilings, records)
    print(batch, length, wall_ms, [(p.name, round(p.ms, 3)) for p in found.parts], found.method)
    assert found.unaccounted_ms <= 0.02 * wall_ms
    assert math.isclose(math.fsum(p.ms for p in found.parts), wall_ms, rel_tol=1e-9)
    if batch == 32:
        assert found.ms("tensor-core compute") > 0.5 * wall_ms
        assert found.ms("launch gaps", "python and framework") < 0.05 * wall_ms
    else:
        assert found.ms("launch gaps", "python and framework") > 0.3 * wall_ms
    assert found.ms("other compute") < 0.05 * wall_ms


def test_every_product_of_an_eager_model_finds_its_kernel_and_its_module(bert, ceilings):
    x = ids(8, 256)
    traced = trace.record(inference(lambda: bert(x)), "cuda:0", with_modules=bert)
    counted = count(bert, Inputs(args=(x,)))
    assert "fake" in counted.method
    assert counted.flops == 8 * 256 * 6 * (24 * 1024**2 + 4 * 256 * 1024)
    assert counted.flops_by_dtype.keys() == {"float16"}
    records = attribute.attribute(traced, counted)
    assert attribute.coverage(records) > 0.98, [(r.op, r.module, r.time_ns) for r in records if r.flops is None]
    assert sum(r.flops or 0 for r in records) == pytest.approx(counted.flops)
    assert all(r.module.startswith("encoder.layer") for r in records if r.flops)
    tree = {r.name: r for r in attribute.modules(records, counted)}
    layers = [tree[f"encoder.layer.{i}"].time_ns for i in range(6)]
    assert max(layers) < 2 * min(layers)
    roofline.points(records, ceilings, cache_bytes=cache_bytes())


def test_a_count_on_fake_gpu_tensors_allocates_nothing(bert):
    x = ids(64, 512)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    count(bert, Inputs(args=(x,)))
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_the_count_is_the_same_wherever_the_inputs_live(bert, place):
    x = ids(2, 64).to(place)
    assert count(bert, Inputs(args=(x,))).flops == 2 * 64 * 6 * (24 * 1024**2 + 4 * 64 * 1024)


def test_cudnn_lstm_and_convolutions_join_their_counts(ceilings):
    model = nn.LSTM(64, 128, 2, batch_first=True).eval().half().cuda()
    x = torch.randn(8, 32, 64, device="cuda", dtype=torch.float16)
    counted = count(model, Inputs(args=(x,)))
    assert counted.flops == 2 * 8 * 32 * 4 * 128 * ((64 + 128) + (128 + 128))
    records = attribute.attribute(trace.record(inference(lambda: model(x)), "cuda:0", with_modules=model), counted)
    assert sum(r.flops or 0 for r in records) == pytest.approx(counted.flops)
    conv = (
        nn.Sequential(nn.Conv2d(16, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2))
        .eval()
        .half()
        .cuda()
    )
    conv = conv.to(memory_format=torch.channels_last)
    image = torch.randn(32, 16, 64, 64, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    counted = count(conv, Inputs(args=(image,)))
    records = attribute.attribute(trace.record(inference(lambda: conv(image)), "cuda:0", with_modules=conv), counted)
    assert sum(r.flops or 0 for r in records) == pytest.approx(counted.flops)
    assert attribute.coverage(records) == pytest.approx(1.0)
    assert {r.module for r in records} >= {"0", "3"}


@pytest.mark.parametrize("length", [64, 100])
def test_attention_counts_alike_whichever_kernel_the_gpu_picks(length):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch.randn(2, 4, length, 64, device="cuda", dtype=torch.float16) for _ in range(3))

    class Attend(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(kernel):
            assert count(Attend(), Inputs(args=(q, k, v))).flops == 4 * 2 * 4 * length * length * 64


def test_kernels_in_a_cuda_graph_are_rows_of_their_own(ceilings):
    model = nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024)).eval().half().cuda()
    x = torch.randn(256, 1024, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x)
    wall_ms = event_ms(graph.replay, 200)
    traced = trace.record(graph.replay, "cuda:0")
    assert all(k.graph_id for k in traced.kernels if k.step is not None)
    records = attribute.attribute(traced, count(model, Inputs(args=(x,))))
    assert {r.module for r in records} == {"?"}
    found = waterfall.build(traced, wall_ms, ceilings, records)
    print(wall_ms, [(p.name, round(p.ms, 4)) for p in found.parts], found.method)
    assert found.unaccounted_ms <= 0.05 * wall_ms
    assert found.ms("tensor-core compute") > 0.2 * wall_ms


def test_pageable_inputs_show_as_host_to_device_time(ceilings):
    model = nn.Conv2d(3, 16, 3).eval().half().cuda()
    x = torch.randn(64, 3, 224, 224, dtype=torch.float16)
    call = inference(lambda: model(x.cuda()).float().cpu())
    wall_ms = event_ms(call, 5)
    traced = trace.record(call, "cuda:0", with_modules=model)
    assert {c.memory for c in traced.copies if c.kind == "h2d"} == {"pageable"}
    records = attribute.attribute(traced, count(model, Inputs(args=(x,))))
    found = waterfall.build(traced, wall_ms, ceilings, records)
    print(wall_ms, [(p.name, round(p.ms, 4), p.detail) for p in found.parts], found.method)
    assert found.ms("host-to-device (pinned)") == 0
    assert found.ms("host-to-device (pageable)", "copy calls", "device-to-host") > 0.5 * wall_ms
    assert found.unaccounted_ms <= 0.10 * wall_ms


def test_inductors_library_calls_keep_their_flops():
    model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024), nn.LayerNorm(1024)).eval().half().cuda()
    x = torch.randn(4096, 1024, device="cuda", dtype=torch.float16)
    compiled = torch.compile(model)
    call = inference(lambda: compiled(x))
    call()
    traced = trace.record(call, "cuda:0")
    counted = count(model, Inputs(args=(x,)))
    records = attribute.attribute(traced, counted)
    print([(r.op, r.time_ns, r.flops, r.kernels) for r in records])
    assert attribute.coverage(records) > 0.95
    assert sum(r.flops or 0 for r in records) == pytest.approx(counted.flops)


def test_the_peak_is_the_allocators():
    def call():
        torch.empty(256 << 20, device="cuda", dtype=torch.uint8)

    before = torch.cuda.memory_allocated()
    assert memory.peak(call, "cuda:0") >= before + (256 << 20)
