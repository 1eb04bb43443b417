"""The operators on a GPU: against fp64, by the kernels they are there for, in every dtype a candidate or its fp32 twin may have."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from gpuopt.programs.ops import attend_one, conv, gated_matvec, linear_gelu, matvec

pytestmark = pytest.mark.gpu

SIZES = {
    "3x3": (64, 64, 3, 1, 1),
    "3x3 strided": (64, 128, 3, 2, 1),
    "1x1": (64, 256, 1, 1, 0),
    "7x7 of 3 channels": (3, 64, 7, 2, 3),
    "odd": (20, 36, 3, 1, 1),
}
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def exact_fp32():
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def ops_of(call):
    """Names of the ATen ops a call ran."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("benchmark", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_convolutions(size, dtype, residual, benchmark):
    in_channels, out_channels, kernel, stride, pad = SIZES[size]
    x = torch.randn(8, in_channels, 28, 28, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    w = (torch.randn(out_channels, in_channels, kernel, kernel, device="cuda") / (in_channels * kernel**2) ** 0.5).to(dtype)
    w, b = w.contiguous(memory_format=torch.channels_last), torch.randn(out_channels, device="cuda").to(dtype)
    ref = F.conv2d(x.double(), w.double(), b.double(), stride, pad)
    z = torch.randn(ref.shape, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last) if residual else None
    ref = (ref if z is None else ref + z.double()).relu()
    call = lambda: conv.conv_relu(x, w, b, z, [stride] * 2, [pad] * 2, [1, 1])  # noqa: E731
    with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=False):
        out = call()
        assert ("aten::cudnn_convolution_add_relu" if residual else "aten::cudnn_convolution_relu") in ops_of(call)
    assert ((out - ref).norm() / ref.norm()) < LIMITS[dtype]
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("batch", [(512,), (4, 128), (1,)])
def test_linear_layers(dtype, batch):
    x, w, b = (torch.randn(*s, device="cuda").to(dtype) for s in ((*batch, 256), (1024, 256), (1024,)))
    ref = F.gelu(F.linear(x.double(), w.double(), b.double()), approximate="tanh")
    out = linear_gelu.linear_gelu(x, w, b)
    assert ((out - ref).norm() / ref.norm()) < LIMITS[dtype]
    assert out.shape == ref.shape


@pytest.fixture
def forgetful():
    """A compiler without a past. Every nn.Sequential that a process compiles is an entry of one code object (`inner`, in torch/_dynamo/external_utils.py): after eight of
    them, whoever made them, `fullgraph=True` raises FailOnRecompileLimitHit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiler_takes_them_whole(mode, forgetful):
    """The first call of `reduce-overhead` warms up, the second records, later ones replay: which of them is off says what is wrong."""
    from gpuopt.converters.rewrites import fuse_conv, gelu_epilogue
    from gpuopt.programs.breaks import Heard

    channels, wide = 32, torch.nn.GELU("tanh")
    module = torch.nn.Sequential(
        torch.nn.Conv2d(8, channels, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(channels, 64),
        wide,
    ).eval()
    x = torch.randn(4, 8, 16, 16)
    with torch.no_grad():
        ref = module.double()(x.double())
    fuse_conv.apply(module, None, None)
    gelu_epilogue.apply(module, "tanh", None)
    module = module.to("cuda", torch.float16).to(memory_format=torch.channels_last)
    given = x.to("cuda", torch.float16).contiguous(memory_format=torch.channels_last)

    def error(out):
        return float((out.cpu() - ref).norm() / ref.norm())

    run, heard, calls = torch.compile(module, fullgraph=True, mode=mode), Heard(), {}
    with torch.no_grad(), heard.listening():
        calls["eager"] = error(module(given))
        for name in ("first", "second", "third", "fourth"):
            torch.compiler.cudagraph_mark_step_begin()
            calls[name] = error(run(given))
    told = {"calls": calls, "recompiled": heard.recompiles, "graph breaks": dict(heard.breaks), "no CUDA graph": heard.skips}
    assert max(calls.values()) < 5e-3, told
    assert not heard.breaks and not heard.recompiles, told
    if mode == "reduce-overhead":
        assert not heard.num_skipped and not heard.skips, told
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            ran = ops_of(lambda: run(given))
        assert {"gpuopt::conv_relu", "gpuopt::linear_gelu"}.isdisjoint(ran), ("a replay dispatches no op", ran, told)


def one_kernel(call, name):
    """A call is one kernel, of ours."""
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([found for found in names if name in found]) == 1 == len([n for n in names if "memcpy" not in n.lower()]), names


def replays_give_the_same(chain, start):
    """In a CUDA graph, where each kernel begins as early as it may, after replays with another input."""
    wanted = chain(start)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain(start)
    torch.cuda.synchronize()
    graph, given = torch.cuda.CUDAGraph(), start.clone()
    with torch.cuda.graph(graph, stream=stream):
        out = chain(given)
    for number in range(60):
        given.copy_(start if number % 2 else start.flip(-1))
        graph.replay()
        if number % 2:
            assert torch.equal(out, wanted), number


WIDTHS = [64, 1000, 4096, 5000, 8192, 14336]


@pytest.mark.parametrize("dtype", matvec.HALVES, ids=str)
@pytest.mark.parametrize("heights", [(1,), (129,), (4096, 1024, 1024), (7, 2048)], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_products_of_one_row(width, heights, dtype):
    row = torch.randn(1, 1, width, device="cuda").to(dtype)
    weights = [torch.randn(height, width, device="cuda").to(dtype) for height in heights]
    assert all(matvec.takes(row, weight) for weight in weights)
    for out, weight in zip(matvec.matvecs(row, weights), weights, strict=True):
        ref = row.double() @ weight.double().T
        assert out.shape == ref.shape and ((out - ref).norm() / ref.norm()) < LIMITS[dtype]


def test_they_run_in_one_kernel_of_ours():
    row = torch.randn(1, 4096, device="cuda").half()
    weights = [torch.randn(height, 4096, device="cuda").half() for height in (4096, 1024, 1024)]
    call = lambda: matvec.matvecs(row, weights)  # noqa: E731
    one_kernel(call, "_matvecs")


@pytest.mark.parametrize("case", ["two rows", "fp32", "ragged", "unaligned", "transposed", "with gaps"])
def test_what_the_kernel_does_not_take_is_computed_all_the_same(case):
    row, weight = torch.randn(1, 4096, device="cuda").half(), torch.randn(512, 4096, device="cuda").half()
    if case == "two rows":
        row = torch.randn(2, 4096, device="cuda").half()
    elif case == "fp32":
        row, weight = row.float(), weight.float()
    elif case == "ragged":
        row, weight = row[:, :4095].contiguous(), weight[:, :4095].contiguous()
    elif case == "with gaps":
        row = torch.randn(1, 8192, device="cuda").half()[:, ::2]
    elif case == "unaligned":
        weight = torch.randn(512 * 4096 + 1, device="cuda").half()[1:].view(512, 4096)
    else:
        weight = torch.randn(4096, 512, device="cuda").half().T
    (out,) = matvec.matvecs(row, [weight])
    ref = row.double() @ weight.double().T
    assert ((out - ref).norm() / ref.norm()) < 1e-3


def test_a_chain_of_them_in_a_graph_reads_what_the_one_before_wrote():
    """Each begins while the one before it ends: one that read its input too early would be found here."""
    torch.manual_seed(1)
    weights = [(torch.randn(4096, 4096, device="cuda") / 64).bfloat16() for _ in range(4)]
    start = torch.randn(1, 4096, device="cuda").bfloat16()

    def chain(row):
        for number in range(40):
            (row,) = matvec.matvecs(row, [weights[number % 4]])
            row = row / row.float().norm().to(row.dtype) * 64 if number % 5 == 4 else row
        return row

    replays_give_the_same(chain, start)


@pytest.mark.parametrize("dtype", attend_one.HALVES, ids=str)
@pytest.mark.parametrize("kind", ["none", "seen", "added", "behind the end"])
@pytest.mark.parametrize("length", [1, 128, 257, 1024])
@pytest.mark.parametrize("sizes", [(1, 32, 8, 128), (3, 6, 6, 80), (2, 4, 1, 256)], ids=str)
def test_attention_of_one_query(sizes, length, kind, dtype):
    batch, heads, held, width = sizes
    query = torch.randn(batch, heads, 1, width, device="cuda").to(dtype)
    key, value = (torch.randn(batch, held, length + 3, width, device="cuda").to(dtype)[:, :, :length] for _ in range(2))
    seen = torch.rand(batch, 1, 1, length, device="cuda") < 0.5
    seen[..., 0] = True
    mask = {"none": None, "seen": seen, "added": torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, float("-inf"))}.get(kind)
    if kind == "behind the end":
        mask = (torch.arange(length, device="cuda") <= length // 3)[None, None, None]
    assert attend_one.takes(query, key, value, mask)
    out = attend_one.attend_one(query, key, value, mask, width**-0.5)
    spread = [t.double().repeat_interleave(heads // held, 1) for t in (key, value)]
    whole = mask if mask is None or mask.dtype == torch.bool else mask.double()
    ref = F.scaled_dot_product_attention(query.double(), *spread, attn_mask=whole).transpose(1, 2)
    assert out.shape == ref.shape and ((out - ref).norm() / ref.norm()) < LIMITS[dtype]


def test_it_runs_in_one_kernel_of_ours():
    query, key, value = (torch.randn(1, heads, length, 128, device="cuda").half() for heads, length in ((32, 1), (8, 256), (8, 256)))
    call = lambda: attend_one.attend_one(query, key, value, None, 0.1)  # noqa: E731
    one_kernel(call, "_attend_one")


@pytest.mark.parametrize("act", gated_matvec.ACTS)
@pytest.mark.parametrize("dtype", matvec.HALVES, ids=str)
@pytest.mark.parametrize("height", [1, 7, 129, 14336])
@pytest.mark.parametrize("width", [64, 1000, 4096, 5000, 8192])
def test_gated_products_round_where_the_unfused_operators_do(width, height, dtype, act):
    row = torch.randn(1, 1, width, device="cuda").to(dtype)
    gate, up = ((torch.randn(height, width, device="cuda") / width**0.5).to(dtype) for _ in range(2))
    out = gated_matvec.gated_matvec(row, gate, up, act).double()
    gates, ups = row.double() @ gate.double().T, row.double() @ up.double().T
    ref = gated_matvec.ACTS[act](gates) * ups
    # Of the products and not of the result: an activation's tail is as far off as the half it was given.
    assert out.shape == ref.shape and ((out - ref).norm() / (gates * ups).norm()) < 2 * LIMITS[dtype]
    stepwise = (gated_matvec.ACTS[act](gates.to(dtype)) * ups.to(dtype)).double()
    ulp = torch.finfo(dtype).eps * stepwise.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    assert ((out - stepwise).abs() <= ulp).double().mean() > (0.98 if height > 100 else 0.8)


def test_a_gated_pair_runs_in_one_kernel_of_ours():
    row, gate, up = (torch.randn(height, 4096, device="cuda").half() for height in (1, 14336, 14336))
    call = lambda: gated_matvec.gated_matvec(row, gate, up, "silu")  # noqa: E731
    one_kernel(call, "_matvecs_gated")


@pytest.mark.parametrize("case", ["two rows", "fp32", "ragged", "unaligned", "transposed", "with gaps"])
def test_a_gated_pair_that_the_kernel_does_not_take_is_computed_all_the_same(case):
    row, gate, up = (torch.randn(height, 1024, device="cuda").half() / 8 for height in (1, 512, 512))
    if case == "two rows":
        row = torch.cat([row, row * 2])
    elif case == "fp32":
        row, gate, up = row.float(), gate.float(), up.float()
    elif case == "ragged":
        row, gate, up = (t[:, :1023].contiguous() for t in (row, gate, up))
    elif case == "with gaps":
        row = row.repeat(1, 2)[:, ::2]
    elif case == "unaligned":
        up = torch.cat([up.new_zeros(1), up.flatten()])[1:].view(512, 1024)
    else:
        up = up.T.contiguous().T
    out = gated_matvec.gated_matvec(row, gate, up, "silu")
    ref = F.silu(row.double() @ gate.double().T) * (row.double() @ up.double().T)
    assert ((out - ref).norm() / ref.norm()) < 2e-3


def test_a_chain_of_gated_pairs_in_a_graph_reads_what_the_one_before_wrote():
    """Each begins while the one before it ends: one that read its input too early would be found here."""
    weights = [(torch.randn(2, 4096, 4096, device="cuda") / 64).bfloat16() for _ in range(4)]
    start = torch.randn(1, 4096, device="cuda").bfloat16()

    def chain(row):
        for number in range(20):
            row = gated_matvec.gated_matvec(row, *weights[number % 4], "silu")
            (row,) = matvec.matvecs(row, [weights[number % 3][0]])
            row = row / row.float().norm().to(row.dtype) * 64
        return row

    replays_give_the_same(chain, start)
