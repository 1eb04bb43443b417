"""Promise P8 over every backend that runs on a CPU: what differs from the build is eager's answer or an error, never another answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.backends import load_backend
from gpuopt.core.errors import UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import TensorSpec

BUILT = {"aoti": {"aot_inductor.compile_wrapper_opt_level": "O0"}, "inductor": {}, "eager": {}, "null": {}}


class Square(torch.nn.Module):
    """Not symmetric in its square input, mixes rows of a batch (so that a wrong batch shows), and takes integers as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(32, 8)
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x) + self.table(ids) + x.mean(0, keepdim=True)
        return out


def given(batch: int = 4) -> Inputs:
    torch.manual_seed(batch)
    specs = (TensorSpec.parse("x:float32[N,8,8]"), TensorSpec.parse("ids:int64[N,8]"))
    return Inputs(args=(torch.randn(batch, 8, 8), torch.randint(0, 32, (batch, 8))), specs=specs, dims={"N": batch})


@pytest.fixture(scope="module")
def module() -> Square:
    torch.manual_seed(0)
    return Square().eval()


@pytest.fixture(scope="module")
def runners(module: Square, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Live ones, and the same loaded from what they saved."""
    found: dict[str, Any] = {}
    for name, options in BUILT.items():
        backend = load_backend(name)
        if backend.available("cpu"):
            continue
        found[name] = backend.build(Model(form="module", name="square", module=module), given(), {"precision": "fp32", **options})
        folder = tmp_path_factory.mktemp(name)
        if name != "inductor":  # compiling again is in test_inductor.py
            files = found[name].save(folder)
            found[f"{name}, loaded"] = backend.load(Path(folder), files, {"signed_by_us": True, "precision": "fp32"}, "cpu")
    yield found
    for runner in found.values():
        runner.close()


CHANGES: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[Any, ...]]] = {
    "nothing": lambda x, ids: (x, ids),
    "other values": lambda x, ids: (x * 2 + 1, ids.flip(0)),
    "twice the batch": lambda x, ids: (x.repeat(2, 1, 1), ids.repeat(2, 1)),
    "a batch of one": lambda x, ids: (x[:1], ids[:1]),
    "batches that differ": lambda x, ids: (x[:2], ids),
    "transposed": lambda x, ids: (x.transpose(1, 2), ids),
    "sliced with gaps": lambda x, ids: (torch.cat([x, x], -1)[..., ::2], ids),
    "float64": lambda x, ids: (x.double(), ids),
    "float16": lambda x, ids: (x.half(), ids),
    "int32 ids": lambda x, ids: (x, ids.int()),
    "float ids": lambda x, ids: (x, ids.float()),
    "swapped": lambda x, ids: (ids, x),
    "one missing": lambda x, ids: (x,),
    "one too many": lambda x, ids: (x, ids, ids),
    "a list": lambda x, ids: (x.tolist(), ids),
    "a rank less": lambda x, ids: (x[0], ids[0]),
    "nothing in it": lambda x, ids: (x[:0], ids[:0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_eagers_answer_or_an_error(runners: dict[str, Any], module: Square, change: str) -> None:
    bound = CHANGES[change](*given().args)
    try:
        with torch.no_grad():
            wanted = copy.deepcopy(module)(*bound)
    except (RuntimeError, TypeError, IndexError, AttributeError):
        wanted = None
    for name, runner in runners.items():
        try:
            out = runner(*bound)
        except UsageError as error:
            assert change not in ("nothing", "other values"), f"{name}: {error}"
            assert error.fix, name
            continue
        except (RuntimeError, TypeError, IndexError, AttributeError):
            # PyTorch's own refusal; allowed where PyTorch itself runs, never from native code that was handed the tensors.
            assert name in ("eager", "inductor", "null"), name
            assert wanted is None or change not in ("nothing", "other values"), name
            continue
        assert wanted is not None, f"{name} answered where eager refuses"
        assert out.shape == wanted.shape and out.dtype == wanted.dtype, name
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def test_inputs_are_left_as_they_were(runners: dict[str, Any]) -> None:
    for name, runner in runners.items():
        bound = given().args
        before = [t.clone() for t in bound]
        runner(*bound)
        assert all(torch.equal(a, b) for a, b in zip(bound, before, strict=True)), name


def test_results_do_not_share_memory_between_calls(runners: dict[str, Any]) -> None:
    for name, runner in runners.items():
        first = runner(*given().args)
        kept = first.clone()
        runner(*CHANGES["other values"](*given().args))
        assert torch.equal(first, kept), name


def test_results_need_no_gradients(runners: dict[str, Any]) -> None:
    for name, runner in runners.items():
        assert not runner(*given().args).requires_grad, name
