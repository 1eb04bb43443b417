"""Device -> Ceilings measured on it: products by dtype, memory, transfers. Kept in the user's cache, by device and driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from gpuopt.core.errors import OutOfMemory
from gpuopt.core.result import Ceiling, Ceilings, Device
from gpuopt.core.spec import Precision
from gpuopt.devices import cached, info, null, peaks, rates, workloads
from gpuopt.devices.workloads import Shape, Work

Progress = Callable[[float | None, str], None]
"""Called with the share done (0..1) and what is measured next."""

_GPU_GEMMS = ("fp16", "bf16", "tf32", "fp32", "fp64", "fp8", "fp8_row", "int8")
_CPU_GEMMS = ("fp32", "bf16", "fp16", "fp64")
_GPU_SHAPES: tuple[Shape, ...] = ((8192, 8192, 8192), (16384, 8192, 8192), (8192, 8192, 4096))
_GPU_FALLBACKS: tuple[Shape, ...] = ((4096, 4096, 4096), (2048, 2048, 2048), (1024, 1024, 1024))
_CPU_SHAPES: tuple[Shape, ...] = ((2048, 2048, 2048), (1024, 1024, 1024))
_CPU_FALLBACKS: tuple[Shape, ...] = ((512, 512, 512), (256, 256, 256))
_PASSES = ("read", "copy", "inplace")
_GIB = 2**30
_HEAT_S = 0.3
"""An idle GPU clocks down and takes a moment to come back: products for this long before anything counts."""
_BUDGET_S = 0.3
"""For each shape and each pass."""
_LONGEST_CALL_S = {"cuda": 0.2, "cpu": 0.1}
"""A product that would take longer, by the rate of the smallest, is measured on a smaller shape (fp64 on GPUs that hardly have it)."""


def measure(device: Device, *, refresh: bool = False, progress: Progress | None = None) -> Ceilings:
    """Rows of kind `measured`: FLOP/s by dtype; byte/s for `read`, `copy`, `inplace`, their best as `memory`; on a GPU `h2d`, `d2h` and both `_pageable`.

    `fp8` is the better of scaling per tensor and per row, which stand beside it as `fp8_tensor` and `fp8_row`. Under half a minute on a GPU, ten seconds on a CPU;
    from the cache at once unless `refresh`. What could not be measured is absent, with a note. Raises OutOfMemory where others fill the GPU,
    RuntimeError (our bug) for a figure above the data sheet.
    """
    if device.kind == "null":
        return Ceilings(rows=tuple(row for row in null.CEILINGS.rows if row.kind == "measured"))
    key = _key(device)
    found, note = (None, None) if refresh else cached.read(key)
    if found is not None:
        return found
    tell: Progress = progress or (lambda fraction, text: None)
    # The profiled model may run under no_grad or not; these buffers never need gradients.
    with torch.inference_mode():
        fresh = _on_gpu(device, tell) if device.kind == "cuda" else _on_cpu(device, tell)
    refuse_impossible(fresh, device)
    problem = cached.write(key, fresh)
    return replace(fresh, notes=(*fresh.notes, *(text for text in dict.fromkeys((note, problem)) if text)))


def all_ceilings(device: Device, *, refresh: bool = False, progress: Progress | None = None) -> Ceilings:
    """Measured rows, then those of the data sheet."""
    measured, spec = measure(device, refresh=refresh, progress=progress), peaks.spec_ceilings(device)
    return Ceilings(rows=measured.rows + spec.rows, notes=tuple(dict.fromkeys(measured.notes + spec.notes)))


def product(quantity: str, device: Device) -> tuple[Work, Shape]:
    """The product a ceiling of `fp16`, `bf16`, `tf32`, `fp32` or `fp64` is measured with, as large as there is room for now. Raises OutOfMemory."""
    shapes, fallbacks = (_GPU_SHAPES[:1], _GPU_FALLBACKS) if device.kind == "cuda" else (_CPU_SHAPES[1:], _CPU_FALLBACKS)
    try:
        with torch.inference_mode(), workloads.tf32(quantity == "tf32"):
            shape = _worth_it(quantity, device, shapes, fallbacks)[0]
            return workloads.gemm(quantity, shape, device.id), shape
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{device.name}: no memory left beside the model for a {quantity} product", fix="--sustained off does without this ceiling"
        ) from error


def refuse_impossible(measured: Ceilings, device: Device) -> None:
    """Raise RuntimeError for a row above the data sheet: our count or our clock is wrong then, or peaks.toml is."""
    spec, peak = peaks.spec_ceilings(device), peaks.find(device)
    for row in measured.rows:
        quantity = "memory" if row.quantity in _PASSES else row.quantity.partition("_")[0]
        promised = spec.bandwidth("spec") if quantity == "memory" else spec.flops(quantity, "spec")
        if promised is None or peak is None:
            continue
        limit = peak.limit(quantity, promised, device.clocks_mhz.get("sm_max"))
        if row.value > limit:
            raise RuntimeError(
                f"{device.name}: measured {row.value:.4g} {row.unit} for {row.quantity} ({row.source}), above the {limit:.4g} of its data sheet ({peak.key}): "
                "the count, the clock or peaks.toml is wrong"
            )


def _key(device: Device) -> dict[str, str]:
    """Everything the figures depend on that can change under us; threads because a CPU's ceilings are those of the cores torch uses."""
    return {
        "name": device.name,
        "uuid": device.uuid or "",
        "driver": device.driver or "",
        "num_sms": str(device.num_sms or ""),
        "power_limit_w": f"{device.power_limit_w:.0f}" if device.power_limit_w else "",
        "num_cores": str(device.num_cores or ""),
        "num_threads": str(torch.get_num_threads()) if device.kind == "cpu" else "",
        "cache_bytes": str(device.cache_bytes or ""),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
    }


def _on_gpu(device: Device, tell: Progress) -> Ceilings:
    rows: list[Ceiling] = []
    notes: list[str] = []
    steps = len(_GPU_GEMMS) + 2
    with torch.cuda.device(device.id):
        try:
            tell(0.0, "warming up")
            _heat(device)
            for index, quantity in enumerate(_GPU_GEMMS):
                tell((index + 1) / (steps + 1), f"{quantity} products")
                rows += _gemm_row(quantity, device, _GPU_SHAPES, _GPU_FALLBACKS, notes)
            rows += _best_fp8(rows)
            tell(steps / (steps + 1) - 0.05, "memory")
            rows += _pass_rows(device, min(2 * _GIB, _free_bytes(device) // 4))
            tell(steps / (steps + 1), "transfers")
            rows += _transfer_rows(device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"{device.name}: no memory left to measure its ceilings: others hold it", fix="stop them, or choose another --device"
            ) from error
        finally:
            torch.cuda.empty_cache()
    tell(1.0, "")
    return Ceilings(rows=tuple(rows), notes=tuple(notes))


def _on_cpu(device: Device, tell: Progress) -> Ceilings:
    rows: list[Ceiling] = []
    notes: list[str] = []
    steps = len(_CPU_GEMMS) + 1
    for index, quantity in enumerate(_CPU_GEMMS):
        tell(index / steps, f"{quantity} products")
        rows += _gemm_row(quantity, device, _CPU_SHAPES, _CPU_FALLBACKS, notes)
    tell((steps - 1) / steps, "memory")
    # A virtual machine may report the whole socket's cache as its own: eight times that is capped.
    wanted = min(max(8 * (device.cache_bytes or 0), _GIB // 4), _GIB, (device.memory_bytes or 8 * _GIB) // 8)
    rows += _pass_rows(device, wanted)
    tell(1.0, "")
    return Ceilings(rows=tuple(rows), notes=tuple(notes))


def _heat(device: Device) -> None:
    quantity = "fp16" if info.supports(device, Precision.FP16) is None else "fp32"
    shape = next(iter(_fitting((_GPU_SHAPES[0], *_GPU_FALLBACKS), quantity, device)), _GPU_FALLBACKS[-1])
    rates.seconds_a_call(workloads.gemm(quantity, shape, device.id).call, device.id, _HEAT_S)


def _gemm_row(
    quantity: str, device: Device, shapes: tuple[Shape, ...], fallbacks: tuple[Shape, ...], notes: list[str]
) -> Iterator[Ceiling]:
    """The best of the shapes; none, with a note, where the device or this torch cannot."""
    reason = info.supports(device, Precision(quantity.partition("_")[0]))
    if reason is not None:
        notes.append(reason)
        return
    best: tuple[float, Shape] | None = None
    with workloads.tf32(quantity == "tf32"):
        try:
            for shape in _worth_it(quantity, device, shapes, fallbacks):
                work = workloads.gemm(quantity, shape, device.id)
                rate = work.amount / rates.seconds_a_call(work.call, device.id, _BUDGET_S)
                best = max(best, (rate, shape)) if best else (rate, shape)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:  # cuBLAS or torch lacks this product on this device
            notes.append(f"{quantity} could not be measured: {str(error).splitlines()[0]}")
            return
    assert best is not None
    statistic = "median of warm bursts" if device.kind == "cuda" else "fastest of warm blocks"
    m, n, k = best[1]
    name = "fp8_tensor" if quantity == "fp8" else quantity
    yield Ceiling(quantity=name, value=best[0], unit="FLOP/s", kind="measured", source=f"GEMM {m}x{n}x{k}, random data, {statistic}")


def _worth_it(quantity: str, device: Device, shapes: tuple[Shape, ...], fallbacks: tuple[Shape, ...]) -> list[Shape]:
    """Shapes that fit the memory and do not take all day, judged by the smallest of them; else the largest fallback that does, and at last the smallest."""
    smallest = fallbacks[-1]
    probe = workloads.gemm(quantity, smallest, device.id)
    rate = probe.amount / rates.once(probe.call, device.id)

    def is_short(shape: Shape) -> bool:
        return 2.0 * shape[0] * shape[1] * shape[2] / rate <= _LONGEST_CALL_S[device.kind]

    for group in (shapes, *((shape,) for shape in fallbacks)):
        found = [shape for shape in _fitting(group, quantity, device) if is_short(shape)]
        if found:
            return found
    return [smallest]


def _fitting(shapes: tuple[Shape, ...], quantity: str, device: Device) -> list[Shape]:
    room = _free_bytes(device) // 2
    return [shape for shape in shapes if workloads.gemm_bytes(quantity, shape) <= room]


def _free_bytes(device: Device) -> int:
    if device.kind == "cuda":
        return torch.cuda.mem_get_info(device.id)[0] + torch.cuda.memory_reserved(device.id) - torch.cuda.memory_allocated(device.id)
    return (device.memory_bytes or 8 * _GIB) // 2


def _best_fp8(rows: list[Ceiling]) -> list[Ceiling]:
    """`fp8`: what a model can hope for, whichever way it scales."""
    found = [row for row in rows if row.quantity in ("fp8_tensor", "fp8_row")]
    if not found:
        return []
    best = max(found, key=lambda row: row.value)
    way = "per row" if best.quantity == "fp8_row" else "per tensor"
    return [replace(best, quantity="fp8", source=f"{best.source}, scaled {way}")]


def _pass_rows(device: Device, num_bytes: int) -> list[Ceiling]:
    rows = [
        _bytes_row(name, work, rates.seconds_a_call(work.call, device.id, _BUDGET_S), f"buffers of {num_bytes / _GIB:.2g} GiB")
        for name, work in workloads.passes(num_bytes, device.id).items()
    ]
    best = max(rows, key=lambda row: row.value)
    return [*rows, replace(best, quantity="memory", source=f"best of read, copy and in-place: {best.quantity}, {best.source}")]


def _transfer_rows(device: Device) -> list[Ceiling]:
    num_bytes = _GIB // 4
    rows = []
    for name, work in workloads.transfers(num_bytes, device.id).items():
        time_of = rates.wall_seconds_a_call if name.endswith("_pageable") else rates.seconds_a_call
        memory = "pageable" if name.endswith("_pageable") else "pinned"
        rows.append(_bytes_row(name, work, time_of(work.call, device.id, _BUDGET_S), f"{memory} blocks of 256 MiB"))
    return rows


def _bytes_row(quantity: str, work: Work, seconds: float, source: str) -> Ceiling:
    return Ceiling(quantity=quantity, value=work.amount / seconds, unit="byte/s", kind="measured", source=source)
