"""Model + precision + gate -> Sensitivity: eager copies with sets of modules kept in fp32, each judged as verification judges a candidate.

Nothing is compiled: a copy is cast and called, which takes milliseconds where a build takes minutes. What passes here still has to be built and verified; what
fails here fails in every backend that computes as eager does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from gpuopt import converters
from gpuopt.converters import precision as precisions
from gpuopt.converters import quantised
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.result import Count, MetricResult, Sensitivity, Stage
from gpuopt.core.spec import Precision, Transforms
from gpuopt.pipeline import verification
from gpuopt.pipeline.evaluated import Evaluation
from gpuopt.pipeline.facts import ProgressCall
from gpuopt.pipeline.gating import Gate
from gpuopt.pipeline.sensitive import Outcome, Unit, search

_NOTHING = (nn.Dropout, nn.Identity, nn.AlphaDropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
"""Do nothing in eval mode: keeping them in fp32 is no answer."""


def require(model: Model) -> None:
    """Raises Unsupported where modules cannot be cast one by one."""
    if model.form != "module" or not isinstance(model.module, nn.Module):
        raise Unsupported(f"single modules cannot be kept in fp32 in a model of form {model.form!r}", fix="name the source model")


def find(
    model: Model,
    transforms: Transforms,
    precision: Precision,
    gate: Gate,
    *,
    sample: Inputs,
    device: str,
    evaluation: Evaluation | None,
    count: Count | None,
    budget: int,
    seconds: float,
    progress: ProgressCall,
) -> Sensitivity:
    """The smallest set of modules that has to stay in fp32; `transforms` hold for every copy, what they keep already is kept."""
    with _resident(model, device) as near:
        shape = converters.apply(near, None, replace(transforms, keep_fp32=()), sample).module
        wide, dtype = verification.cast, getattr(torch, precision.carrier.dtype)
        given = gate.material.every[0].map(lambda t: wide(t, _dtype(shape), device))
        called, odd = _watched(shape, given)
        roots = _units(shape, called, _shares(shape, count))
        ties = _ties(shape)
        names = {unit.name for unit in _flat(roots)}
        ends = time.monotonic() + seconds
        tried = 0

        def copy_with(kept: Iterable[str]) -> nn.Module:
            keep = replace(transforms, keep_fp32=tuple(dict.fromkeys((*transforms.keep_fp32, *_closed(kept, ties, names)))))
            if precision.is_quantised:
                # By the quantiser itself: a converter refuses a model of which one layer alone is quantised, and that is what a ranking is made of.
                made = converters.apply(near, None, replace(keep, keep_fp32=()), sample).module
                module: nn.Module = precisions.copied(made) if made is near.module else made
                quantised.quantise(module, precision, keep.keep_fp32, refuses=False)
                return module.to(device)
            cast = converters.apply(near, precision, keep, sample).module
            module = precisions.copied(cast) if cast is near.module else cast
            return module.to(device)

        def passes(kept: tuple[str, ...]) -> Outcome:
            nonlocal tried
            tried += 1
            progress(min(1.0, tried / budget), f"trying {precision} with {len(kept)} modules in fp32")
            try:
                with precisions.flags(precision), torch.no_grad():
                    module = copy_with(kept)
                    outcome = _judged(module, gate, evaluation, dtype, device)
                    if not outcome.passed and outcome.error is None:
                        narrow = gate.material.every[0].map(lambda t: verification.cast(t, dtype, device))
                        _, made = _watched(module, narrow)
                        outcome = replace(outcome, culprit=next((name for name in made if name not in odd), None))
                    return outcome
            except (RuntimeError, TypeError, ValueError, UsageError, Unsupported) as error:
                # A set that does not run is one that does not pass: a module whose weights another one reads, dtypes that meet in somebody's own code.
                if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
                    raise
                return Outcome(passed=False)
            finally:
                verification.release(device)

        found = search(roots, passes, budget=budget, stop=lambda: time.monotonic() > ends)
        kept = None if found.kept is None else _closed(found.kept, ties, names)
        note = found.note
        if kept and precision.is_quantised:
            try:
                converters.apply(near, precision, replace(transforms, keep_fp32=(*transforms.keep_fp32, *kept)), sample)
            except Unsupported as error:
                note, kept = f"too much would have to be kept ({', '.join(kept[:5])}): {error.message}", None
        parameters, flops = (None, None) if kept is None else _cost(shape, kept, count)
    if found.kept == ():
        note = f"eager in {precision} passes: what failed is the backend's doing, not the precision's"
    return Sensitivity(
        precision=precision.value,
        kept=kept,
        error=found.outcome.error if found.outcome is not None and kept is not None else None,
        error_before=found.before.error if found.before is not None else None,
        evaluations=found.evaluations,
        is_minimal=found.is_minimal and kept is not None,
        ranking=found.ranking,
        first_nonfinite=found.before.culprit if found.before is not None else None,
        parameters_kept=parameters,
        flops_kept=flops,
        note=note,
    )


# -- judging ------------------------------------------------------------------------------------------------------------------------------------


def _judged(module: nn.Module, gate: Gate, evaluation: Evaluation | None, dtype: torch.dtype, device: str) -> Outcome:
    outputs, raised = [], []
    for index, batch in enumerate(gate.material.every):
        given = batch.map(lambda t: verification.cast(t, dtype, device))
        found, why = verification.attempt(partial(module, *given.args, **given.kwargs), index < gate.material.required)
        outputs.append(found)
        raised.append(why)
    stages, _ = gate.judge(outputs, raised)
    passed, error = all(stage.passed for stage in stages), _error(stages)
    metric = evaluation.judged(module, dtype, device, lambda fraction, note: None) if passed and evaluation is not None else None
    if metric is None:
        return Outcome(passed=passed, error=error)
    lost = _lost(metric)
    return Outcome(passed=metric.passed, error=None if lost is None or error is None else max(error, lost))


def _error(stages: Sequence[Stage]) -> float | None:
    """The worst output's error as a multiple of its limit; None where it cannot be told."""
    worst = 0.0
    for stage in stages:
        if not stage.outputs:
            return None
        for row in stage.outputs:
            if row.rmse is not None and row.limit_rmse:
                worst = max(worst, row.rmse / row.limit_rmse)
            elif not row.passed:
                return None
    return worst if math.isfinite(worst) else None


def _lost(metric: MetricResult) -> float | None:
    """Of the score, as a multiple of what may be lost."""
    if metric.value is None:
        return None
    lost = metric.value - metric.reference if metric.lower_is_better else metric.reference - metric.value
    allowed = abs(metric.limit - metric.reference)
    return max(0.0, lost / allowed) if allowed else (0.0 if lost <= 0 else None)


# -- the model's tree ---------------------------------------------------------------------------------------------------------------------------


class _resident:
    """The model on the device it is judged on, so that copies are made there; as it is where it does not fit twice."""

    def __init__(self, model: Model, device: str) -> None:
        self.model, self.device = model, device

    def __enter__(self) -> Model:
        if self.device == "cpu":
            return self.model
        try:
            return replace(self.model, module=precisions.copied(self.model.module).to(self.device))
        except torch.OutOfMemoryError:
            return self.model

    def __exit__(self, *_: object) -> None:
        verification.release(self.device)


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _watched(module: nn.Module, given: Inputs) -> tuple[set[str], list[str]]:
    """(modules that a call of `module` calls; those of them that make NaN or Inf out of finite inputs, in order of execution)."""
    called: set[str] = set()
    made: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(part: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            called.add(name)
            if name not in made and _nonfinite(out) and not _nonfinite(args) and not _nonfinite(kwargs):
                made.append(name)

        return look

    handles = [part.register_forward_hook(hook(name), with_kwargs=True) for name, part in module.named_modules() if name]
    try:
        with torch.no_grad():
            module(*given.args, **given.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return called, made


def _nonfinite(value: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves(value)
    return any(bool((~torch.isfinite(t)).any()) for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point())


def _units(module: nn.Module, called: set[str], shares: Mapping[str, float]) -> tuple[Unit, ...]:
    """The modules that are called, as a tree; lists and other holders are seen through."""

    def below(part: nn.Module, prefix: str) -> tuple[Unit, ...]:
        found: list[Unit] = []
        for own, child in part.named_children():
            name = f"{prefix}{own}"
            inner = below(child, f"{name}.")
            if name in called and not isinstance(child, _NOTHING):
                found.append(Unit(name=name, children=inner, weight=shares.get(name, 0.0)))
            else:
                found += inner
        return tuple(found)

    return below(module, "")


def _flat(units: Iterable[Unit]) -> Iterable[Unit]:
    for unit in units:
        yield unit
        yield from _flat(unit.children)


def _shares(module: nn.Module, count: Count | None) -> dict[str, float]:
    """What keeping a module costs, as a share of the whole: of the FLOPs where they are counted, else of the parameters."""
    if count is not None and count.flops and any(record.module not in ("", "?") for record in count.records):
        return {name: _flops((name,), count) for name, _ in module.named_modules() if name}
    total = sum(p.numel() for p in module.parameters()) or 1
    return {name: sum(p.numel() for p in part.parameters()) / total for name, part in module.named_modules() if name}


def _cost(module: nn.Module, kept: Sequence[str], count: Count | None) -> tuple[float, float | None]:
    """(share of the parameters, share of the FLOPs) in these modules."""
    parts = dict(module.named_modules())
    inside = {id(p): p.numel() for name in kept for p in parts[name].parameters()}
    total = sum(p.numel() for p in module.parameters()) or 1
    return sum(inside.values()) / total, _flops(kept, count) if count is not None and count.flops else None


def _flops(kept: Sequence[str], count: Count) -> float:
    found = math.fsum(r.flops or 0.0 for r in count.records if any(r.module == name or r.module.startswith(f"{name}.") for name in kept))
    return min(1.0, found / count.flops)


def _ties(module: nn.Module) -> list[set[str]]:
    """Groups of modules that hold the same weight: it cannot be fp32 for one of them alone."""
    owners: dict[Any, set[str]] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if tensor.numel():
            owners.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), set()).add(name.rpartition(".")[0])
    return [group for group in owners.values() if len(group) > 1]


def _closed(kept: Iterable[str], ties: Sequence[set[str]], names: set[str]) -> tuple[str, ...]:
    """The set with every module that shares a weight with one of it."""
    chosen = dict.fromkeys(kept)

    def inside(owner: str) -> bool:
        return any(owner == name or owner.startswith(f"{name}.") for name in chosen)

    grew = True
    while grew:
        grew = False
        for group in ties:
            outside = [owner for owner in sorted(group) if not inside(owner)]
            if outside and len(outside) < len(group):
                for owner in outside:
                    while owner and owner not in names:
                        owner = owner.rpartition(".")[0]
                    if owner and not inside(owner):
                        chosen[owner] = None
                        grew = True
    return tuple(chosen)
