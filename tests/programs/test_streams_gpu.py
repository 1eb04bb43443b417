"""A batch in parts on a real GPU: the answers of a plain graph, side by side, in one pool of memory, from a bundle too; and attention with a mask in FlexAttention."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from gpuopt.backends import cudagraphs, inductor
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import TensorSpec

pytestmark = pytest.mark.gpu
DEVICE = "cuda:0"
BACKENDS = {"cudagraphs": (cudagraphs, {}), "inductor": (inductor, {"preset": "graphed"})}


class Net(torch.nn.Module):
    """Convolution, batch norm, attention and a chain of products, none of which fills a GPU at these batches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 64, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(64)
        self.qkv = torch.nn.Linear(64, 192)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(16))

    def forward(self, x: torch.Tensor) -> Any:
        h = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(h).view(*h.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
        for layer in self.layers:
            h = h + torch.relu(layer(h))
        return {"y": h.mean(1), "all": h}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return Net().eval().to(DEVICE, torch.float16)


def given(batch: int = 4) -> Inputs:
    torch.manual_seed(batch)
    x = torch.randn(batch, 8, 16, 16, device=DEVICE, dtype=torch.float16)
    return Inputs(args=(x,), specs=(TensorSpec.parse("x:float16[N,8,16,16]"),), dims={"N": batch})


def build(name: str, module: torch.nn.Module, inputs: Inputs, **more: Any) -> Any:
    backend, options = BACKENDS[name]
    return backend.build(Model(form="module", name="net", module=module), inputs, {"precision": "fp16", **options, **more})


def off(found: Any, wanted: Any) -> dict[str, float]:
    return {key: float((found[key].double() - wanted[key]).norm() / wanted[key].norm()) for key in wanted}


def exact(module: torch.nn.Module, *args: torch.Tensor) -> Any:
    with torch.no_grad():
        return copy.deepcopy(module).double()(*(t.double() if t.is_floating_point() else t for t in args))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", BACKENDS)
def test_parts_are_as_right_as_a_plain_graph_for_any_input_and_in_order(name: str, count: int) -> None:
    module, inputs = net(), given()
    plain, parted = build(name, module, inputs), build(name, module, inputs, streams=count)
    for scale in (1.0, 0.5, -2.0):
        x = inputs.args[0] * scale
        wanted = exact(module, x)
        ours, others = off(parted(x), wanted), off(plain(x), wanted)
        assert max(ours.values()) < max(1e-2, 2 * max(others.values())), (ours, others)
    audit = parted.audit()
    assert audit is not None and audit.honoured
    parted.close()
    parted.close()


@pytest.mark.parametrize("name", BACKENDS)
def test_thousands_of_replays_back_to_back_never_differ(name: str) -> None:
    """A missing wait, or memory given to two branches, shows under load and not in one call."""
    module = net()
    parted = build(name, module, given(8), streams=4)
    batches = [given(8).args[0] * n for n in range(1, 5)]
    alone = []
    for x in batches:
        alone.append(parted(x)["all"])
        torch.cuda.synchronize()
    differing = torch.zeros((), device=DEVICE, dtype=torch.int64)
    for index in range(2000):
        which = index % len(batches)
        differing += (parted(batches[which])["all"] != alone[which]).any()
    assert int(differing) == 0


def test_the_branches_run_on_streams_of_their_own_at_the_same_time() -> None:
    parted = build("cudagraphs", net(), given(8), streams=2)
    x = given(8).args[0]
    parted(x)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(20):
            parted(x)
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end) for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    overlapping = sum(start < end for (_, end), (start, _) in itertools.pairwise(spans))
    assert overlapping > 20, f"{overlapping} of {len(spans)} kernels began while the one before them ran"


def test_the_pool_of_a_graph_holds_what_all_branches_allocate() -> None:
    """Nothing of a branch comes from the common pool: what it left there would be handed to others while a replay writes into it."""
    module, inputs = net(), given(8)
    parted = build("cudagraphs", module, inputs, streams=4)
    wanted = parted(*inputs.args)["all"].clone()
    torch.cuda.synchronize()
    filler = []
    for stream in [torch.cuda.current_stream(), *parted._graphs._call._sides]:
        with torch.cuda.stream(stream):
            filler += [torch.full((2**shift,), torch.nan, device=DEVICE) for shift in range(8, 22) for _ in range(8)]
    torch.cuda.synchronize()
    assert torch.equal(parted(*inputs.args)["all"], wanted)
    torch.cuda.synchronize()
    assert all(bool(t.isnan().all()) for t in filler), "a replay wrote into memory that is somebody else's"
    held = torch.cuda.memory_reserved()
    parted.close()
    del filler
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held


@pytest.mark.parametrize("name", BACKENDS)
def test_a_bundle_comes_apart_in_the_same_way(name: str, tmp_path: Path) -> None:
    module, inputs = net(), given()
    first = build(name, module, inputs, streams=2)
    files = first.save(tmp_path)
    backend, options = BACKENDS[name]
    again = backend.load(tmp_path, files, {"signed_by_us": True, "precision": "fp16", "streams": 2, **options}, DEVICE)
    assert max(off(again(*inputs.args), exact(module, *inputs.args)).values()) < 1e-2


@pytest.mark.parametrize("name", BACKENDS)
def test_a_batch_that_depends_on_itself_is_refused(name: str) -> None:
    class Centred(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((0, 1, 2, 3))

    with pytest.raises(Unsupported, match="not one sample after the other"):
        build(name, Centred(), given(), streams=2)


# -- FlexAttention ----------------------------------------------------------------------------------------------------------------


class Masked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(512, 1536)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 8, 64).permute(2, 0, 3, 1, 4)
        for _ in range(2):
            q = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :, :, : x.shape[1]])
        return {"y": q.transpose(1, 2).reshape(x.shape)}


LENGTH = 700


def _window() -> torch.Tensor:
    at = torch.arange(LENGTH, device=DEVICE)
    return ((at[:, None] - at).abs() < 64)[None, None]


MASKS = {
    "window": (_window, "bool[1,1,700,700]"),
    "padding": (lambda: (torch.arange(LENGTH, device=DEVICE) < torch.tensor([[90], [700]], device=DEVICE))[:, None, None, :], "bool[N,1,1,700]"),
    "bias": (lambda: torch.randn(1, 8, LENGTH, LENGTH, device=DEVICE), "[1,8,700,700]"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", MASKS)
def test_flex_attention_is_right_and_runs_in_its_own_kernel(kind: str, dtype: str) -> None:
    """fp32 without TF32 is what the structure stage of a verification builds."""
    torch.manual_seed(0)
    make, spec = MASKS[kind]
    module = Masked().eval().to(DEVICE, getattr(torch, dtype))
    mask = make()
    if mask.is_floating_point():
        mask, spec = mask.to(getattr(torch, dtype)), f"{dtype}{spec}"
    x = torch.randn(2, LENGTH, 512, device=DEVICE, dtype=getattr(torch, dtype))
    inputs = Inputs(args=(x, mask), specs=(TensorSpec.parse(f"x:{dtype}[N,700,512]"), TensorSpec.parse(f"mask:{spec}")), dims={"N": 2})
    precision = {"float16": "fp16", "float32": "fp32"}[dtype]
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        runner = inductor.build(
            Model(form="module", name="m", module=module), inputs, {"precision": precision, "preset": "graphed", "flex": True}
        )
        found = off(runner(x, mask), exact(module, x, mask))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
    assert found["y"] < {"float16": 5e-3, "float32": 2e-5}[dtype], found
    audit = runner.audit()
    assert audit is not None and audit.honoured, audit
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        runner(x, mask)
        torch.cuda.synchronize()
    names = sorted({event.name for event in seen.events()})
    assert any("flex_attention" in name or name.startswith("triton_tem") for name in names), names
    assert not any("fmha" in name or "flash" in name for name in names), names
