"""Model + Runner + inputs -> Accuracy: the two stages, in the only order they are run in.

Stage `structure` runs the same transforms and the same backend in fp32 with TF32 off: a wrong rewrite shows there, where rounding cannot hide it.
Stage `precision` runs the candidate as it is and is judged by the error that plain eager makes at the same dtype, both against fp64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gpuopt import converters
from gpuopt.accuracy import compare
from gpuopt.backends import load_backend
from gpuopt.converters import precision as precisions
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Precision, Transforms
from gpuopt.pipeline.asked import own_precision

Named = list[tuple[str, Any]]
"""Outputs flattened to dotted names and tensors."""


@dataclass(slots=True)
class Reference:
    """What candidates are held against: one list of outputs a seed."""

    outputs: list[Named]
    kind: str
    """`fp64`, or `fp32: why not fp64`."""
    mutates_inputs: bool = False
    """The model itself writes into its inputs: a candidate may, too."""


@contextmanager
def exact_math() -> Iterator[None]:
    """No TF32 and no reduced-precision reductions while a reference is computed."""
    with precisions.flags(Precision.FP32):
        yield


def reference(model: Model, batches: list[Inputs], device: str) -> Reference:
    """fp64 outputs of the model as it was loaded; fp32 with the reason where fp64 cannot be had."""
    try:
        outputs, mutates = _eager(model, Precision.FP64, batches, device)
        return Reference(outputs=outputs, kind="fp64", mutates_inputs=mutates)
    except (RuntimeError, NotImplementedError, TypeError, Unsupported) as error:
        # An op without an fp64 kernel, a graph with a dtype written into it, or a device too small for it.
        why = (str(error).splitlines() or [type(error).__name__])[0][:160]
    outputs, mutates = _eager(model, Precision.FP32, batches, device)
    return Reference(outputs=outputs, kind=f"fp32: {why}", mutates_inputs=mutates)


def eager_outputs(model: Model, precision: Precision, batches: list[Inputs], device: str) -> list[Named]:
    """Plain eager at `precision`, without any transform: the yardstick of a stage."""
    return _eager(model, precision, batches, device)[0]


def _eager(model: Model, precision: Precision, batches: list[Inputs], device: str) -> tuple[list[Named], bool]:
    """Outputs of a copy of the model, cast as the converter casts it, and whether it writes into its inputs."""
    dtype = getattr(torch, precision.dtype)
    with precisions.flags(precision):
        twin = converters.apply(model, precision, Transforms()).module
        twin = copy.deepcopy(twin) if twin is model.module else twin
        try:
            twin = twin.to(device)
            found, mutates = [], False
            with torch.no_grad():
                for batch in batches:
                    given = batch.map(lambda t: cast(t, dtype, device))
                    before = given.map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t)
                    found.append([(name, _kept(value)) for name, value in compare.flatten(twin(*given.args, **given.kwargs))])
                    mutates = mutates or not _same_inputs(before, given)
            return found, mutates
        finally:
            del twin
            release(device)


def runner_outputs(call: Callable[..., Any], batches: list[Inputs], dtype: torch.dtype, device: str) -> tuple[list[Named], bool, bool]:
    """Outputs of a candidate, whether two calls on the first batch gave the same bits, and whether it changed its inputs."""
    found: list[Named] = []
    deterministic, mutates = True, False
    for index, batch in enumerate(batches):
        given = batch.map(lambda t: cast(t, dtype, device))
        before = given.map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t)
        first = [(name, _kept(value)) for name, value in compare.flatten(call(*given.args, **given.kwargs))]
        if index == 0:
            mutates = not _same_inputs(before, given)
            again = compare.flatten(call(*before.args, **before.kwargs))
            deterministic = compare.identical(first, again)
        found.append(first)
    return found, deterministic, mutates


def cast(tensor: Any, dtype: torch.dtype, device: str) -> Any:
    """A copy of a tensor, moved; floating ones change to `dtype`, integers stay integers.

    A copy even where nothing changes: a model that writes into its inputs must not change what the next side is given, nor the caller's own tensors.
    """
    if not isinstance(tensor, torch.Tensor):
        return tensor
    return tensor.detach().to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def release(device: str) -> None:
    """Give cached device memory back, so that the next model fits."""
    if device.startswith("cuda"):
        import gc

        gc.collect()
        torch.cuda.empty_cache()


def _kept(value: Any) -> Any:
    """A copy: graph replays and arenas overwrite what they returned."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))
    return bool(a == b)


def _same_inputs(before: Inputs, after: Inputs) -> bool:
    pairs = [*zip(before.args, after.args, strict=True), *((before.kwargs[k], after.kwargs[k]) for k in before.kwargs)]
    return all(_same(a, b) for a, b in pairs)


def reference_of_file(model: Model, batches: list[Inputs]) -> Reference:
    """Forms without parameters to widen: ONNX Runtime's CPU provider for ONNX, the script itself for TorchScript."""
    if model.form == "torchscript":
        return Reference(
            outputs=eager_outputs(model, own_precision(model), batches, "cpu"),
            kind=f"{own_precision(model)}: TorchScript cannot be widened",
        )
    backend = load_backend("ort")
    own = own_precision(model)
    given = batches[0].map(lambda t: cast(t, getattr(torch, own.dtype), "cpu"))
    runner = backend.build(model, given, {"preset": "basic", "precision": own.value, "dynamic": {}})
    try:
        outputs, _, _ = runner_outputs(runner, batches, getattr(torch, own.dtype), "cpu")
    finally:
        runner.close()
    return Reference(outputs=outputs, kind=f"{own}: ONNX Runtime's CPU provider")
