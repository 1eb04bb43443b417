"""A user's function + outputs and real data -> a score; two scores -> MetricResult. MLPerf's rule: 99% of what the model scores as it is.

The function is called as `fn(outputs, batch)`, `batch` being every array of the file by name, or as `fn(outputs, targets)` where its second parameter is called
`targets`: those arrays that are no inputs, the tensor itself where there is one. Outputs come on the CPU, in the nesting that the model has in eager whatever the
backend makes of it, half precision widened to fp32: a score is about the model, not about what numpy can do with bfloat16.
"""

from __future__ import annotations

import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpuopt.accuracy import compare
from gpuopt.core.errors import GpuoptError, UsageError
from gpuopt.core.result import MetricResult

_WIDENED = (torch.float16, torch.bfloat16)


class Metric:
    """A user's function, checked."""

    def __init__(self, name: str, function: Any, *, lower_is_better: bool = False) -> None:
        """`name`: as it was typed. Raises UsageError for what cannot be called with two arguments."""
        if not callable(function):
            raise UsageError(
                f"--metric {name} is a {type(function).__name__}, not a function", fix="def fn(outputs, batch): return a number"
            )
        self.name, self.function = name, function
        self.lower_is_better = lower_is_better or bool(getattr(function, "lower_is_better", False))
        self.wants_targets = False
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # a builtin without a signature
            return
        try:
            signature.bind(None, None)
        except TypeError as error:
            raise UsageError(
                f"--metric {name}{signature} cannot be called with two arguments", fix="def fn(outputs, batch): return a number"
            ) from error
        second = [p.name for p in signature.parameters.values()][1:2]
        self.wants_targets = bool(second) and second[0] in ("target", "targets")

    def score(self, outputs: Any, batch: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> float:
        """One batch's. Raises UsageError naming the function and its line where it raises, or gives anything but a number; NaN and Inf are handed back."""
        if self.wants_targets and not targets:
            raise UsageError(
                f"--metric {self.name} wants targets, and every array of the data is an input of the model",
                fix="add them to the file: numpy.savez(FILE, …, labels=…)",
            )
        second = (next(iter(targets.values())) if len(targets) == 1 else dict(targets)) if self.wants_targets else dict(batch)
        try:
            value = self.function(outputs, second)
        except (GpuoptError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's own code: whatever it raises is theirs to read, not a bug of ours
            what = str(error).strip().splitlines()
            raise UsageError(
                f"--metric {self.name} raised {type(error).__name__} at {_line(error, self.function)}: {(what or [''])[0][:300]}",
                fix="it is called with the model's outputs and a dict of the file's arrays, all on the CPU",
            ) from error
        return self._number(value)

    def _number(self, value: Any) -> float:
        if isinstance(value, torch.Tensor) or type(value).__module__ == "numpy":
            value = value.item() if _size(value) == 1 else value
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"{type(value).__name__}"
            raise UsageError(
                f"--metric {self.name} ({_home(self.function)}) gave {shown}, not a number", fix="return float(…), one number a batch"
            )
        return float(value)


def judge(
    metric: Metric, value: float | None, reference: float, *, min_ratio: float, num_samples: int, data_sha256: str | None
) -> MetricResult:
    """The verdict. What may be lost is a share of the reference's size, so that scores below zero and losses have the same rule.

    `value` is None where the candidate's outputs hold NaN or Inf. Raises UsageError for a score that is no number where they do not: then the function is at fault,
    and nothing can be held against it.
    """
    for whose, score in (("the model as it is", reference), ("this candidate", value)):
        if score is not None and not math.isfinite(score):
            raise UsageError(
                f"--metric {metric.name} ({_home(metric.function)}) gave {score} for {whose}",
                fix="return a finite number for every batch of the data",
            )
    allowed = (1.0 - min_ratio) * abs(reference)
    limit = reference + allowed if metric.lower_is_better else reference - allowed
    passed = value is not None and (value <= limit if metric.lower_is_better else value >= limit)
    shown = "not computed, the outputs hold NaN or Inf" if value is None else f"{value:.6g}"
    need = f"{'at most' if metric.lower_is_better else 'at least'} {limit:.6g} is wanted, {min_ratio:.4g} of eager's {reference:.6g}"
    return MetricResult(
        name=metric.name,
        value=value,
        reference=reference,
        limit=limit,
        lower_is_better=metric.lower_is_better,
        num_samples=num_samples,
        data_sha256=data_sha256,
        passed=passed,
        reason="" if passed else f"metric {metric.name}: {shown}; {need}",
    )


class Nesting:
    """The form of a model's own outputs, for putting another backend's tensors into."""

    def __init__(self, outputs: Any) -> None:
        """Of plain eager."""
        leaves, self._spec = pytree.tree_flatten(outputs)
        named = compare.flatten(outputs)
        self._names = [(name, torch.empty(0, dtype=t.dtype)) for name, t in named]
        places: dict[int, int] = {}
        for place, (_, tensor) in enumerate(named):
            places.setdefault(id(tensor), place)
        # Leaves that are no tensors (None, numbers, text) are the model's own constants.
        self._leaves = [
            (places.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None, None if isinstance(leaf, torch.Tensor) else leaf)
            for leaf in leaves
        ]
        self._is_known = all(
            place is not None for (place, _), leaf in zip(self._leaves, leaves, strict=True) if isinstance(leaf, torch.Tensor)
        )

    def of(self, outputs: Any) -> Any:
        """These outputs in that form, on the CPU and no narrower than fp32; in their own where the two do not match."""
        named = compare.flatten(outputs)
        tensors = compare.aligned(self._names, named)
        if not self._is_known or tensors is None:
            return pytree.tree_map_only(torch.Tensor, readable, outputs)
        return pytree.tree_unflatten(
            [constant if place is None else readable(tensors[place]) for place, constant in self._leaves], self._spec
        )


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that any code can compute with."""
    kept = tensor.detach().to("cpu", copy=True)
    return kept.float() if kept.dtype in _WIDENED else kept


def has_nonfinite(outputs: Any) -> bool:
    """Whether any floating output holds NaN or Inf."""
    return any(bool((~torch.isfinite(t)).any()) for _, t in compare.flatten(outputs) if t.is_floating_point())


def mean(scores: Sequence[tuple[float, int]]) -> float:
    """Scores of batches, each with its number of samples -> their mean a sample."""
    return math.fsum(score * count for score, count in scores) / sum(count for _, count in scores)


def _size(value: Any) -> int:
    return int(value.numel()) if isinstance(value, torch.Tensor) else int(getattr(value, "size", 0))


def _line(error: BaseException, function: Callable[..., Any]) -> str:
    """Where in the user's own file it went wrong: the last line of the traceback in the function's file, else the last line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    home = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", None)
    last = next((f for f in reversed(frames) if f.filename == home), frames[-1])
    return f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno}"


def _home(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}" if code else getattr(function, "__name__", "?")
