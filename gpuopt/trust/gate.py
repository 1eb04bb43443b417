"""A model file -> live objects. The only file that opens one: what it does not admit, nothing here runs.

Every function checks first, opens second, and never retries at a lower level of safety. There is no `assert` in this file: `python -O` removes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import pickle
import platform
import shutil
import stat
import sys
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpuopt.core.errors import BadInput, GpuoptError, Unavailable, Unsupported, Untrusted, UsageError
from gpuopt.trust import archives, consent, packages, pickles, policy
from gpuopt.trust.policy import Format, printable

MAX_EXPANDED_BYTES = 64 * 2**20
"""A few buffers of real models are saved expanded (stride 0); beyond this, a small file asks for memory that it does not fill."""
MIN_TORCH = (2, 10)
"""First release with the fixes of CVE-2026-24747 (heap corruption inside weights_only)."""
_LOAD_SLACK_BYTES = 4 * 2**30
SAFE_ATTENTION = frozenset({None, "eager", "sdpa", "flex_attention"})
"""Attention of transformers that is its own code; for any other name it may fetch a kernel from its hub and run it."""
_AGAIN = "copy or download the file again, and compare its sha256 with the source"


# --- consent -----------------------------------------------------------------------------------------------------------------------------------


def require_consent(path: Path, found: Format, trust: tuple[str, ...], *, signed_by_us: bool = False, reasons: Sequence[str] = ()) -> None:
    """Return when the file at `path` may run its code; raise Untrusted with the reasons and the hash to trust otherwise."""
    if signed_by_us:
        return
    sha256 = consent.sha256_of(path)
    if consent.is_trusted(sha256, trust):
        return
    listed = "; ".join(printable(reason) for reason in reasons[:8])
    more = f" (and {len(reasons) - 8} more)" if len(reasons) > 8 else ""
    why = f"{listed}{more}" if listed else policy.sentence(found)
    raise Untrusted(
        f"{printable(path.name)} is {policy.POLICY[found].is_a} that nobody has trusted: {why}",
        fix=f"if you know who made it: gpuopt trust {printable(str(path), limit=300)}   (or --trust sha256:{sha256}); otherwise ask for .safetensors",
    )


# --- pickles -----------------------------------------------------------------------------------------------------------------------------------


def load_checkpoint(path: Path | str, trust: tuple[str, ...] = ()) -> Any:
    """What torch.save wrote, on the CPU: tensors, or a module whose every global is admitted; anything else only with consent.

    Raises Untrusted naming the globals, BadInput when the file is damaged or lies about its sizes.
    """
    path = Path(path)
    found = policy.classify(path)
    if found is Format.PICKLE:
        with path.open("rb") as file:
            names = pickles.scan(file).names
        require_consent(path, found, trust, reasons=[f"names {name}" for name in sorted(names)])
        with _damage(path), path.open("rb") as file:
            return pickle.load(file)  # noqa: S301 - the user trusted this very hash
    if found is not Format.CHECKPOINT:
        raise BadInput(f"{path.name} is {policy.POLICY[found].is_a}, not a torch checkpoint", fix="name it without --arch")
    verdict = inspect_checkpoint(path)
    if verdict.refused:
        require_consent(path, found, trust, reasons=verdict.refused)
        with _damage(path):
            return torch.load(path, map_location="cpu", weights_only=False)  # the user trusted this very hash
    return _load_restricted(path, verdict)


def load_tensors(path: Path | str) -> Any:
    """A checkpoint of tensors and plain containers alone, on the CPU. Raises Untrusted when it names anything else, BadInput when it is damaged."""
    path = Path(path)
    found = policy.classify(path)
    if found is not Format.CHECKPOINT:
        raise BadInput(
            f"{path.name} is {policy.POLICY[found].is_a}, not a torch checkpoint", fix="name a file written by torch.save, or .safetensors"
        )
    verdict = inspect_checkpoint(path)
    if verdict.names or verdict.refused:
        named = ", ".join(printable(name) for name in verdict.names[:5]) or "; ".join(verdict.refused)
        raise Untrusted(f"{path.name} holds more than tensors: {named}", fix="save the state_dict alone, best as .safetensors")
    return _load_restricted(path, verdict)


def load_pickled_module(path: Path | str, trust: tuple[str, ...] = ()) -> nn.Module:
    """A checkpoint that holds a whole module. Raises Untrusted, BadInput; BadInput too when it holds no module."""
    loaded = load_checkpoint(path, trust)
    if not isinstance(loaded, nn.Module):
        raise BadInput(
            f"{Path(path).name} holds {_kind(loaded)}, not a module", fix="give --arch package.module:factory for a file of tensors"
        )
    return loaded


def inspect_checkpoint(path: Path | str) -> pickles.Verdict:
    """Read the opcodes of a torch checkpoint and judge them; nothing is unpickled. Raises BadInput when the archive is damaged."""
    path = Path(path)
    if not _is_zip(path):
        if tarfile.is_tarfile(path):  # torch would read it as a tar, and unpickle other streams than the ones judged here
            raise BadInput(f"{path.name} is a tar archive of torch before 0.1.10", fix="load and save it again with a current torch")
        with path.open("rb") as file:
            return pickles.judge(pickles.scan(file, streams=5))
    archives.open_zip(path, stored_only=True)
    with _damage(path):
        # torch's own reader, so that the pickle judged is the pickle loaded.
        data: bytes = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    return pickles.judge(pickles.scan(data))


def _load_restricted(path: Path, verdict: pickles.Verdict) -> Any:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < MIN_TORCH:
        raise Unavailable(
            f"torch {torch.__version__} has known holes in weights_only loading (CVE-2026-24747)", fix="pip install 'torch>=2.11'"
        )
    sparse = torch.sparse.check_sparse_tensor_invariants()
    size = path.stat().st_size
    admitted: list[Any] = list(verdict.admitted)
    with (
        _damage(path),
        warnings.catch_warnings(),
        torch.serialization.safe_globals(admitted),
        sparse,
        limit_memory(4 * size + _LOAD_SLACK_BYTES),
    ):
        warnings.simplefilter("ignore")
        # Explicit: TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD changes the default only.
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    check_loaded(path, loaded)
    return loaded


def check_loaded(path: Path, loaded: Any) -> None:
    """Refuse tensors that claim more than their storage, and configurations that would fetch code later. Raises BadInput, Untrusted."""
    expanded = 0
    for tensor in _walk(path, loaded):
        if tensor.is_meta:
            raise BadInput(f"{path.name} holds a tensor without data (meta device)", fix="save the model after its weights were loaded")
        if tensor.layout is not torch.strided or tensor.is_quantized:
            continue
        need = tensor.numel() * tensor.element_size()
        have = tensor.untyped_storage().nbytes()
        if need > have:
            expanded += need - have
        if expanded > MAX_EXPANDED_BYTES:
            raise BadInput(
                f"{path.name} holds a tensor of shape {list(tensor.shape)}, {need} bytes, with {have} bytes of data behind it",
                fix="do not use this file; an honest one is saved after .contiguous()",
            )


def _walk(path: Path, root: Any) -> Iterator[torch.Tensor]:
    seen: set[int] = set()
    queue = [root]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
            if item.__dict__:
                queue.append(item.__dict__)
        elif isinstance(item, Mapping):
            queue.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            queue.extend(item)
        elif isinstance(item, nn.Module) or type(item).__module__.startswith("transformers."):
            state = getattr(item, "__dict__", {})
            _refuse_hub_kernels(path, item, state)
            queue.extend(state.values())


def _refuse_hub_kernels(path: Path, item: Any, state: Mapping[str, Any]) -> None:
    """transformers fetches and runs attention and layer kernels from its hub when these attributes say so, on the first eval() or forward()."""
    fix = 'set_attn_implementation("sdpa") and use_kernels=False before saving'
    for key in ("_attn_implementation_internal", "_attn_implementation", "attn_implementation"):
        value = state.get(key)
        values = value.values() if isinstance(value, Mapping) else (value,)
        if any(not isinstance(v, (str, type(None))) or v not in SAFE_ATTENTION for v in values):
            raise Untrusted(f"{path.name}: {type(item).__name__} asks for the attention kernel {printable(str(value))!r}", fix=fix)
    if state.get("_use_kernels") or state.get("fusion_config") or state.get("kernel_config"):
        raise Untrusted(f"{path.name}: {type(item).__name__} asks for kernels from a hub", fix=fix)


def check_safetensors(path: Path | str) -> None:
    """Header checks alone, for a file that another library reads. Raises BadInput."""
    path = Path(path)
    _require_format(path, Format.SAFETENSORS)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass
    except (SafetensorError, ValueError, OSError) as error:
        raise BadInput(f"{path.name} is a damaged safetensors file: {printable(str(error))}", fix=_AGAIN) from error


def load_safetensors(path: Path | str) -> dict[str, torch.Tensor]:
    """A .safetensors file on the CPU. Raises BadInput when a size, an offset or a dtype does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    found = policy.classify(path)
    if found is not Format.SAFETENSORS:
        raise BadInput(f"{path.name} is {policy.POLICY[found].is_a}, not a safetensors file", fix="name a .safetensors file")
    try:
        tensors: dict[str, torch.Tensor] = load_file(path, device="cpu")
    except (SafetensorError, KeyError, ValueError, OverflowError, OSError) as error:
        raise BadInput(f"{path.name} is a damaged safetensors file: {printable(str(error))}", fix=_AGAIN) from error
    return tensors


# --- programs ----------------------------------------------------------------------------------------------------------------------------------


def load_torchscript(path: Path | str, trust: tuple[str, ...] = ()) -> Any:
    """A ScriptModule on the CPU, with consent. Raises Untrusted, BadInput."""
    path = Path(path)
    _require_format(path, Format.TORCHSCRIPT)
    require_consent(path, Format.TORCHSCRIPT, trust)
    with _damage(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path), map_location="cpu")


def load_exported(path: Path | str, trust: tuple[str, ...] = (), *, signed_by_us: bool = False) -> Any:
    """The ExportedProgram of a .pt2, with consent or our signature (which the caller has checked over this file's hash).

    Raises Unavailable for a newer format, Untrusted, BadInput.
    """
    path = Path(path)
    _require_format(path, Format.EXPORTED)
    _require_known_schema(path)
    require_consent(path, Format.EXPORTED, trust, signed_by_us=signed_by_us)
    with _damage(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(str(path))


def load_aoti(
    path: Path | str,
    trust: tuple[str, ...] = (),
    *,
    signed_by_us: bool = False,
    device_index: int = -1,
    run_single_threaded: bool = False,
) -> Any:
    """The callable of an AOTInductor package, with consent or our signature.

    The platform written in the package is compared before anything is mapped: Unavailable names the field that differs. Sets
    AOTI_RUNTIME_CHECK_INPUTS=1 for the process: without it a package returns wrong rows for another batch size and reads float64 as float32, silently.
    """
    path = Path(path)
    _require_format(path, Format.AOTI)
    _require_platform(path)
    require_consent(path, Format.AOTI, trust, signed_by_us=signed_by_us)
    os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"  # read once, when the first package runs
    _share_cxx_runtime()
    from torch._inductor import aoti_load_package

    with _damage(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return aoti_load_package(str(path), run_single_threaded=run_single_threaded, device_index=device_index)


def _share_cxx_runtime() -> None:
    """Let a package use the process's C++ library for everything, or for nothing.

    A package that was linked with a static libstdc++ finds half of its symbols in the libstdc++ torch has loaded (those the linker makes unique in a
    process) and the other half in itself, and dies in the first std::regex of its constructor (seen with torch 2.11 on CUDA). Once the loaded library is
    in the global scope, all of them are found there.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a libc++ system has none, and then there is nothing to mix
            ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)


def deserialize_engine(runtime: Any, data: bytes, *, built_with: str = "") -> Any:
    """A TensorRT engine from a plan that was built here or whose hash the caller has checked. `runtime` is the library's Runtime.

    Raises Unavailable when the library refuses the plan: it does so for another version, another GPU, and for damage, without telling which.
    """
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        library = type(runtime).__module__.partition(".")[0]
        version = getattr(sys.modules.get(library), "__version__", "?")
        raise Unavailable(
            f"{library} {version} does not accept this plan" + (f", built with {built_with}" if built_with else ""),
            fix="build it again on this machine: gpuopt compile MODEL --backend trt",
        )
    return engine


def _require_format(path: Path, wanted: Format) -> None:
    found = policy.classify(path)
    if found is not wanted:
        raise BadInput(f"{path.name} is {policy.POLICY[found].is_a}, not {policy.POLICY[wanted].is_a}", fix="name the right file")


def _require_known_schema(path: Path) -> None:
    from torch._export.serde.schema import SCHEMA_VERSION
    from torch.export.pt2_archive.constants import ARCHIVE_VERSION_VALUE

    archive = archives.open_zip(path, stored_only=False)
    fix = f"install the torch that wrote it; this is {torch.__version__}"
    if "archive_version" not in archive.members:
        raise Unavailable(f"{path.name} has the layout of torch before 2.8", fix="export it again with a current torch")
    text = archives.read_member(path, f"{archive.root}/archive_version", limit_bytes=64).decode("ascii", "replace").strip()
    if not text.isdigit():
        raise BadInput(f"{path.name} has the archive version {printable(text)!r}", fix=_AGAIN)
    if int(text) > int(ARCHIVE_VERSION_VALUE):
        raise Unavailable(f"{path.name} has archive version {text}, this torch reads {ARCHIVE_VERSION_VALUE}", fix=fix)
    for member in sorted(m for m in archive.members if m.startswith("models/") and m.endswith(".json")):
        try:
            program = json.loads(archives.read_member(path, f"{archive.root}/{member}", limit_bytes=2**30))
            version = program["schema_version"]
            major, minor = int(version["major"]), int(version["minor"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(f"{path.name}: {member} is damaged ({type(error).__name__})", fix=_AGAIN) from error
        if (major, minor) > tuple(SCHEMA_VERSION):
            raise Unavailable(
                f"{path.name} has schema version {major}.{minor}, this torch reads {SCHEMA_VERSION[0]}.{SCHEMA_VERSION[1]}", fix=fix
            )


def aoti_metadata(path: Path | str, model_name: str = "model") -> dict[str, str]:
    """What an AOTInductor package says it was built for: AOTI_DEVICE_KEY, AOTI_PLATFORM, AOTI_MACHINE, AOTI_CPU_ISA, AOTI_COMPUTE_CAPABILITY."""
    path = Path(path)
    archive = archives.open_zip(path, stored_only=False)
    folder = f"data/aotinductor/{model_name}/"
    members = sorted(m for m in archive.members if m.startswith(folder) and m.endswith("_metadata.json"))
    if not members:
        raise BadInput(
            f"{path.name} holds no metadata for the model {model_name!r}", fix="build it again with gpuopt compile --backend aoti"
        )
    found: dict[str, str] = {}
    for member in members:
        try:
            content = json.loads(archives.read_member(path, f"{archive.root}/{member}"))
            found.update({str(key): str(value) for key, value in content.items()})
        except (ValueError, AttributeError, RecursionError) as error:
            raise BadInput(f"{path.name}: {member} is damaged", fix=_AGAIN) from error
    return found


def _require_platform(path: Path) -> None:
    built = aoti_metadata(path)
    fix = "build it again on this machine: gpuopt compile MODEL --backend aoti"
    for key, here in (("AOTI_PLATFORM", sys.platform), ("AOTI_MACHINE", platform.machine())):
        if built.get(key, here) != here:
            raise Unavailable(f"{path.name} was built for {printable(built[key])}, this is {here} ({key})", fix=fix)
    flags = _cpu_flags()
    for isa in built.get("AOTI_CPU_ISA", "").upper().split():
        needed = _ISA_FLAGS.get(isa)
        if needed is not None and flags and not needed <= flags:
            raise Unavailable(f"{path.name} needs the CPU instructions {isa}, which this CPU lacks", fix=fix)
    device = built.get("AOTI_DEVICE_KEY", "cpu")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise Unavailable(f"{path.name} was built for a GPU, and torch sees none here", fix=fix)
        capability = "".join(str(part) for part in torch.cuda.get_device_capability())
        wanted = built.get("AOTI_COMPUTE_CAPABILITY", "").replace(".", "") or capability
        if wanted != capability:
            raise Unavailable(f"{path.name} was built for compute capability {printable(wanted)}, this is {capability}", fix=fix)
    elif device != "cpu":
        raise Unavailable(f"{path.name} was built for the device {printable(device)!r}", fix=fix)


_ISA_FLAGS: dict[str, frozenset[str]] = {
    "AVX2": frozenset({"avx2", "fma"}),
    "AVX512": frozenset({"avx512f", "avx512dq", "avx512vl", "avx512bw"}),
    "AVX512_VNNI": frozenset({"avx512_vnni"}),
    "AMX_TILE": frozenset({"amx_tile"}),
    "AMX_FP16": frozenset({"amx_fp16"}),
}
"""Inductor's names of instruction sets -> flags of /proc/cpuinfo; others are covered by the machine's name."""


def _cpu_flags() -> frozenset[str]:
    """This CPU's feature flags, empty where the system does not list them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            line = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())


# --- ONNX --------------------------------------------------------------------------------------------------------------------------------------

_ORT_CPU = "CPUExecutionProvider"
_ONNX_LIMIT_BYTES = 2**31
_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training", "ai.onnx.training"})
_RUNTIME_DOMAINS = frozenset({"com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"})
"""ONNX Runtime's own operators: no schema in the onnx package, so their names are left to the runtime."""


def check_onnx(path_or_bytes: Path | str | bytes, trust: tuple[str, ...] = ()) -> Any:
    """An ONNX file or message -> its ModelProto, external data not loaded, after checks that the onnx package and ONNX Runtime leave out.

    Raises BadInput: damage, external data outside the folder, in a link, a pipe or past its file's end, shapes larger than their data, unknown
    operators and operator sets. Raises Untrusted for nodes that hold native code (EPContext) and Unavailable without a working onnx package.
    """
    onnx = packages.load("onnx")
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    path: Path | None
    if isinstance(path_or_bytes, bytes):
        path, raw, name = None, path_or_bytes, "the ONNX message"
    else:
        path = Path(path_or_bytes)
        _require_format(path, Format.ONNX)
        name = printable(path.name)
        if path.stat().st_size >= _ONNX_LIMIT_BYTES:
            raise BadInput(f"{name} is larger than the 2 GiB a protobuf message may have", fix="save its weights as external data")
        raw = path.read_bytes()
    model = onnx.ModelProto()
    try:
        model.ParseFromString(raw)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{name} is a damaged ONNX file: {printable(str(error))}", fix=_AGAIN) from error
    if not model.HasField("graph") or not model.graph.output:
        raise BadInput(f"{name} holds no graph with outputs", fix=_AGAIN)
    _check_onnx_operators(onnx, model, name, path, trust)
    for tensor in _onnx_tensors(onnx, model):
        _check_onnx_tensor(onnx, tensor, name, path, len(raw))
    return model


def onnx_session(
    model: Path | str | bytes,
    providers: Sequence[str | tuple[str, Mapping[str, Any]]],
    options: Any = None,
    *,
    allow_fallback: bool = False,
    trust: tuple[str, ...] = (),
) -> Any:
    """An onnxruntime.InferenceSession whose first provider is the one asked for, or an error; never a silent CPU session.

    `providers` are ONNX Runtime's names, alone or with their options. With the CPU provider listed behind another one, or `allow_fallback`, single
    nodes may run on the CPU; without, every node must run on what is listed. `options` is a SessionOptions. Raises Unavailable when the provider is
    not built in or does not start, Unsupported when a node would need the CPU, and what `check_onnx` raises.
    """
    check_onnx(model if isinstance(model, bytes) else Path(model), trust)
    ort = packages.load("onnxruntime")
    pairs = [(p, {}) if isinstance(p, str) else (p[0], dict(p[1])) for p in providers]
    if not pairs:
        raise UsageError("no execution provider was named", fix="ort:cpu or ort:cuda")
    wanted = pairs[0][0]
    if wanted not in ort.get_available_providers():
        raise Unavailable(
            f"{wanted} is not in this build of ONNX Runtime {ort.__version__} (it has {', '.join(ort.get_available_providers())})",
            fix="pip uninstall onnxruntime && pip install 'gpuopt[ort-gpu]'" if "CUDA" in wanted else "pip install 'gpuopt[onnx]'",
        )
    options = options if options is not None else ort.SessionOptions()
    names = [name for name, _ in pairs]
    if _ORT_CPU not in names:
        if allow_fallback:
            pairs.append((_ORT_CPU, {}))
        else:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            sess_options=options,
            providers=[name for name, _ in pairs],
            provider_options=[settings for _, settings in pairs],
            enable_fallback=0,  # Python's own retry on the CPU
        )
    except (
        Exception
    ) as error:  # the runtime's classes share no base but Exception (Fail, InvalidGraph, NotImplemented, EPFail); all mean it refuses
        text = printable(str(error), limit=400)
        if "fallback to CPU EP has been explicitly disabled" in str(error):
            raise Unsupported(
                f"{wanted} cannot run every node of this model: {text}", fix="list the CPU provider behind it for single nodes"
            ) from error
        if type(error).__name__ == "EPFail" or "dlopen" in text or "cannot open shared object" in text:
            raise Unavailable(
                f"{wanted} does not start: {text}", fix="install the CUDA and cuDNN libraries this ONNX Runtime was built for"
            ) from error
        raise BadInput(
            f"ONNX Runtime {ort.__version__} refuses this model: {text}", fix="export it again, with operators and an opset it knows"
        ) from error
    if session.get_providers()[:1] != [wanted]:
        raise Unavailable(
            f"{wanted} was asked for, ONNX Runtime fell back to {', '.join(session.get_providers())}",
            fix="install the CUDA and cuDNN libraries this ONNX Runtime was built for",
        )
    return session


def copy_onnx(path: Path | str, target: Path | str) -> dict[str, str]:
    """Copy a checked ONNX file and the data files it names: role -> name beside `target` (`onnx`, then `onnx_data`, `onnx_data_1`…).

    Raises what `check_onnx` raises, and BadInput when a data file would land on the model itself.
    """
    path, target = Path(path), Path(target)
    model = check_onnx(path)
    onnx = packages.load("onnx")
    locations: dict[str, None] = {}
    for tensor in _onnx_tensors(onnx, model):
        for entry in tensor.external_data:
            if entry.key == "location":
                locations[Path(entry.value).as_posix()] = None
    files = {"onnx": target.name}
    if target.name in locations:
        raise BadInput(
            f"{path.name} keeps data in {target.name!r}, the name its copy takes",
            fix="rename the data file: onnx.save with another location",
        )
    shutil.copyfile(path, target)
    for index, location in enumerate(locations):
        (target.parent / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path.parent / location, target.parent / location, follow_symlinks=False)
        files["onnx_data" if index == 0 else f"onnx_data_{index}"] = location
    return files


def _check_onnx_operators(onnx: Any, model: Any, name: str, path: Path | None, trust: tuple[str, ...]) -> None:
    newest = onnx.defs.onnx_opset_version()
    local = {function.domain for function in model.functions}
    local_functions = {(function.domain, function.name) for function in model.functions}
    versions: dict[str, int] = {}
    for opset in [*model.opset_import, *(o for f in model.functions for o in f.opset_import)]:
        domain = "" if opset.domain == "ai.onnx" else opset.domain
        if domain not in _KNOWN_DOMAINS | _RUNTIME_DOMAINS | local:
            raise BadInput(
                f"{name} needs operators of the domain {printable(domain)!r}, which is not a standard one",
                fix="export with standard operators",
            )
        if domain == "" and not 1 <= opset.version <= newest:
            raise BadInput(
                f"{name} needs operator set {opset.version}; the onnx installed here knows 1 to {newest}", fix="export with a lower opset"
            )
        versions.setdefault(domain, opset.version)
    if not model.opset_import:
        raise BadInput(f"{name} names no operator set", fix="export it again")
    for node in _onnx_nodes(onnx, model):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if node.op_type == "EPContext":
            if path is None:
                raise Untrusted("an EPContext node holds native code", fix="load it from a file that you trust")
            require_consent(path, Format.ONNX, trust, reasons=["it has an EPContext node, which holds native code"])
            continue
        if (domain, node.op_type) in local_functions or domain in _RUNTIME_DOMAINS:
            continue
        if domain not in versions:
            raise BadInput(
                f"{name}: node {printable(node.name)!r} uses the unknown domain {printable(domain)!r}", fix="export with standard operators"
            )
        if domain in ("", "ai.onnx.ml") and not onnx.defs.has(node.op_type, versions[domain], domain):
            raise BadInput(
                f"{name}: there is no operator {printable(node.op_type)!r} in operator set {versions[domain]}",
                fix="export with standard operators",
            )


def _onnx_graphs(onnx: Any, model: Any) -> Iterator[Any]:
    """Every graph and function, inner graphs included; without recursion, so that depth is harmless."""
    queue: list[Any] = [model.graph, *model.functions]
    while queue:
        graph = queue.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    queue.append(attribute.g)
                queue.extend(attribute.graphs)


def _onnx_nodes(onnx: Any, model: Any) -> Iterator[Any]:
    for graph in _onnx_graphs(onnx, model):
        yield from graph.node


def _onnx_tensors(onnx: Any, model: Any) -> Iterator[Any]:
    for graph in _onnx_graphs(onnx, model):
        if isinstance(graph, onnx.GraphProto):
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield sparse.values
                yield sparse.indices
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                for sparse in [*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []), *attribute.sparse_tensors]:
                    yield sparse.values
                    yield sparse.indices


_ONNX_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
"""TensorProto.DataType -> bits an element; 8 (string) has none."""


def _check_onnx_tensor(onnx: Any, tensor: Any, name: str, path: Path | None, file_bytes: int) -> None:
    label = f"{name}: tensor {printable(tensor.name)!r}"
    if any(dim < 0 for dim in tensor.dims):
        raise BadInput(f"{label} has the shape {list(tensor.dims)}", fix=_AGAIN)
    count = math.prod(tensor.dims)
    bits = _ONNX_BITS.get(tensor.data_type)
    if bits is None and tensor.data_type != onnx.TensorProto.STRING:
        raise BadInput(f"{label} has the unknown element type {tensor.data_type}", fix="export it with an older opset")
    need = None if bits is None else (count * bits + 7) // 8
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        _check_external(tensor, label, path, need)
    elif tensor.HasField("raw_data"):
        if need is not None and len(tensor.raw_data) != need:
            raise BadInput(f"{label} of shape {list(tensor.dims)} needs {need} bytes and has {len(tensor.raw_data)}", fix=_AGAIN)
    elif count > 2 * file_bytes:  # the shortest element on the wire is half a byte
        raise BadInput(f"{label} of shape {list(tensor.dims)} has {count} elements in a file of {file_bytes} bytes", fix=_AGAIN)


def _check_external(tensor: Any, label: str, path: Path | None, need: int | None) -> None:
    fix = "keep the data in a plain file beside the model, as onnx.save writes it"
    if path is None:
        raise BadInput(f"{label} keeps its data in another file, which a message in memory cannot have", fix="load it from its file")
    fields: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key in fields:
            raise BadInput(f"{label} names {printable(entry.key)!r} twice", fix=fix)
        fields[entry.key] = entry.value
    location = fields.get("location", "")
    shown = printable(location)
    parts = Path(location).parts
    if not location or "\0" in location or "\\" in location or Path(location).is_absolute() or ".." in parts or ":" in location:
        raise BadInput(f"{label} keeps its data at {shown!r}, outside the model's folder", fix=fix)
    here = path.parent
    for part in parts:
        here = here / part
        try:
            status = here.lstat()
        except OSError as error:
            raise BadInput(
                f"{label} keeps its data in {shown!r}: {error.strerror or error}", fix="copy that file beside the model"
            ) from error
        if stat.S_ISLNK(status.st_mode):
            raise BadInput(f"{label} keeps its data behind the link {shown!r}", fix=fix)
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{label} keeps its data in {shown!r}, which is not a regular file", fix=fix)
    if status.st_nlink > 1:
        raise BadInput(
            f"{label} keeps its data in {shown!r}, a hard link: it may be any file of this disk", fix=f"{fix} (a copy, not a link)"
        )
    try:
        offset = int(fields.get("offset", "0") or 0)
        length = int(fields["length"]) if fields.get("length") else (need if need is not None else status.st_size - offset)
    except ValueError as error:
        raise BadInput(f"{label} has an offset or a length that is no number", fix=_AGAIN) from error
    if offset < 0 or length < 0 or offset + length > status.st_size:
        raise BadInput(f"{label} lies at {offset}+{length} in {shown!r}, which has {status.st_size} bytes", fix=_AGAIN)
    if need is not None and length != need:
        raise BadInput(f"{label} of shape {list(tensor.dims)} needs {need} bytes, its file part has {length}", fix=_AGAIN)


# --- shared ------------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limit_memory(extra_bytes: int) -> Iterator[None]:
    """Let this process allocate at most `extra_bytes` more private memory inside the block, where the system can say so (Linux).

    RLIMIT_DATA, not RLIMIT_AS: torch and CUDA reserve far more address space than they use. Above it malloc fails and torch raises.
    """
    try:
        import resource

        with open("/proc/self/status", encoding="ascii") as file:
            used_kib = next(int(line.split()[1]) for line in file if line.startswith("VmData:"))
    except (ImportError, OSError, StopIteration, ValueError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used_kib * 1024 + extra_bytes
    ceiling = min((limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY), default=wanted)
    resource.setrlimit(resource.RLIMIT_DATA, (min(wanted, ceiling), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what the libraries raise on garbage into BadInput."""
    try:
        yield
    except GpuoptError:
        raise
    except Exception as error:  # torch lets IndexError, KeyError, struct.error, EOFError, AttributeError… through (pytorch#127525); all mean the file is bad
        # The first sentence alone: torch's text goes on to advise weights_only=False.
        text = printable(str(error).partition("\n")[0].partition(". ")[0], limit=200)
        raise BadInput(f"{printable(path.name)} cannot be read: {type(error).__name__}: {text}", fix=_AGAIN) from error


def _is_zip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}", fix="check the path and its permissions") from error


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = sorted({type(v).__name__ for v in value.values()})
        return f"a dictionary of {', '.join(inner[:4]) or 'nothing'}"
    return f"a {type(value).__name__}"


__all__ = [
    "SAFE_ATTENTION",
    "aoti_metadata",
    "check_loaded",
    "check_onnx",
    "check_safetensors",
    "copy_onnx",
    "deserialize_engine",
    "inspect_checkpoint",
    "limit_memory",
    "load_aoti",
    "load_checkpoint",
    "load_exported",
    "load_pickled_module",
    "load_safetensors",
    "load_tensors",
    "load_torchscript",
    "onnx_session",
    "require_consent",
]
