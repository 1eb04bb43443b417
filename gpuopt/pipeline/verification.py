"""Model + Runner + inputs -> Accuracy: the two stages, in the only order they are run in.

Stage `structure` runs the same transforms and the same backend in fp32 with TF32 off: a wrong rewrite shows there, where rounding cannot hide it.
Stage `precision` runs the candidate as it is and is judged by the error that plain eager makes at the same dtype, both against fp64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
    refused: list[str] = field(default_factory=list)
    """Why a batch beyond the required ones could not be run, one a batch; "" where it could."""


@dataclass(slots=True)
class Twin:
    """Plain eager at the candidate's precision, the yardstick of a stage."""

    outputs: list[Named]
    mutates_inputs: bool = False
    refused: list[str] = field(default_factory=list)
    """As in Reference."""
    unstable: str = ""
    """Why two of its calls on one input differ by more than rounding; empty where they do not, or nobody looked."""


@dataclass(slots=True)
class Answers:
    """What a candidate gave."""

    outputs: list[Named]
    deterministic: bool = True
    """Two calls on the first batch gave the same bits."""
    mutates_inputs: bool = False
    raised: list[str] = field(default_factory=list)
    """As `refused` in Reference."""
    overwrites: bool = False
    """A later call changed what an earlier one had returned."""


@contextmanager
def exact_math() -> Iterator[None]:
    """No TF32 and no reduced-precision reductions while a reference is computed."""
    with precisions.flags(Precision.FP32):
        yield


def reference(model: Model, batches: list[Inputs], device: str, *, required: int | None = None) -> Reference:
    """fp64 outputs of the model as it was loaded; fp32 with the reason where fp64 cannot be had.

    Batches from `required` on may be refused by the model: their outputs are empty then, and `refused` says why.
    """
    try:
        found = _eager(model, Precision.FP64, batches, device, required=required)
        kind = "fp64"
    except (RuntimeError, NotImplementedError, TypeError, Unsupported) as error:
        # An op without an fp64 kernel, a graph with a dtype written into it, or a device too small for it.
        kind = f"fp32: {_first_line(error)}"
        found = None
    if found is None:  # outside the handler: the exception's frames hold the fp64 copy
        release(device)
        found = _eager(model, Precision.FP32, batches, device, required=required)
    return Reference(outputs=found.outputs, kind=kind, mutates_inputs=found.mutates_inputs, refused=found.refused)


def eager_outputs(model: Model, precision: Precision, batches: list[Inputs], device: str) -> list[Named]:
    """Plain eager at `precision`, without any transform: the yardstick of a stage."""
    return _eager(model, precision, batches, device).outputs


def twin(model: Model, precision: Precision, batches: list[Inputs], device: str, *, required: int | None = None) -> Twin:
    """The same, called once more on the first batch: a model that is random or keeps state cannot be held against itself, and its error would excuse anything."""
    return _eager(model, precision, batches, device, required=required, repeat=True)


def _eager(
    model: Model, precision: Precision, batches: list[Inputs], device: str, *, required: int | None = None, repeat: bool = False
) -> Twin:
    """Outputs of a copy of the model, cast as the converter casts it. A quantised precision's twin is its carrier's."""
    precision = precision.carrier
    dtype = getattr(torch, precision.dtype)
    with precisions.flags(precision):
        module = converters.apply(model, precision, Transforms(), device=device).module
        module = copy.deepcopy(module) if module is model.module else module
        found = Twin(outputs=[])
        try:
            module = module.to(device)
            with torch.no_grad():
                for index, batch in enumerate(batches):
                    given = batch.map(lambda t: cast(t, dtype, device))
                    before = given.map(copied)
                    outputs, why = attempt(partial(module, *given.args, **given.kwargs), index < _count(required, batches))
                    found.outputs.append(outputs)
                    found.refused.append(why)
                    found.mutates_inputs = found.mutates_inputs or not _same_inputs(before, given)
                if repeat and batches:
                    found.unstable = _unstable(module, batches[0], found.outputs[0], dtype, device)
            return found
        finally:
            del module
            release(device)


def runner_outputs(
    call: Callable[..., Any], batches: list[Inputs], dtype: torch.dtype, device: str, *, required: int | None = None
) -> Answers:
    """Outputs of a candidate, and how it treats its inputs and what it returned before. Batches from `required` on may fail: `raised` says how."""
    found = Answers(outputs=[])
    held: Any = None
    for index, batch in enumerate(batches):
        given = batch.map(lambda t: cast(t, dtype, device))
        before = given.map(copied)
        kept: list[Any] = []

        def once(given: Inputs = given, kept: list[Any] = kept) -> Any:
            kept.append(call(*given.args, **given.kwargs))
            return kept[0]

        first, why = attempt(once, index < _count(required, batches))
        found.outputs.append(first)
        found.raised.append(why)
        found.mutates_inputs = found.mutates_inputs or not _same_inputs(before, given)
        if index == 0:
            held = compare.flatten(kept[0])
            again = [(name, _kept(value)) for name, value in compare.flatten(call(*before.args, **before.kwargs))]
            found.deterministic = compare.identical(first, again)
        elif index == 1:
            # Of the same batch it would be the same bits; another batch shows whose memory the first outputs are.
            found.overwrites = not compare.identical(found.outputs[0], held)
    return found


def attempt(call: Callable[[], Any], is_required: bool) -> tuple[Named, str]:
    """The outputs of a call, kept; or nothing and why, where it may fail. What takes the device or its memory away is never excused."""
    try:
        return [(name, _kept(value)) for name, value in compare.flatten(call())], ""
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, Unsupported) as error:
        if is_required or isinstance(error, MemoryError | torch.OutOfMemoryError) or "CUDA" in str(error) or "alloc" in str(error):
            raise
        return [], f"{type(error).__name__}: {_first_line(error)}"


def _count(required: int | None, batches: list[Inputs]) -> int:
    return len(batches) if required is None else required


ROUNDING = 16.0
"""Times the unit roundoff that two calls on one input may differ by. Atomic sums change the last bits; over a deep model they come to what eager's own error
does, 8 to 9 roundoffs (measuring.md D.2). Noise below that hides under rounding and harms no verdict."""


def _unstable(module: Any, batch: Inputs, first: Named, dtype: torch.dtype, device: str) -> str:
    """Why a second call on `batch` does not give `first`, if it does not."""

    def again() -> Named:
        given = batch.map(lambda t: cast(t, dtype, device))
        return [(name, _kept(value)) for name, value in compare.flatten(module(*given.args, **given.kwargs))]

    before = _state(module)
    apart = _apart(first, again(), dtype)
    if not apart:
        return ""
    changed = [name for name, key in _state(module).items() if before.get(name) != key]
    # The same random numbers twice: a model that is then at one with itself is random and nothing else.
    devices = [device] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        one = again()
        torch.manual_seed(0)
        other = again()
    if not _apart(one, other, dtype):
        what = "it draws random numbers in eval mode"
    else:
        what = f"it keeps state between calls{f', in {changed[0]}' if changed else ''}"
    return f"the model itself gives other outputs on a second call of the same input ({apart}): {what}, so nothing can be held against it"


def _apart(first: Named, second: Named, dtype: torch.dtype) -> str:
    """By how much two calls differ; "" within rounding."""
    limit = ROUNDING * torch.finfo(dtype).eps / 2
    for row in compare.compare(first, second):
        if not row.passed:
            return f"{row.name}: {row.reason}"
        if row.rmse and (row.relative_rmse is None or row.relative_rmse > limit):
            return f"{row.name} differs by {row.relative_rmse:.2g} of its size" if row.relative_rmse is not None else f"{row.name} differs"
    return ""


def _state(module: Any) -> dict[str, Any]:
    """What a module holds besides its parameters, by name, each with what changes when it is written to."""
    found: dict[str, Any] = {name: _key(t) for name, t in module.named_buffers()}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if not name.startswith("_") and name != "training":
                found[f"{path}.{name}" if path else name] = _key(value)
    return found


def _key(value: Any) -> Any:
    """What is another after `value` was written to."""
    if isinstance(value, torch.Tensor):
        return id(value), 0 if value.is_inference() else value._version  # an inference tensor counts no writes
    return value if isinstance(value, int | float) else id(value)


def copied(value: Any) -> Any:
    """A tensor's own copy; anything else as it is."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160]


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


def reference_of_file(model: Model, batches: list[Inputs], *, required: int | None = None) -> Reference:
    """Forms without parameters to widen: ONNX Runtime's CPU provider for ONNX, the script itself for TorchScript."""
    if model.form == "torchscript":
        found = _eager(model, own_precision(model), batches, "cpu", required=required)
        kind = f"{own_precision(model)}: TorchScript cannot be widened"
        return Reference(outputs=found.outputs, kind=kind, refused=found.refused)
    own = own_precision(model)
    with _onnx_on_cpu(model, batches[0]) as runner:
        answers = runner_outputs(runner, batches, getattr(torch, own.dtype), "cpu", required=required)
    return Reference(outputs=answers.outputs, kind=f"{own}: ONNX Runtime's CPU provider", refused=answers.raised)


@contextmanager
def as_it_is(model: Model, device: str, sample: Inputs) -> Iterator[tuple[Callable[..., Any], torch.dtype, str]]:
    """The model in plain eager at its own precision: (a call, the dtype of its floating inputs, the device they live on)."""
    own = own_precision(model)
    dtype = getattr(torch, own.dtype)
    if model.form == "onnx":
        with _onnx_on_cpu(model, sample) as runner:
            yield runner, dtype, "cpu"
        return
    where = "cpu" if model.form == "torchscript" else device
    with precisions.flags(own):
        module = converters.apply(model, own, Transforms(), device=where).module
        module = (copy.deepcopy(module) if module is model.module and model.form != "torchscript" else module).to(where)
        try:
            with torch.no_grad():
                yield module, dtype, where
        finally:
            del module
            release(where)


@contextmanager
def _onnx_on_cpu(model: Model, sample: Inputs) -> Iterator[Callable[..., Any]]:
    own = own_precision(model)
    given = sample.map(lambda t: cast(t, getattr(torch, own.dtype), "cpu"))
    runner = load_backend("ort").build(model, given, {"preset": "basic", "precision": own.value, "dynamic": {}})
    try:
        yield runner
    finally:
        runner.close()
