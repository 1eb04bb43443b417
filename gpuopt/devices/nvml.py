"""CUDA device of torch -> facts and counters of NVML. Every function gives None (or nothing) for what the driver does not tell, as under MIG, vGPU or WSL."""

from __future__ import annotations

from functools import cache
from typing import Any

import pynvml

EVENT_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
    0x100: "display clocks",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons (called ThrottleReasons before driver 535): nvml.h, nvmlClocksEventReason*."""

_VIOLATIONS = {"power": "NVML_PERF_POLICY_POWER", "thermal": "NVML_PERF_POLICY_THERMAL"}
_FIELDS = {
    "software thermal": "NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN",
    "hardware thermal": "NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN",
    "power brake": "NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN",
}
_DEFAULT_FIELD_IDS = {"software thermal": 269, "hardware thermal": 270, "power brake": 271}
"""For releases of nvidia-ml-py that lack the names; the driver answers NOT_SUPPORTED where it does not know the number."""


def start() -> str | None:
    """Open NVML; None when it is open, else why not."""
    return _start()


@cache
def _start() -> str | None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"{error}"
    return None


def handle_of(uuid: str | None) -> Any:
    """NVML's handle of a GPU or MIG slice by its UUID, with or without its prefix; None where NVML does not know it.

    By UUID and never by index: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER renumber torch's devices, not NVML's.
    """
    if uuid is None or start() is not None:
        return None
    bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
    for prefix in ("GPU-", "MIG-"):
        handle = ask("nvmlDeviceGetHandleByUUID", prefix + bare)
        if handle is not None:
            return handle
    return None


def ask(function: str, *args: Any) -> Any:
    """What pynvml's `function` answers, or None where this driver, GPU or release of nvidia-ml-py does not know."""
    try:
        return getattr(pynvml, function)(*args)
    except (pynvml.NVMLError, AttributeError):  # AttributeError: a function newer than the installed nvidia-ml-py
        return None


def driver() -> str | None:
    """Version of the NVIDIA driver, `580.82.07`."""
    return None if start() is not None else _text(ask("nvmlSystemGetDriverVersion"))


def cuda_of_driver() -> tuple[int, int] | None:
    """Newest CUDA version the driver runs, (13, 0)."""
    if start() is not None:
        return None
    number = ask("nvmlSystemGetCudaDriverVersion_v2")
    return None if number is None else (number // 1000, number % 1000 // 10)


def num_gpus() -> int | None:
    """GPUs the driver has, visible to CUDA or not."""
    return None if start() is not None else _int(ask("nvmlDeviceGetCount"))


def clocks_mhz(handle: Any) -> dict[str, int]:
    """`sm`, `memory` now and `sm_max`, `memory_max`."""
    found: dict[str, int] = {}
    for name, kind in (("sm", pynvml.NVML_CLOCK_SM), ("memory", pynvml.NVML_CLOCK_MEM)):
        now = ask("nvmlDeviceGetClockInfo", handle, kind)
        top = ask("nvmlDeviceGetMaxClockInfo", handle, kind)
        found |= {name: now} if now is not None else {}
        found |= {f"{name}_max": top} if top is not None else {}
    return found


def power_limit_w(handle: Any) -> float | None:
    """The limit in force."""
    milliwatts = ask("nvmlDeviceGetEnforcedPowerLimit", handle)
    return None if milliwatts is None else milliwatts / 1000


def temperature_c(handle: Any) -> int | None:
    """Of the GPU core."""
    return _int(ask("nvmlDeviceGetTemperature", handle, pynvml.NVML_TEMPERATURE_GPU))


def event_reasons(handle: Any) -> tuple[str, ...]:
    """Why the clocks are where they are at this instant; `idle` among them on an idle GPU."""
    bits = ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
    if bits is None:
        bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    return tuple(name for bit, name in EVENT_REASONS.items() if bits and bits & bit)


def process_bytes(handle: Any) -> dict[int, int | None] | None:
    """Process id -> bytes it holds (None where not told), computing and drawing processes alike; None where the driver does not say.

    In a container the ids are the host's, or the list is empty.
    """
    compute = ask("nvmlDeviceGetComputeRunningProcesses", handle)
    graphics = ask("nvmlDeviceGetGraphicsRunningProcesses", handle)
    if compute is None and graphics is None:
        return None
    return {process.pid: process.usedGpuMemory for process in [*(graphics or []), *(compute or [])]}


def used_bytes(handle: Any) -> int | None:
    """Memory in use on the GPU, by everyone."""
    memory = ask("nvmlDeviceGetMemoryInfo", handle)
    return None if memory is None else int(memory.used)


def free_bytes(handle: Any) -> int | None:
    """Memory that nobody holds on the GPU, what the driver keeps for itself aside."""
    memory = ask("nvmlDeviceGetMemoryInfo", handle)
    return None if memory is None else int(memory.free)


def energy_j(handle: Any) -> float | None:
    """Joules since the driver was loaded (Volta and later)."""
    millijoules = ask("nvmlDeviceGetTotalEnergyConsumption", handle)
    return None if millijoules is None else millijoules / 1000


def throttled_ms(handle: Any) -> dict[str, float]:
    """Reason -> milliseconds lost to it since the driver was loaded; a reason the driver does not count is absent.

    `power` is normal under big GEMMs; `thermal` and `power brake` are not. NVML counts nanoseconds (nvml.h, nvmlViolationTime_t and the field values).
    """
    found: dict[str, float] = {}
    for reason, name in _VIOLATIONS.items():
        status = ask("nvmlDeviceGetViolationStatus", handle, getattr(pynvml, name))
        if status is not None:
            found[reason] = status.violationTime / 1e6
    for reason, name in _FIELDS.items():
        field_id = getattr(pynvml, name, _DEFAULT_FIELD_IDS[reason])
        values = ask("nvmlDeviceGetFieldValues", handle, [field_id])
        if values and values[0].nvmlReturn == pynvml.NVML_SUCCESS:
            found[reason] = values[0].value.ullVal / 1e6
    return found


def _int(value: Any) -> int | None:
    return None if value is None else int(value)


def _text(value: str | bytes | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
