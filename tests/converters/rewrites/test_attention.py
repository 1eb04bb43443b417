"""One attention kernel and no other, in eager, in a compiled graph and in an exported one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpuopt.converters.rewrites import attention, implementations
from gpuopt.core.errors import Unsupported, UsageError

KERNEL = {
    "flash": "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "math": "aten._scaled_dot_product_attention_math.default",
}


@pytest.mark.parametrize("kernel", ["flash", "math"])
def test_every_attention_of_the_graph_runs_in_it_and_outputs_are_the_same(kind: str, kernel: str, zoo: Any) -> None:
    module, given = zoo.built(kind)
    want = zoo.outputs(module, given)
    changed = zoo.rewritten(module, given, f"attention:{kernel}").module
    assert zoo.same(zoo.outputs(changed, given), want)
    found = {op for op in zoo.exported_ops(changed, given) if "scaled_dot_product" in op}
    assert found == {KERNEL[kernel]}


@pytest.mark.parametrize(("texts", "kernel"), [(("attention:flash", "no_mask"), "flash"), (("no_mask", "attention:math"), "math")])
def test_it_goes_with_no_mask_in_either_order(texts: tuple[str, ...], kernel: str, zoo: Any) -> None:
    module, given = zoo.built("llama-no-cache")
    changed = zoo.rewritten(module, given, *texts).module
    ops = zoo.exported_ops(changed, given)
    assert KERNEL[kernel] in ops and not zoo.stacks_a_mask(ops)
    again = zoo.compiled(changed) if kernel == "flash" else changed
    assert zoo.same(zoo.outputs(again, given), zoo.outputs(module, given))


def test_a_step_with_a_cache_gives_what_it_gave(zoo: Any) -> None:
    module, given = zoo.built("llama")
    changed = zoo.rewritten(module, given, "attention:flash").module

    def two_steps(model: Any) -> torch.Tensor:
        with torch.no_grad():
            cache = model(input_ids=given["input_ids"][:, :4]).past_key_values
            more = model(input_ids=given["input_ids"][:, 4:6], past_key_values=cache)
            logits: torch.Tensor = model(input_ids=given["input_ids"][:, 6:], past_key_values=more.past_key_values).logits
            return logits

    assert zoo.same([two_steps(changed)], [two_steps(module)])


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_a_kernel_that_is_not_here_is_refused_in_the_first_call_never_replaced(kernel: str, zoo: Any) -> None:
    module, given = zoo.built("bert")
    changed = zoo.rewritten(module, given, f"attention:{kernel}").module
    with pytest.raises(Unsupported, match=f"the {kernel} attention kernel exists on GPUs alone"):
        zoo.outputs(changed, given)


def test_a_module_that_calls_sdpa_itself_is_told_why_not() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    assert attention.applies(Plain()) == "it is no transformers model"


def test_the_kernel_has_to_be_named(zoo: Any) -> None:
    module, given = zoo.built("bert")
    with pytest.raises(UsageError, match="needs a word"):
        zoo.rewritten(module, given, "attention")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attend_is_scaled_dot_product_attention(heads: int, masked: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    key, value = (torch.randn(2, heads, 7, 6, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 1, 5, 7) > 0.3 if masked else None
    if mask is not None:
        mask[..., 0] = True
    want = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    for kernel in ("flash", "math"):
        found = implementations.attend(kernel, query, key, value, mask, is_causal=False, scale=0.3)
        assert torch.allclose(found, want, rtol=1e-10)


class Cuda:
    """Calls of the GPU's operators, recorded on tensors that say they are there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for name in ("flash", "cudnn", "efficient"):
            monkeypatch.setattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention", self._record(name), raising=False)

    def _record(self, name: str) -> Any:
        def call(query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            self.calls.append((name, (query, *args), kwargs))
            return query.new_zeros(query.shape), None

        return call


class OnGpu(torch.Tensor):
    """A tensor of the CPU that calls itself one of a GPU."""

    @property
    def device(self) -> Any:
        return torch.device("cuda", 0)


def on_gpu(*shape: int, dtype: torch.dtype = torch.float16) -> Any:
    return torch.zeros(shape, dtype=dtype).as_subclass(OnGpu)


def test_on_a_gpu_the_kernels_own_operator_is_called_as_torch_would(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    query, key = on_gpu(2, 4, 5, 12), on_gpu(2, 2, 7, 12)
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    for kernel in ("flash", "cudnn", "efficient"):
        found = implementations.attend(kernel, query, key, key, None if kernel == "flash" else mask, is_causal=False, scale=None)
        assert found.shape == (2, 4, 5, 12)
    for name, args, kwargs in cuda.calls:
        assert args[0].shape[-1] == 16 and kwargs["scale"] == 12**-0.5, "padded to a multiple of 8, scaled by the width it had"
        assert args[1].shape[1] == (4 if name == "efficient" else 2), "flash and cudnn know grouped heads"
    assert [name for name, _, _ in cuda.calls] == ["flash", "cudnn", "efficient"]
    bias = cuda.calls[2][1][3]
    assert bias.shape == (2, 4, 5, 7) and bias.stride()[-2] % 16 == 0 and bias.dtype == torch.float16


def test_on_a_gpu_what_a_kernel_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch)
    half, single = on_gpu(1, 1, 4, 8), on_gpu(1, 1, 4, 8, dtype=torch.float32)
    for kernel in ("flash", "cudnn"):
        with pytest.raises(Unsupported, match="fp16 and bf16, not float32"):
            implementations.attend(kernel, single, single, single, None, is_causal=True, scale=None)
    with pytest.raises(Unsupported, match="takes no mask"):
        implementations.attend("flash", half, half, half, torch.ones(1, 1, 4, 4), is_causal=False, scale=None)
    with pytest.raises(Unsupported, match="one width"):
        implementations.attend("efficient", half, half, on_gpu(1, 1, 4, 16), None, is_causal=False, scale=None)
