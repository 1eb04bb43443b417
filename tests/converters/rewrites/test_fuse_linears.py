"""Linear layers that read one tensor are one product, and nobody can tell but by the clock."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gpuopt.converters import apply
from gpuopt.converters.rewrites import fuse_linears
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Precision, Transforms

PRODUCTS = {
    "bert": 2, "bert-decoder": 2, "roberta": 2, "distilbert": 2, "vit": 2, "clip": 4, "llama": 4, "llama-no-cache": 4, "qwen2": 4, "qwen2-window": 4,
    "t5": 10, "whisper": 6, "swin": 2,
}  # fmt: skip


class Gated(nn.Module):
    """Two layers on one tensor, one of them without bias, through a helper; a third on another tensor."""

    def __init__(self, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width)
        self.calls = 0

    def opened(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.gate(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(self.opened(x) * self.up(x))
        return found


def fused(module: nn.Module, *args: torch.Tensor, **transforms: Any) -> Any:
    model = Model(form="module", name="m", module=module.eval(), dtype="float32")
    return apply(model, transforms.pop("precision", None), Transforms(rewrites=("fuse_linears",), **transforms), Inputs(args=args)).module


def flops(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*args, **kwargs)
    return int(counter.get_total_flops())


def test_outputs_and_flops_are_the_same_with_fewer_products(kind: str, zoo: Any) -> None:
    module, given = zoo.built(kind)
    if kind not in PRODUCTS:  # GPT-2 comes fused, as Conv1D
        with pytest.raises(Unsupported, match="no module holds two linear layers"):
            zoo.rewritten(module, given, "fuse_linears")
        return
    changed = zoo.rewritten(module, given, "fuse_linears")
    assert f"became {PRODUCTS[kind]} products" in changed.notes[-1]
    assert zoo.same(zoo.outputs(changed.module, given), zoo.outputs(module, given))
    assert flops(changed.module, **given) == flops(module, **given)
    before, after = (zoo.exported_ops(m, given).count("aten.linear.default") for m in (module, changed.module))
    layers = int(changed.notes[-1].split(": ")[1].split()[0])
    assert before - after == layers - PRODUCTS[kind]


@pytest.mark.parametrize("kind", ["llama-no-cache", "t5"])
def test_a_compiled_graph_is_whole_and_gives_the_same(kind: str, zoo: Any) -> None:
    module, given = zoo.built(kind)
    changed = zoo.rewritten(module, given, "fuse_linears").module
    assert zoo.same(zoo.outputs(zoo.compiled(changed), given), zoo.outputs(module, given))


def test_the_old_weights_are_gone_and_nothing_is_there_twice() -> None:
    module = Gated().eval()
    old = weakref.ref(module.gate.weight)
    own = sum(p.numel() for p in module.parameters())
    fuse_linears.apply(module, None, Inputs(args=(torch.randn(3, 8),)))
    gc.collect()
    assert old() is None
    assert sum(p.numel() for p in module.parameters()) == own + 12, "zeros for the bias that one of them lacks"
    assert [name for name, _ in module.named_children()] == ["down", "gate_up"]


def test_a_copy_and_a_pickle_are_independent_and_work() -> None:
    x = torch.randn(3, 8)
    changed = fused(Gated(), x)
    want = changed(x)
    twin = copy.deepcopy(changed)
    with torch.no_grad():
        changed.gate_up.weight.zero_()
    again = pickle.loads(pickle.dumps(twin))
    assert torch.equal(twin(x), want) and torch.equal(again(x), want) and not torch.equal(changed(x), want)
    assert isinstance(again, Gated) and type(again).__name__ == "Gated"
    buffer = io.BytesIO()
    torch.save(twin.state_dict(), buffer)


def test_a_tensor_that_is_written_to_between_two_calls_is_read_again() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.doubles = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            first = self.a(x)
            if self.doubles:
                x.mul_(2)
            found: torch.Tensor = first + self.b(x)
            return found

    module, x = Writes(), torch.randn(3, 4)
    changed = fused(module, x)
    module.doubles = changed.doubles = True
    assert torch.allclose(changed(x), module(x), atol=1e-6)
    with pytest.raises(Unsupported, match="read the same tensor alone"):
        fused(module, x)


def test_one_buffer_filled_again_and_again_is_never_stale() -> None:
    module, x = Gated().eval(), torch.zeros(3, 8)
    changed = fused(module, x)
    for _ in range(3):
        x.normal_()
        with torch.inference_mode():
            assert torch.allclose(changed(x), module(x), atol=1e-6)
        assert torch.allclose(changed(x), module(x), atol=1e-6)


def test_layers_given_other_tensors_than_in_the_sample_still_give_their_own() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            found: torch.Tensor = self.a(x) - self.b(x if y is None else y) + self.a(x)
            return found

    module, x, y = Either(), torch.randn(3, 4), torch.randn(3, 4)
    changed = fused(module, x)
    assert torch.allclose(changed(x, y), module(x, y), atol=1e-6) and torch.allclose(changed(x), module(x), atol=1e-6)


def test_threads_do_not_see_each_other() -> None:
    module = Gated().eval()
    changed = fused(module, torch.randn(3, 8))
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            x = torch.randn(3, 8, generator=generator)
            if not torch.allclose(changed(x), module(x), atol=1e-6):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_the_parent_writes_on_itself_stays() -> None:
    class Counts(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            assert isinstance(self.gate.weight, torch.Tensor) and self.gate.bias is not None and self.gate.out_features == 12
            found: torch.Tensor = self.down(self.opened(x) * self.up(x)) + self.gate.in_features
            return found

    changed = fused(Counts(), torch.randn(3, 8))
    before = changed.calls
    changed(torch.randn(3, 8))
    assert changed.calls == before + 1


def test_code_that_a_stand_in_cannot_run_is_refused_whole() -> None:
    class Child(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    with pytest.raises(Unsupported, match="does not go with fused linear layers"):
        fused(Child(), torch.randn(3, 8))


def test_shared_hooked_and_alien_layers_are_left_alone() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
            self.tied = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.a(x) + self.b(x) + self.c(x) + self.d(x) + self.tied(x.relu())
            return found

    module, x = Three(), torch.randn(3, 4)
    module.tied.weight = module.a.weight
    module.b.register_forward_hook(lambda *_: None)
    changed = fused(module, x)
    assert [name for name, _ in changed.named_children()] == ["a", "b", "tied", "c_d"]
    assert torch.allclose(changed(x), module(x), atol=1e-6)


def test_keep_fp32_names_modules_as_they_are_afterwards() -> None:
    x = torch.randn(3, 8)
    kept = fused(Gated(), x, precision=Precision.BF16, keep_fp32=("gate_up",))
    assert kept.gate_up.weight.dtype == torch.float32 and kept.down.weight.dtype == torch.bfloat16
    assert kept(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(UsageError, match="no module is called 'gate'"):
        fused(Gated(), x, precision=Precision.BF16, keep_fp32=("gate",))


def test_without_inputs_it_says_what_it_needs() -> None:
    with pytest.raises(Unsupported, match="without inputs"):
        fuse_linears.apply(Gated(), None, None)
    assert fuse_linears.applies(Gated()) is None
    with torch.device("meta"):
        assert fuse_linears.applies(Gated()) is None
    assert "no module holds" in str(fuse_linears.applies(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))


@settings(max_examples=30, deadline=None)
@drawn(st.lists(st.integers(0, 2), min_size=2, max_size=6), st.integers(0, 2**16))
def test_any_wiring_gives_the_same(wiring: list[int], seed: int) -> None:
    """Each layer reads one of three tensors; those that read the same one are fused."""

    class Wired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for index in range(len(wiring)):
                setattr(self, f"l{index}", nn.Linear(3, 2 + index % 2, bias=index % 3 > 0))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            read = [x, x * 2, x[:1]]
            return [getattr(self, f"l{index}")(read[which]) for index, which in enumerate(wiring)]

    torch.manual_seed(seed)
    module, x = Wired().double().eval(), torch.randn(4, 3, dtype=torch.float64)
    groups = sum(wiring.count(which) > 1 for which in range(3))
    want = module(x)
    if not groups:
        with pytest.raises(Unsupported):
            fused(module, x)
        return
    changed = fused(module, x)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(changed(x), want, strict=True))
    assert len(list(changed.children())) == len(wiring) - sum(wiring.count(w) - 1 for w in range(3) if wiring.count(w) > 1)
