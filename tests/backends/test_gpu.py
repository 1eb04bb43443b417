"""The backends on a real GPU: presets, recorded graphs, packages, audits, and the cost of safety."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.backends import aoti, cudagraphs, eager, inductor, load_backend
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import TensorSpec

pytestmark = pytest.mark.gpu
DEVICE = "cuda:0"


class Net(torch.nn.Module):
    """A convolution, a normalisation, attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 64, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(64)
        self.qkv = torch.nn.Linear(64, 192)
        self.head = torch.nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> Any:
        h = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        b, s, d = h.shape
        q, k, v = self.qkv(h).view(b, s, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
        h = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, d)
        return {"logits": self.head(h.mean(1)), "hidden": h}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """TF32 off unless a test says otherwise."""
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


def net(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return Net().eval().to(DEVICE, dtype)


def given(dtype: torch.dtype, batch: int = 4) -> Inputs:
    torch.manual_seed(batch)
    return Inputs(
        args=(torch.randn(batch, 8, 16, 16, device=DEVICE, dtype=dtype),),
        specs=(TensorSpec.parse("x:float16[N,8,16,16]"),),
        dims={"N": batch},
    )


def reference(module: torch.nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad():
        return copy.deepcopy(module).double()(*inputs.map(lambda t: t.double()).args)


def close(out: Any, wanted: Any, dtype: torch.dtype) -> None:
    limit = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5}[dtype]
    for name in ("logits", "hidden"):
        error = (out[name].double() - wanted[name]).norm() / wanted[name].norm()
        assert error < limit, (name, float(error))


CASES = [
    ("eager", {}),
    ("inductor", {}),
    ("inductor", {"preset": "reduce-overhead"}),
    ("inductor", {"preset": "freezing"}),
    ("inductor", {"preset": "freezing-reduce-overhead"}),
    ("cudagraphs", {}),
    ("aoti", {}),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{o.get('preset', 'default')}" for n, o in CASES])
def test_every_backend_is_right_and_its_audit_names_the_dtype(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    module, inputs = net(dtype), given(dtype)
    precision = "fp16" if dtype is torch.float16 else "fp32"
    backend = load_backend(name)
    assert backend.available("cuda") is None
    runner = backend.build(Model(form="module", name="net", module=module), inputs, {"precision": precision, **options})
    assert runner.device == DEVICE
    assert not any("skipped" in note for note in runner.notes), runner.notes
    for batch in (inputs, Inputs(args=(torch.randn_like(inputs.args[0]),))):
        close(runner(*batch.args), reference(module, batch), dtype)
    audit = runner.audit()
    assert audit is not None and audit.honoured, audit
    assert audit.shares == {str(dtype).removeprefix("torch."): pytest.approx(1.0)}
    runner.close()
    runner.close()


def attention_share() -> float:
    """Of the FLOPs of `Net` on `given`, the part in attention, which has no TF32 mode; from the layer sizes, the batch cancels."""
    pixels, width = 16 * 16, 64
    convolution = 2 * pixels * width * 8 * 3 * 3
    products = 2 * pixels * width * 3 * width + 2 * width * 16
    attention = 2 * (2 * pixels * pixels * width)  # Q K^T and the product with V, over all heads
    return attention / (convolution + products + attention)


@pytest.mark.parametrize("name", ["eager", "inductor", "cudagraphs", "aoti"])
def test_tf32_shows_in_the_audit(name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    build = load_backend(name).build
    model = Model(form="module", name="net", module=net(torch.float32))
    asked = build(model, given(torch.float32), {"precision": "tf32"}).audit()
    assert asked is not None and asked.honoured, asked
    assert asked.shares == pytest.approx({"tf32": 1 - attention_share(), "float32": attention_share()}, rel=1e-3), asked
    not_asked = build(model, given(torch.float32), {"precision": "fp32"}).audit()
    assert not_asked is not None and not not_asked.honoured, not_asked


@pytest.mark.parametrize("name", ["eager", "inductor", "cudagraphs", "aoti"])
def test_an_upcast_inside_is_caught(name: str) -> None:
    class Upcast(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.inner(x).float() @ self.inner.weight.float()).half()

    inputs = Inputs(args=(torch.randn(8, 64, device=DEVICE, dtype=torch.float16),))
    module = Upcast().to(DEVICE, torch.float16).eval()
    audit = load_backend(name).build(Model(form="module", name="u", module=module), inputs, {"precision": "fp16"}).audit()
    assert audit is not None and not audit.honoured
    assert audit.shares == pytest.approx({"float16": 0.5, "float32": 0.5})


@pytest.mark.parametrize(("name", "options"), [("cudagraphs", {}), ("inductor", {"preset": "reduce-overhead"})])
def test_a_result_survives_the_next_calls_and_inputs_stay(name: str, options: dict[str, Any]) -> None:
    module, inputs = net(torch.float16), given(torch.float16)
    runner = load_backend(name).build(Model(form="module", name="net", module=module), inputs, options)
    before = inputs.args[0].clone()
    first = runner(*inputs.args)
    kept = {k: v.clone() for k, v in first.items()}
    for _ in range(3):
        runner(torch.full_like(inputs.args[0], 3.0))
    assert all(torch.equal(first[k], kept[k]) for k in kept)
    assert torch.equal(inputs.args[0], before)
    runner.close()


def test_a_skipped_cuda_graph_is_said_with_its_reason() -> None:
    class Mutates(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(1)
            return x @ x

    inputs = Inputs(args=(torch.randn(64, 64, device=DEVICE),))
    runner = inductor.build(Model(form="module", name="m", module=Mutates()), inputs, {"preset": "reduce-overhead", "precision": "fp32"})
    notes = [note for note in runner.notes if "skipped" in note]
    assert notes and "mutat" in notes[0], runner.notes
    audit = runner.audit()
    assert audit is not None and "CUDA graphs skipped" in audit.reason


def test_a_forward_that_waits_for_the_device_cannot_be_recorded_and_the_device_survives() -> None:
    class Waits(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum().item() > 0 else x

    inputs = Inputs(args=(torch.ones(64, device=DEVICE),))
    with pytest.raises(Unsupported, match="cannot be recorded"):
        cudagraphs.build(Model(form="module", name="w", module=Waits()), inputs, {})
    assert torch.ones(4, device=DEVICE).sum().item() == 4


def test_close_gives_the_graphs_memory_back() -> None:
    module, inputs = net(torch.float16), given(torch.float16, batch=64)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    runner = cudagraphs.build(Model(form="module", name="net", module=module), inputs, {})
    held = torch.cuda.memory_reserved()
    runner.close()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held


def test_a_package_takes_every_size_of_its_range_and_refuses_the_rest(tmp_path: Path) -> None:
    module = net(torch.float16)
    model = Model(form="module", name="net", module=module)
    runner = aoti.build(model, given(torch.float16), {"precision": "fp16", "dynamic": {"N": (1, 16)}})
    again = aoti.load(tmp_path, runner.save(tmp_path), {"signed_by_us": True}, "cuda")
    for batch in (1, 2, 5, 16):
        inputs = given(torch.float16, batch)
        for each in (runner, again):
            close(each(*inputs.args), reference(module, inputs), torch.float16)
    for bad in (
        given(torch.float16, 17).args[0],
        given(torch.float32).args[0],
        given(torch.float16).args[0].transpose(2, 3),
        torch.zeros(4, 8, 16, 16),
    ):
        with pytest.raises(UsageError):
            again(bad)
    base = torch.zeros(4 * 8 * 256 + 1, device=DEVICE, dtype=torch.float16)
    with pytest.raises(UsageError, match="address"):
        again(base[1:].view(4, 8, 16, 16))


@pytest.mark.parametrize(("name", "options"), [("eager", {}), ("inductor", {"preset": "reduce-overhead"}), ("cudagraphs", {})])
def test_a_bundle_without_native_code_is_rebuilt_from_its_program(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    module, inputs = net(torch.float16), given(torch.float16)
    backend = load_backend(name)
    files = backend.build(Model(form="module", name="net", module=module), inputs, {"precision": "fp16", **options}).save(tmp_path)
    again = backend.load(tmp_path, files, {"signed_by_us": True, "precision": "fp16", **options}, DEVICE)
    close(again(*inputs.args), reference(module, inputs), torch.float16)
    with pytest.raises(UsageError):
        again(*given(torch.float16, 3).args)


def test_eager_costs_no_more_than_a_bare_call() -> None:
    module, inputs = net(torch.float16), given(torch.float16, batch=256)
    runner = eager.build(Model(form="module", name="net", module=module), inputs, {})

    def median_ms(call: Any) -> float:
        found = []
        for _ in range(60):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(*inputs.args)
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
        return sorted(found[10:])[25]

    with torch.inference_mode():
        bare = median_ms(module)
    assert median_ms(runner) < bare * 1.05
