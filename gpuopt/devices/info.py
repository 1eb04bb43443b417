"""Device id -> what it is, whether it can be used, and its counters. `cpu`, `cuda`, `cuda:1` and `null` are devices."""

from __future__ import annotations

import ctypes
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
from gpuopt.trust.policy import printable

_NEEDED_CAPABILITY = {
    Precision.TF32: (8, 0),
    Precision.BF16: (8, 0),
    Precision.FP8: (8, 9),
    Precision.FP16: (7, 0),
    Precision.INT8: (7, 5),
    Precision.W8: (8, 0),
    Precision.W4: (8, 0),
}
"""First compute capability with tensor cores for it (CUDA programming guide, table of features); w8 and w4 multiply in bf16."""


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
            free_bytes=cpu.free_bytes(),
            cache_bytes=cpu.cache_bytes(),
            notes=_why_not_the_gpu(),
        )
    return _cuda(resolved)


def supports(device: Device, precision: Precision) -> str | None:
    """None where the device computes in `precision`, else the reason why not."""
    if device.kind == "null":
        return None
    if device.kind == "cpu":
        return "TF32 is a mode of NVIDIA tensor cores; a CPU computes fp32" if precision is Precision.TF32 else None
    needed = _NEEDED_CAPABILITY.get(precision)
    if needed is None or device.capability is None or _pair(device.capability) >= needed:
        return None
    return f"{precision} needs compute capability {needed[0]}.{needed[1]}, {device.name} has {device.capability}"


def emulates(device: Device, precision: Precision) -> str | None:
    """What to know about times where the device gives a precision's numbers without kernels of its own for it; None where it has those."""
    if device.kind != "cpu" or not precision.is_quantised:
        return None
    return f"on a CPU {precision} is for checking numbers: its products run through wider kernels and are slow, so its times say nothing about a GPU"


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


def memory_held(device_id: str) -> int | None:
    """Bytes in use on a GPU, by anyone, of those that CUDA counts: NVML's `used` has what the driver keeps for itself as well (0.6 GiB of an H200). None: NVML does not say."""
    handle = _handle(device_id)
    free = None if handle is None else nvml.free_bytes(handle)
    return None if free is None else max(0, int(torch.cuda.get_device_properties(device_id).total_memory) - free)


def _cuda(device_id: str) -> Device:
    properties = torch.cuda.get_device_properties(device_id)
    uuid = f"GPU-{str(properties.uuid).removeprefix('GPU-')}"
    handle = nvml.handle_of(uuid)
    processes = None if handle is None else nvml.process_bytes(handle)
    used = None if handle is None else nvml.used_bytes(handle)
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
        free_bytes=None if used is None else max(0, properties.total_memory - used),
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


VISIBLE = "CUDA_VISIBLE_DEVICES"
_INSTALL = "https://pytorch.org/get-started/locally"
_TEGRA = frozenset({(5, 3), (6, 2), (7, 2), (8, 7), (10, 1)})
"""Jetson's and DRIVE's own capabilities: machine code for a desktop GPU does not run there, nor theirs on a desktop (CUDA guide, binary compatibility)."""

Problem = tuple[str, str]
"""(reason, fix)"""


def _why_not_the_gpu() -> tuple[str, ...]:
    """A note for a run on the CPU of a machine whose GPU cannot be used, unless somebody hid it: `auto` must not fall back in silence."""
    if not nvml.num_gpus():
        return ()
    problem = _why_no_cuda() or _why_not_index(0)
    if problem is None or _is_hidden(os.environ.get(VISIBLE)):
        return ()
    return (f"this machine has an NVIDIA GPU that is not used: {problem[0]} ({problem[1]})",)


def _why_no_cuda() -> Problem | None:
    """Why torch sees no GPU at all; None where it sees one. Nothing runs on a GPU to find out."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA", f"install a CUDA build of torch: {_INSTALL}"
    with warnings.catch_warnings():
        # torch says there what is said below, with a remedy.
        warnings.simplefilter("ignore")
        if torch.cuda.is_available() and torch.cuda.device_count() > 0:
            return None
    newest, needed = _cuda_of_driver(), _pair(torch.version.cuda)
    if newest is not None and newest < (needed[0], 0):  # within a major version any driver will do (CUDA's minor version compatibility)
        return (
            f"the NVIDIA driver ({nvml.driver() or 'of unknown version'}) runs CUDA up to {newest[0]}.{newest[1]}, "
            f"this torch ({torch.__version__}) needs {torch.version.cuda}",
            f"update the NVIDIA driver to one for CUDA {needed[0]}, or install a torch built for CUDA {newest[0]}: {_INSTALL}",
        )
    problem = nvml.start()
    if problem is not None and newest is None:
        return f"no NVIDIA driver answers ({problem})", "install the NVIDIA driver, or use --device cpu"
    there = nvml.num_gpus()
    if there == 0:
        return "the NVIDIA driver finds no GPU", "use --device cpu"
    return _why_none_visible(os.environ.get(VISIBLE), there) or (
        f"torch cannot start CUDA although the driver answers: {_torchs_own_words()}",
        "nvidia-smi shows the state of the GPUs, and a restart clears a hung one; --device cpu does without",
    )


def _is_hidden(value: str | None) -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every GPU the way people do it on purpose: empty, or -1."""
    first = None if value is None else value.partition(",")[0].strip()
    return first is not None and (not first or first.startswith("-"))


def _why_none_visible(value: str | None, there: int | None) -> Problem | None:
    """What is wrong with CUDA_VISIBLE_DEVICES where it leaves nothing visible. CUDA stops at its first wrong entry, and a double one voids them all."""
    if value is None:
        return None
    shown = f"{VISIBLE}={printable(value)!r}"
    names = "" if there is None else ": 0" if there == 1 else f": 0 to {there - 1}"
    fix = f"unset {VISIBLE}, or name GPUs of this machine{names} (nvidia-smi -L lists them)"
    entries = [entry.strip() for entry in value.split(",")]
    if not any(entries):
        return f"{shown} is empty, which hides every GPU", fix
    if _is_hidden(value):
        return f"{shown} hides every GPU", fix
    named = [str(int(entry)) if entry.isdecimal() else entry for entry in entries if entry]
    if len(set(named)) < len(named):
        return f"{shown} names a GPU twice, and CUDA then shows none", fix
    if named[0].isdecimal() and (there is None or int(named[0]) < there):
        return None  # a GPU that is there: something else is wrong
    return f"{shown} names no GPU of this machine" + ("" if there is None else f" ({there} there)"), fix


def _why_not_index(index: int) -> Problem | None:
    """Why this one GPU cannot be used, though there are GPUs."""
    count = torch.cuda.device_count()
    if index >= count:
        value = os.environ.get(VISIBLE)
        usable = "--device cuda:0" if count == 1 else f"--device cuda:0 to cuda:{count - 1}"
        gpus = f"{count} GPU{'s' if count != 1 else ''}"
        if value is None:
            return f"there {'is' if count == 1 else 'are'} {gpus}, numbered from 0", usable
        there = nvml.num_gpus()
        return (
            f"{VISIBLE}={printable(value)!r} shows {gpus}{'' if there is None else f' of {there}'}, numbered from 0 in that order",
            f"{usable}, or correct {VISIBLE}",
        )
    capability = torch.cuda.get_device_capability(index)
    arches = torch.cuda.get_arch_list()
    if not arches or any(_runs_as_built(arch, capability) for arch in arches):
        return None
    name = torch.cuda.get_device_properties(f"cuda:{index}").name
    gpu = f"{name} is sm_{capability[0]}{capability[1]}"
    newest, needed = _cuda_of_driver(), _pair(str(torch.version.cuda))
    if any(_is_compiled_on(arch, capability) for arch in arches):
        if newest is None or newest >= needed:
            return None
        # Only PTX fits, and a driver compiles no PTX of a newer CUDA than its own (CUDA_ERROR_UNSUPPORTED_PTX_VERSION at the first kernel).
        return (
            f"this torch ({torch.__version__}) has no machine code for {gpu}, and the driver's compiler knows CUDA {newest[0]}.{newest[1]}, "
            f"not {torch.version.cuda}",
            f"update the NVIDIA driver to one for CUDA {torch.version.cuda}, or install a torch that lists sm_{capability[0]}{capability[1]}: {_INSTALL}",
        )
    built = [found[1] for arch in arches if (found := _arch(arch))]
    other = "a newer torch" if built and capability > max(built) else "an older torch, or one for an older CUDA"
    return (
        f"this torch ({torch.__version__}) is built for {', '.join(arches)}; {gpu}",
        f"install {other}, that lists sm_{capability[0]}{capability[1]} in torch.cuda.get_arch_list(): {_INSTALL}",
    )


def _cuda_of_driver() -> tuple[int, int] | None:
    """Newest CUDA version of the driver, by NVML, else by the driver itself: containers without its tools have no NVML."""
    return nvml.cuda_of_driver() or _version_in("libcuda.so.1")


def _version_in(library: str) -> tuple[int, int] | None:
    """What cuDriverGetVersion answers, the one call that starts nothing; None where there is no driver."""
    number = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):  # no such library, or another one of that name
        return None
    return (number.value // 1000, number.value % 1000 // 10) if not failed and number.value else None


def _torchs_own_words() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        return printable((str(error).splitlines() or [""])[0], limit=300) or type(error).__name__
    return "it does not say why"


def _arch(text: str) -> tuple[str, tuple[int, int], str] | None:
    """`sm_90a` -> ("sm", (9, 0), "a"); None for anything else, such as AMD's names."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", text)
    return None if match is None else (match[1], (int(match[2]), int(match[3])), match[4])


def _runs_as_built(text: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on its own capability and on later minor versions of the same major one; `sm_90a` only on its own, and so with Tegra."""
    arch = _arch(text)
    if arch is None or arch[0] != "sm":
        return False
    _, built, suffix = arch
    if built == capability:
        return True
    same_kind = built not in _TEGRA and capability not in _TEGRA
    return suffix != "a" and same_kind and built[0] == capability[0] and built < capability


def _is_compiled_on(text: str, capability: tuple[int, int]) -> bool:
    """PTX (`compute_80`) is compiled by the driver for anything later; `compute_100f` for its own family, `compute_90a` for its own capability alone."""
    arch = _arch(text)
    if arch is None or arch[0] != "compute":
        return False
    _, built, suffix = arch
    if suffix == "a" or built > capability:
        return built == capability
    return suffix != "f" or built[0] == capability[0]


def _pair(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor.partition(".")[0] or 0)
