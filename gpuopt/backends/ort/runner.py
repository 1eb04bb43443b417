"""A session of ONNX Runtime -> Runner: called, audited, profiled, saved."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as kineto

from gpuopt.backends.ort import profile, tracing
from gpuopt.backends.ort.audit import audit_nodes, placement_notes
from gpuopt.backends.ort.origins import Origins, nodes_of, weight_bytes
from gpuopt.backends.ort.session import ELEMENT_TYPE, available, bind_input, dtype_of, has_tf32, open_session, to_torch, translated
from gpuopt.backends.ort.settings import Settings, onnxruntime
from gpuopt.core import binding
from gpuopt.core.accepts import dtype_name
from gpuopt.core.errors import Unavailable, Unsupported, UsageError
from gpuopt.core.launches import Launch
from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision
from gpuopt.core.trace import Trace
from gpuopt.trust import gate

LARGEST_GRAPH_BYTES = 8 << 30
"""A session writes the graph it made with all of its weights: beyond this, fused nodes are told by their names alone."""
TOO_LARGE = "the graph ONNX Runtime made is too large to be written: fused nodes are told by their names alone"
WARMUP = 2
"""Profiled calls that are not looked at: the first ones allocate, pack weights and try algorithms."""


class OrtRunner:
    """One session. Inputs and outputs are bound by pointer: nothing crosses the host, and no copy is made of what is contiguous."""

    def __init__(self, path: Path, settings: Settings, device: str, *, layer_flops: Mapping[str, tuple[float | None, str]]) -> None:
        reason = available(device)
        if reason:
            raise Unavailable(f"ort cannot run on {device}: {reason}", fix="gpuopt backends shows what can run here")
        self.device = device
        self.notes: list[str] = []
        self._path, self._settings, self._layer_flops = path, settings, layer_flops
        self._stream: torch.cuda.Stream | None = None
        self._index = 0
        if settings.provider == "cuda":
            self._index = torch.device(device).index or 0
            self.device = f"cuda:{self._index}"
            # A stream of its own: the provider must be told one when it is made, and the caller's may differ from call to call.
            self._stream = torch.cuda.Stream(self._index)
        self._session: Any = open_session(path, settings, self._index, self._stream)
        self._inputs = self._session.get_inputs()
        self._outputs = self._session.get_outputs()
        self._last: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._given: dict[str, weakref.ref[torch.Tensor]] = {}
        """What the last call was given, as long as the caller keeps it: nothing here may add to the memory that is measured."""
        self._run_options = onnxruntime.RunOptions()
        if self._stream is not None:
            # Without this every call ends in a cudaStreamSynchronize; order is kept by the streams instead.
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def remember(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check inputs and keep their shapes for the audit, without a run. Raises UsageError."""
        self._last = {name: (t.dtype, tuple(t.shape)) for name, t in self._checked(args, kwargs).items()}
        self._keep(args, kwargs)

    def _keep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = binding.bind([info.name for info in self._inputs], args, kwargs)
        self._given = {name: weakref.ref(tensor) for name, tensor in given.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Output name -> tensor on the runner's device. Raises UsageError for inputs that do not fit, OutOfMemory."""
        if self._session is None:
            raise RuntimeError("this runner was closed")
        tensors = self._checked(args, kwargs)
        self._last = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        self._keep(args, kwargs)
        bound = self._session.io_binding()
        for name, tensor in tensors.items():
            bind_input(bound, name, tensor, self._index)
        outputs = self._bind_outputs(bound, {name: shape for name, (_, shape) in self._last.items()})
        self._run(bound)
        values = bound.get_outputs()
        return {
            info.name: outputs[info.name] if info.name in outputs else to_torch(value)
            for info, value in zip(self._outputs, values, strict=True)
        }

    def _checked(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Name -> contiguous tensor of the right dtype, rank, size and device: ONNX Runtime reads a bound pointer on trust."""
        tensors = binding.bind([info.name for info in self._inputs], args, kwargs)
        dims: dict[str, int] = {}
        for info in self._inputs:
            tensor = tensors[info.name]
            wanted = dtype_of(info.type)
            if tensor.dtype is not wanted:
                raise UsageError(
                    f"input {info.name!r} is {dtype_name(tensor.dtype)}, the file wants {dtype_name(wanted)}",
                    fix="cast it, or export the model at this dtype",
                )
            if str(tensor.device) != self.device:
                raise UsageError(
                    f"input {info.name!r} is on {tensor.device}, the session runs on {self.device}", fix=f"move it to {self.device}"
                )
            self._check_shape(info, tuple(tensor.shape), dims)
            tensors[info.name] = tensor.detach().contiguous()
        return tensors

    def _check_shape(self, info: Any, shape: tuple[int, ...], dims: dict[str, int]) -> None:
        if len(shape) != len(info.shape):
            raise UsageError(
                f"input {info.name!r} has shape {list(shape)}, the file wants {info.shape}", fix=f"{len(info.shape)} dimensions"
            )
        for axis, (wanted, size) in enumerate(zip(info.shape, shape, strict=True)):
            if isinstance(wanted, int) and wanted != size:
                raise UsageError(
                    f"input {info.name!r} has {size} in dimension {axis}, this build takes {wanted}",
                    fix="build with a range: --dim NAME=MIN:USUAL:MAX",
                )
            if isinstance(wanted, str):
                low, high = self._settings.ranges.get(wanted, (0, sys.maxsize))
                if not low <= size <= high:
                    raise UsageError(
                        f"input {info.name!r} has {wanted}={size}, this build takes {low} to {high}",
                        fix=f"--dim {wanted}={low}:{low}:{size}",
                    )
                if dims.setdefault(wanted, size) != size:
                    raise UsageError(
                        f"input {info.name!r} has {wanted}={size}, another input has {dims[wanted]}", fix="equal letters are equal sizes"
                    )

    def _bind_outputs(self, bound: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Bind every output; those whose shape follows from the inputs' to a fresh torch tensor, the others to the device, where ONNX Runtime allocates."""
        dims = {
            wanted: size
            for info in self._inputs
            for wanted, size in zip(info.shape, shapes[info.name], strict=True)
            if isinstance(wanted, str)
        }
        made: dict[str, torch.Tensor] = {}
        for info in self._outputs:
            sizes = [dims.get(wanted) if isinstance(wanted, str) else wanted for wanted in info.shape or [None]]
            known = [int(size) for size in sizes if size is not None]
            if len(known) < len(sizes) or 0 in known:
                bound.bind_output(info.name, self._settings.provider, self._index)
                continue
            tensor = torch.empty(known, dtype=dtype_of(info.type), device=self.device)
            bound.bind_output(info.name, self._settings.provider, self._index, ELEMENT_TYPE[tensor.dtype], known, tensor.data_ptr())
            made[info.name] = tensor
        return made

    def _run(self, bound: Any) -> None:
        """Run behind what the caller's stream has queued, and let that stream wait for the outputs."""
        with translated(self._path.name):
            if self._stream is None:
                self._session.run_with_iobinding(bound, self._run_options)
                return
            caller = torch.cuda.current_stream(self._index)
            self._stream.wait_stream(caller)
            self._session.run_with_iobinding(bound, self._run_options)
            caller.wait_stream(self._stream)

    def audit(self) -> PrecisionAudit | None:
        """Run once with zeros in a profiled session of its own and read which provider ran each node, in which dtype; None before any inputs are known."""
        if not self._last:
            return None
        calls = self._profiled(self._feeds(zeros=True)).calls
        if not calls:
            raise Unsupported(
                f"ONNX Runtime {onnxruntime.__version__} wrote a profile without a run in it: what it computes in cannot be read back",
                fix="another version of onnxruntime, or another --backend",
            )
        nodes = calls[-1].nodes
        if self._settings.provider == "cuda":
            self.notes += [note for note in placement_notes(nodes) if note not in self.notes]
        return audit_nodes(
            nodes,
            requested=Precision(self._settings.precision) if self._settings.precision else None,
            layer_flops=self._layer_flops,
            has_tf32=has_tf32(self._settings),
        )

    def _feeds(self, *, zeros: bool = False) -> dict[str, torch.Tensor]:
        """What the last call was given, where it is still there and as it was; zeros in its place."""
        feeds = {}
        for name, (dtype, shape) in self._last.items():
            tensor = self._given[name]() if name in self._given and not zeros else None
            is_same = tensor is not None and (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
            feeds[name] = (
                tensor.detach().contiguous() if tensor is not None and is_same else torch.zeros(shape, dtype=dtype, device=self.device)
            )
        return feeds

    def _profiled(self, feeds: Mapping[str, torch.Tensor], **how: Any) -> profile.Profile:
        return profile.record(self._path, self._settings, self._index, self._stream, feeds, **how)

    # -- what really ran ------------------------------------------------------------------------------------------------------------

    def trace(self, steps: int = 3) -> Trace:
        """What the last inputs make the session do, `steps` calls of it: an op a node (`onnx::MatMul`), with the source module and line it stems from.

        By ONNX Runtime's own profiler, in a session of its own: its host is slower than the timed one's. For the CPU provider, whose work torch.profiler does not see.
        Raises Unsupported before any inputs are known.
        """
        self._require_inputs()
        source, whole = self._source()
        found = self._profiled(self._feeds(), calls=WARMUP + steps, spare=4 * steps, graph=whole)
        origins = Origins(source, found.optimised)
        trace = tracing.trace_of(found, origins, self._layer_flops, device=self.device, calls=steps, warmup=WARMUP)
        return trace if whole else replace(trace, notes=(*trace.notes, TOO_LARGE))

    def launches(self) -> tuple[Launch, ...]:
        """What one call launches on a CUDA device, in order: a kernel each, with its exact name, its node and the modules that stems from. Empty on a CPU.

        Two profilers watch one run of a session of its own: ONNX Runtime's knows which node ran when, torch's which kernel was launched when, on the same clock.
        Raises Unsupported before any inputs are known.
        """
        self._require_inputs()
        if self._settings.provider != "cuda":
            return ()
        source, whole = self._source()
        chrome: dict[str, Any] = {}

        def watched(run: Callable[[], None]) -> None:
            with kineto(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                run()
            with tempfile.TemporaryDirectory(prefix="gpuopt-ort-") as folder:
                path = Path(folder, "trace.json")
                profiler.export_chrome_trace(str(path))
                # Kernels' names come from drivers and users' code: not always clean UTF-8 without control characters.
                chrome.update(json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False))

        found = self._profiled(self._feeds(), calls=WARMUP + 1, graph=whole, around=watched)
        return tracing.launches_of(found, tracing.kernels_of(chrome), Origins(source, found.optimised), self._layer_flops)

    def _require_inputs(self) -> None:
        if not self._last:
            raise Unsupported("nothing was called yet: there are no inputs to run with", fix="call the runner once")

    def _source(self) -> tuple[list[Any], bool]:
        """Nodes of the file, and whether the graph made of it is small enough to be written."""
        model = gate.check_onnx(self._path)
        num_bytes = weight_bytes(model)
        return list(nodes_of(model)), num_bytes <= LARGEST_GRAPH_BYTES and 2 * num_bytes < shutil.disk_usage(tempfile.gettempdir()).free

    def save(self, folder: Path) -> Mapping[str, str]:
        """The ONNX file with its weight files, and the session's settings. The file is portable; ONNX Runtime optimizes it again when it loads."""
        files = gate.copy_onnx(self._path, folder / "model.onnx")
        plain = {name: getattr(self._settings, name) for name in Settings.__dataclass_fields__}
        (folder / "settings.json").write_text(json.dumps(plain, sort_keys=True, indent=1) + "\n")
        return {**files, "settings": "settings.json"}

    def close(self) -> None:
        """Give back the session and its memory. Harmless twice."""
        if self._stream is not None and self._session is not None:
            self._stream.synchronize()
        self._session = None
