"""Outputs x reference -> one error row an output. Measures and never judges by size; that is gate.py."""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpuopt.core.result import OutputError

Named = Sequence[tuple[str, Tensor]]
"""Flattened outputs: dotted names and tensors, in the model's order."""

CHUNK = 1 << 22
"""Elements converted to fp64 at a time: 32 MiB a temporary, whatever the output's size."""


def flatten(outputs: Any) -> list[tuple[str, Tensor]]:
    """A model's outputs -> dotted names and tensors, in order. A bare tensor is `output`, a tuple's items are `0`, `1`, a dict's its keys.

    Goes through tuples, lists, dicts (transformers' ModelOutput is one), dataclasses and caches of keys and values by layer. Numbers become
    0-d tensors. None, text and whatever holds no tensor are left out. Tensors are not copied.
    """
    found: list[tuple[str, Tensor]] = []
    _walk(outputs, "", found, set())
    return found


def compare(reference: Named, candidate: Named, twin: Named | None = None) -> tuple[OutputError, ...]:
    """Errors of `candidate` against `reference` (fp64 where it could be had), one row an output in the reference's order.

    `twin` is plain eager at the candidate's dtype: its error against the same reference becomes `twin_rmse`, its dtype the one required.
    Outputs pair up by name where both sides have the same names, else by order (an ONNX graph has names of its own). What cannot be
    compared (count, shape, kind, dtype) or must be equal and is not (integers, booleans, NaN and Inf) comes back with `passed` False and
    the reason. Sums are made in fp64 on the candidate's device, in chunks.
    """
    others = aligned(reference, candidate)
    if others is None:
        return _count_mismatch(reference, candidate)
    twins: list[Tensor | None] = [None] * len(reference)
    if twin is not None:
        found = aligned(reference, twin)
        twins = [None] * len(reference) if found is None else list(found)
    return tuple(_row(name, ours, theirs, like) for (name, ours), theirs, like in zip(reference, others, twins, strict=True))


def identical(first: Named, second: Named) -> bool:
    """Whether two calls gave the same names, shapes, dtypes and bits. NaNs with equal bits are equal."""
    return len(first) == len(second) and all(a == b and _same_bits(x, y) for (a, x), (b, y) in zip(first, second, strict=True))


def spread(first: Named, second: Named) -> dict[str, float]:
    """RMS difference of two calls of the same candidate on the same input, by output; integers that differ count as differences, too."""
    if [name for name, _ in first] != [name for name, _ in second]:
        return {}
    return {
        name: _sums(x, y).rmse
        for (name, x), (_, y) in zip(first, second, strict=True)
        if x.shape == y.shape and (x.is_floating_point() or x.is_complex())
    }


def _walk(value: Any, name: str, found: list[tuple[str, Tensor]], above: set[int]) -> None:
    if value is None or isinstance(value, str | bytes):
        return
    if isinstance(value, Tensor):
        found.append((name or "output", value))
        return
    if isinstance(value, numbers.Number):
        found.append((name or "output", torch.as_tensor(value)))  # type: ignore[call-overload, unused-ignore]
        return
    if id(value) in above:  # an object that holds itself
        return
    inside = above | {id(value)}
    for key, item in _children(value):
        _walk(item, f"{name}.{key}" if name else str(key), found, inside)


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, Sequence):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    # transformers' caches, by what they have and not by class, as this file knows no library: an encoder-decoder's two halves, layers,
    # and one layer's keys and values.
    for parts in (("self_attention_cache", "cross_attention_cache"), ("keys", "values")):
        if all(hasattr(value, part) and not callable(getattr(value, part)) for part in parts):
            return [(part, getattr(value, part)) for part in parts]
    layers = getattr(value, "layers", None)
    return list(enumerate(layers)) if isinstance(layers, Sequence) else []


def aligned(reference: Named, other: Named) -> list[Tensor] | None:
    """`other`'s tensors in the reference's order, by name where both have the same names; None when the counts differ."""
    if len(reference) != len(other):
        return None
    by_name = dict(other)
    if len(by_name) == len(other) and set(by_name) == {name for name, _ in reference}:
        return [by_name[name] for name, _ in reference]
    return [tensor for _, tensor in other]


def _count_mismatch(reference: Named, candidate: Named) -> tuple[OutputError, ...]:
    """One failed row for each output that only one side has, or for the whole where names say nothing."""
    reason = f"{len(candidate)} outputs where the reference has {len(reference)}"
    ours, theirs = dict(reference), dict(candidate)
    odd = [n for n in ours if n not in theirs] + [n for n in theirs if n not in ours]
    rows = []
    for name in odd or ["outputs"]:
        tensor = ours.get(name, theirs.get(name))
        side = "missing from the candidate" if name in ours else "only in the candidate"
        shape, dtype = (tuple(tensor.shape), _dtype(tensor)) if tensor is not None else ((), "")
        rows.append(_failed(name, shape, dtype, f"{reason}: {name} is {side}" if odd else reason))
    return tuple(rows)


def _row(name: str, ours: Tensor, theirs: Tensor, like: Tensor | None) -> OutputError:
    shape, dtype = tuple(theirs.shape), _dtype(theirs)
    if theirs.shape != ours.shape:
        return _failed(name, shape, dtype, f"shape {list(theirs.shape)} where the reference has {list(ours.shape)}")
    if _kind(theirs) != _kind(ours):
        return _failed(name, shape, dtype, f"dtype {dtype} where the reference has {_dtype(ours)}")
    if like is not None and like.dtype != theirs.dtype:
        return _failed(name, shape, dtype, f"dtype {dtype} where eager gives {_dtype(like)}")
    if _kind(ours) in ("integer", "bool"):
        if like is None and ours.dtype != theirs.dtype:
            return _failed(name, shape, dtype, f"dtype {dtype} where the reference has {_dtype(ours)}")
        return _exact_row(name, ours, theirs)
    sums = _sums(ours, theirs)
    twins = _sums(ours, like) if like is not None and like.shape == ours.shape else None
    twin_rmse = twins.rmse if twins else None
    reason = ""
    if sums.num_odd:
        reason = f"{sums.num_nonfinite} NaN or Inf where the reference has {sums.num_nonfinite_reference}, {sums.num_odd} places differ"
        if twins and twins.num_odd:
            reason += "; eager at the same dtype has them, too: the dtype is too narrow for this model"
    return OutputError(
        name=name,
        shape=shape,
        dtype=dtype,
        rmse=sums.rmse,
        rms_reference=sums.rms,
        relative_rmse=_ratio(sums.rmse, sums.rms),
        max_abs=sums.max_abs,
        cosine=sums.cosine,
        snr_db=20 * math.log10(sums.rms / sums.rmse) if sums.rms > 0 and sums.rmse > 0 else None,
        num_nonfinite=sums.num_nonfinite,
        num_nonfinite_reference=sums.num_nonfinite_reference,
        twin_rmse=twin_rmse,
        ratio=_ratio(sums.rmse, twin_rmse),
        passed=not reason,
        reason=reason,
    )


def _exact_row(name: str, ours: Tensor, theirs: Tensor) -> OutputError:
    wrong = int((ours.to(theirs.device) != theirs).sum())
    return OutputError(
        name=name,
        shape=tuple(theirs.shape),
        dtype=_dtype(theirs),
        rmse=None,
        rms_reference=None,
        relative_rmse=None,
        max_abs=None,
        cosine=None,
        snr_db=None,
        exact_mismatches=wrong,
        passed=wrong == 0,
        reason=f"{wrong} of {theirs.numel()} values differ, and {_dtype(theirs)} must be equal" if wrong else "",
    )


def _failed(name: str, shape: tuple[int, ...], dtype: str, reason: str) -> OutputError:
    return OutputError(
        name=name,
        shape=shape,
        dtype=dtype,
        rmse=None,
        rms_reference=None,
        relative_rmse=None,
        max_abs=None,
        cosine=None,
        snr_db=None,
        passed=False,
        reason=reason,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    rmse: float
    rms: float
    max_abs: float
    cosine: float | None
    num_nonfinite: int
    num_nonfinite_reference: int
    num_odd: int
    """Places where one side is NaN, +Inf or -Inf and the other is not the same."""


def _sums(ours: Tensor, theirs: Tensor) -> _Sums:
    """Error sums in fp64 over the places where both sides are finite."""
    scale = max(_largest(ours), _largest(theirs))
    error = ours_sq = theirs_sq = dot = worst = 0.0
    finite = nonfinite = nonfinite_reference = odd = 0
    for r, c in zip(_chunks(ours), _chunks(theirs), strict=True):
        r = r.to(c.device)
        fine_r, fine_c = torch.isfinite(r), torch.isfinite(c)
        both = fine_r & fine_c
        num_both = int(both.sum())
        if num_both < r.numel():
            nonfinite_reference += int((~fine_r).sum())
            nonfinite += int((~fine_c).sum())
            odd += int((~both & ~((r == c) | (torch.isnan(r) & torch.isnan(c)))).sum())
            r, c = r[both], c[both]
        finite += num_both
        if not num_both or not scale:
            continue
        # Scaled first, so that the square of a huge value does not overflow and that of a tiny one does not vanish.
        r, c = r / scale, c / scale
        d = c - r
        error += float(d.dot(d))
        ours_sq += float(r.dot(r))
        theirs_sq += float(c.dot(c))
        dot += float(r.dot(c))
        worst = max(worst, float(d.abs().max()))
    norm = math.sqrt(ours_sq) * math.sqrt(theirs_sq)
    count = max(finite, 1)
    return _Sums(
        rmse=min(scale * math.sqrt(error / count), sys.float_info.max),
        rms=scale * math.sqrt(ours_sq / count),
        max_abs=min(scale * worst, sys.float_info.max),
        cosine=max(-1.0, min(1.0, dot / norm)) if norm else None,
        num_nonfinite=nonfinite,
        num_nonfinite_reference=nonfinite_reference,
        num_odd=odd,
    )


def _largest(tensor: Tensor) -> float:
    largest = 0.0
    for chunk in _chunks(tensor):
        size = chunk.abs()
        size[~torch.isfinite(size)] = 0.0
        largest = max(largest, float(size.max()) if size.numel() else 0.0)
    return largest


def _chunks(tensor: Tensor) -> list[Tensor] | Any:
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    return (part.to(torch.float64) for part in flat.split(CHUNK))


def _ratio(value: float, unit: float | None) -> float | None:
    """value / unit; None where it is no finite number. 0 / 0 is None, too: nothing was measured."""
    if not unit:
        return None
    ratio = value / unit
    return ratio if math.isfinite(ratio) else None


def _kind(tensor: Tensor) -> str:
    if tensor.dtype is torch.bool:
        return "bool"
    if tensor.is_complex():
        return "complex"
    return "float" if tensor.is_floating_point() else "integer"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    one, two = a.detach().contiguous().reshape(-1), b.detach().contiguous().reshape(-1)
    # Bytes, since NaN is unequal to itself and -0.0 equal to 0.0.
    return bool(torch.equal(one.view(torch.uint8), two.view(torch.uint8)))
