"""Device id -> what it is, whether it can be used, and its counters. `cpu`, `cuda`, `cuda:1` and `null` are devices."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpuopt.core.errors import Unavailable, UsageError
from gpuopt.core.result import Device
from gpuopt.core.spec import Precision
from gpuopt.devices import cpu, null, nvml, peaks

_NEEDED_CAPABILITY = {Precision.TF32: (8, 0), Precision.BF16: (8, 0), Precision.FP8: (8, 9), Precision.FP16: (7, 0), Precision.INT8: (7, 5)}
"""First compute capability with tensor cores for it (CUDA programming guide, table of features)."""


def resolve(text: str | None) -> str:
    """`auto` or None -> `cuda:0` where there is one, else `cpu`; a name -> the same device, checked. `cuda` becomes `cuda:0`.

    Raises UsageError for a text that is no device, Unavailable with the reason for one that cannot be used here.
    """
    wanted = (text or "auto").strip().lower()
    if wanted == "auto":
        return "cuda:0" if _why_no_cuda() is None and _why_not_index(0) is None else "cpu"
    if wanted in ("cpu", "null"):
        return wanted
    match = re.fullmatch(r"cuda(?::(\d+))?", wanted)
    if match is None:
        raise UsageError(f"{text!r} is not a device", fix="--device cpu, cuda or cuda:1")
    index = int(match[1] or 0)
    problem = _why_no_cuda() or _why_not_index(index)
    if problem is not None:
        reason, fix = problem
        raise Unavailable(f"device {wanted} cannot be used: {reason}", fix=fix)
    return f"cuda:{index}"


def describe(device_id: str) -> Device:
    """What the device is. Raises like `resolve`."""
    resolved = resolve(device_id)
    if resolved == "null":
        return null.DEVICE
    if resolved == "cpu":
        return Device(
            id="cpu",
            name=cpu.name(),
            kind="cpu",
            num_cores=cpu.num_cores(),
            memory_bytes=cpu.memory_bytes(),
            cache_bytes=cpu.cache_bytes(),
        )
    return _cuda(resolved)


def supports(device: Device, precision: Precision) -> str | None:
    """None where the device computes in `precision`, else the reason why not."""
    if device.kind == "null":
        return None
    if device.kind == "cpu":
        return {
            Precision.TF32: "TF32 is a mode of NVIDIA tensor cores; a CPU computes fp32",
            Precision.FP8: "no CPU kernel computes in fp8",
        }.get(precision)
    needed = _NEEDED_CAPABILITY.get(precision)
    if needed is None or device.capability is None or _pair(device.capability) >= needed:
        return None
    return f"{precision} needs compute capability {needed[0]}.{needed[1]}, {device.name} has {device.capability}"


def energy_counter(device_id: str) -> Callable[[], float | None]:
    """A function that reads joules used since some moment in the past; it gives None where nothing counts them."""
    handle = _handle(device_id)
    return (lambda: None) if handle is None else (lambda: nvml.energy_j(handle))


def throttle_counters(device_id: str) -> dict[str, float]:
    """Reason -> milliseconds throttled since the driver was loaded: read before and after, the difference is what a run lost. Empty where nothing counts."""
    handle = _handle(device_id)
    return {} if handle is None else nvml.throttled_ms(handle)


def memory_used(device_id: str) -> int | None:
    """Bytes this process holds on a GPU, by NVML, else all bytes in use there (in containers NVML does not know our process id); on a CPU, resident memory."""
    if device_id == "cpu":
        return cpu.resident_bytes()
    handle = _handle(device_id)
    if handle is None:
        return None
    own = (nvml.process_bytes(handle) or {}).get(os.getpid())
    return own if own is not None else nvml.used_bytes(handle)


def _cuda(device_id: str) -> Device:
    properties = torch.cuda.get_device_properties(device_id)
    uuid = f"GPU-{str(properties.uuid).removeprefix('GPU-')}"
    handle = nvml.handle_of(uuid)
    processes = None if handle is None else nvml.process_bytes(handle)
    notes = (
        []
        if handle is not None
        else [f"NVML does not answer for this GPU ({nvml.start() or 'unknown UUID'}): no clocks, power or temperature"]
    )
    device = Device(
        id=device_id,
        name=properties.name,
        kind="cuda",
        uuid=uuid,
        capability=f"{properties.major}.{properties.minor}",
        num_sms=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        cache_bytes=getattr(properties, "L2_cache_size", None),
        driver=nvml.driver(),
        clocks_mhz={} if handle is None else nvml.clocks_mhz(handle),
        power_limit_w=None if handle is None else nvml.power_limit_w(handle),
        temperature_c=None if handle is None else nvml.temperature_c(handle),
        throttle_reasons=() if handle is None else nvml.event_reasons(handle),
        other_processes=None if processes is None else sum(not _is_ours(pid) for pid in processes),
    )
    return replace(device, notes=(*notes, *peaks.spec_ceilings(device).notes))


def _handle(device_id: str) -> Any:
    """NVML's handle of torch's device; None for anything but a CUDA device that NVML knows."""
    if not device_id.startswith("cuda"):
        return None
    return nvml.handle_of(str(torch.cuda.get_device_properties(device_id).uuid))


def _is_ours(pid: int) -> bool:
    """This process or one that it started, directly or not."""
    seen: set[int] = set()
    while pid > 1 and pid not in seen:
        if pid == os.getpid():
            return True
        seen.add(pid)
        try:
            # The name in the second field may hold spaces and brackets: count from its last bracket.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return False
    return False


def _why_no_cuda() -> tuple[str, str] | None:
    """(reason, fix) where torch sees no GPU at all; None where it sees one."""
    if torch.version.cuda is None:
        return (
            f"this torch ({torch.__version__}) is built without CUDA",
            "install a CUDA build of torch: https://pytorch.org/get-started/locally",
        )
    with warnings.catch_warnings():
        # torch says there what is said below, with a remedy.
        warnings.simplefilter("ignore")
        if torch.cuda.is_available() and torch.cuda.device_count() > 0:
            return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    problem = nvml.start()
    if problem is not None:
        return f"no NVIDIA driver answers ({problem})", "install the NVIDIA driver, or use --device cpu"
    if not nvml.num_gpus():
        return "the NVIDIA driver finds no GPU", "use --device cpu"
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        if not names:
            return "CUDA_VISIBLE_DEVICES is empty, which hides every GPU", "unset CUDA_VISIBLE_DEVICES"
        if len(set(names)) < len(names):
            return f"CUDA_VISIBLE_DEVICES={visible} names a GPU twice", "name each GPU once"
        return (
            f"CUDA_VISIBLE_DEVICES={visible} names no GPU of this machine ({nvml.num_gpus()} there)",
            "correct or unset CUDA_VISIBLE_DEVICES",
        )
    newest, needed = nvml.cuda_of_driver(), _pair(torch.version.cuda)
    if newest is not None and newest < (needed[0], 0):
        return (
            f"the driver ({nvml.driver()}) runs CUDA up to {newest[0]}.{newest[1]}, this torch needs {torch.version.cuda}",
            "update the NVIDIA driver, or install a torch built for an older CUDA",
        )
    return "torch cannot start CUDA although the driver answers", "python -c 'import torch; torch.cuda.init()' shows its message"


def _why_not_index(index: int) -> tuple[str, str] | None:
    """(reason, fix) where this one GPU cannot be used, though there are GPUs."""
    count = torch.cuda.device_count()
    if index >= count:
        return (
            f"there {'is' if count == 1 else 'are'} {count} GPU{'s' if count != 1 else ''}, numbered from 0",
            f"--device cuda:{count - 1}",
        )
    capability = torch.cuda.get_device_capability(index)
    arches = torch.cuda.get_arch_list()
    if arches and not _runs_on(arches, capability):
        return (
            f"this torch is built for {', '.join(arches)}, the GPU is sm_{capability[0]}{capability[1]}",
            "install a torch build for this GPU: https://pytorch.org/get-started/locally",
        )
    return None


def _runs_on(arches: list[str], capability: tuple[int, int]) -> bool:
    """Machine code runs on the same major and any later minor version, PTX (`compute_`) on anything later; `sm_90a` only on its own."""
    for arch in arches:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if match is None:
            continue
        kind, built, exact = match[1], (int(match[2]), int(match[3])), match[4] == "a"
        if built == capability:
            return True
        if not exact and built < capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def _pair(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor.partition(".")[0] or 0)
