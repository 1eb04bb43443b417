"""A session's live model, inputs, trace and runner -> the doctor's Evidence. The only place that gathers it; rules only read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gpuopt.accuracy import compare
from gpuopt.core.live import Inputs, Model, Runner
from gpuopt.core.result import Count, Device, OpRecord, Waterfall
from gpuopt.core.spec import Candidate, Precision
from gpuopt.core.trace import Trace
from gpuopt.doctor.evidence import Compiled, Evidence
from gpuopt.pipeline import environment, traits

MEMORY_KEYS = (
    "num_alloc_retries",
    "num_ooms",
    "num_sync_all_streams",
    "allocated_bytes.all.peak",
    "reserved_bytes.all.peak",
    "inactive_split_bytes.all.current",
    "inactive_split_bytes.all.peak",
)


@dataclass(slots=True)
class Seen:
    """What a session's steps leave for the doctor as they go."""

    wall_ms: float | None = None
    trace: Trace | None = None
    records: tuple[OpRecord, ...] = ()
    waterfall: Waterfall | None = None
    peak_bytes: int | None = None
    throttled_ms: Mapping[str, float] = field(default_factory=dict)
    measured_ms: float | None = None
    """Over how long throttling was counted."""
    failure: BaseException | None = None
    """What the build, or the first call in it, raised."""
    batch_curve: Mapping[int, float] = field(default_factory=dict)
    """Batch -> milliseconds a call, where larger batches were tried."""
    recompiles: tuple[tuple[str, str], ...] = ()
    """What torch.compile compiles again at other sizes: (function with its line, guard)."""
    own_flags: Mapping[str, bool] = field(default_factory=dict)
    """Switches as the user's own code left them, before this candidate's precision set them."""


def of_machine(device: Device | None) -> Evidence:
    """What can be said without a model: versions, driver, device."""
    found = environment.describe()
    return Evidence(device=device, environment=found, packages=found.packages, flags=_flags(Precision.FP32))


def of_candidate(
    *,
    candidate: Candidate,
    model: Model,
    inputs: Inputs | None,
    given: Inputs | None,
    precision: Precision,
    device: Device,
    transforms: tuple[str, ...],
    runner: Runner | None,
    count: Count | None,
    seen: Seen,
) -> Evidence:
    """Everything a session knows. `inputs` as the user gave them, `given` as the runner takes them."""
    found = environment.describe()
    working = runner if seen.failure is None else None
    outputs = _outputs(working, given) if working is not None and given is not None else None
    module = model.module if isinstance(model.module, nn.Module) else None
    # A module that is run as it is was asked for nothing: its tensors keep their own dtypes.
    asked = None if candidate.precision is None and module is not None else precision
    return Evidence(
        device=device,
        environment=found,
        packages=found.packages,
        model=model.name,
        module=module,
        inputs=inputs,
        backend=candidate.backend.name,
        preset=candidate.backend.preset,
        precision=asked.value if asked is not None else None,
        transforms=transforms,
        rewrites=traits.rewrites_of(module) if module is not None and model.form == "module" else {},
        input_mode=candidate.input_mode,
        batch=inputs.batch if inputs is not None else 1,
        flags={
            **_flags(precision),
            **{f"own_{name}": value for name, value in seen.own_flags.items()},
            "was_training": any("training mode" in note for note in model.notes),
        },
        wall_ms=seen.wall_ms,
        trace=seen.trace,
        records=seen.records,
        count=count,
        waterfall=seen.waterfall,
        audit=working.audit() if working is not None else None,
        compiled=_compiled(working, candidate.backend.preset, seen.recompiles),
        peak_bytes=seen.peak_bytes,
        throttled_ms=seen.throttled_ms,
        measured_ms=seen.measured_ms,
        memory_stats=_memory_stats(device),
        batch_curve=seen.batch_curve,
        outputs=outputs,
        first_nonfinite=_first_nonfinite(module, given, asked, outputs),
        failure=seen.failure,
    )


def switches() -> dict[str, bool]:
    """TF32 as this process has it now: torch's defaults (products off, cuDNN on), or what the user's code set when it was imported."""
    cudnn: Any = torch.backends.cudnn
    return {"matmul_tf32": torch.get_float32_matmul_precision() != "highest", "cudnn_tf32": cudnn.conv.fp32_precision == "tf32"}


def _flags(precision: Precision) -> dict[str, Any]:
    """Switches as they are while the candidate runs."""
    return {
        "matmul_tf32": precision is Precision.TF32,
        "cudnn_tf32": precision is Precision.TF32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        # True of these runs: every runner turns it off. A user's own program may not, and is asked itself (`core.script.ModelCalls.num_grad_calls`).
        "grad_enabled": False,
        "gpu_available": torch.cuda.is_available(),
    }


def _outputs(runner: Runner, given: Inputs) -> Any:
    return dict(compare.flatten(runner(*given.args, **given.kwargs)))


def _compiled(runner: Runner | None, preset: str | None, recompiles: tuple[tuple[str, str], ...]) -> Compiled | None:
    """What torch.compile told a runner that went through it, and at other sizes; None for one that did not."""
    told: Callable[[], Mapping[str, Any]] | None = getattr(runner, "compiled", None)
    if told is None:
        return None
    found = Compiled(preset=preset, **told())
    return replace(found, recompiles=(*found.recompiles, *recompiles))


def _memory_stats(device: Device) -> dict[str, float]:
    if device.kind != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device.id)
    return {key: float(stats[key]) for key in MEMORY_KEYS if key in stats}


def _first_nonfinite(module: nn.Module | None, given: Inputs | None, precision: Precision | None, outputs: Any) -> str | None:
    """The first module, in order of execution, whose output holds NaN or Inf though none of its inputs does; looked for only where the outputs do."""
    if module is None or given is None or outputs is None or not any(_nonfinite(value) for value in outputs.values()):
        return None
    found: list[str] = []
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def look(part: nn.Module, args: Any, out: Any) -> None:
            if not found and _nonfinite(out) and not any(_nonfinite(a) for a in args):
                found.append(name)

        return look

    dtype = getattr(torch, precision.carrier.dtype) if precision is not None else None
    twin = copy.deepcopy(module)  # the module itself is evidence, as it was loaded
    twin = twin.to(dtype) if dtype is not None and dtype.is_floating_point else twin
    where = next((t.device for t in (*given.args, *given.kwargs.values()) if isinstance(t, torch.Tensor)), torch.device("cpu"))
    twin = twin.to(where)
    try:
        handles = [part.register_forward_hook(hook(name)) for name, part in twin.named_modules() if name]
        with torch.no_grad():
            twin(*given.args, **given.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _nonfinite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and not bool(torch.isfinite(value).all())
    if isinstance(value, list | tuple):
        return any(_nonfinite(item) for item in value)
    if isinstance(value, Mapping):
        return any(_nonfinite(item) for item in value.values())
    return False
