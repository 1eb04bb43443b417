"""Model + inputs -> Runner, by recording one eager forward as a CUDA graph and replaying it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gpuopt.core.accepts import Accepts
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision
from gpuopt.core.tally import Tally
from gpuopt.programs import artifact
from gpuopt.programs.plain import copied, plain
from gpuopt.programs.sample import zeros
from gpuopt.programs.weigh import Weigh, tally_for

FORMS = frozenset({"module", "torchscript", "exported"})
PRESETS: dict[str, dict[str, Any]] = {}
_OWN = frozenset({"preset", "precision", "dynamic", "trust", "signed_by_us", "static_outputs"})

_WARMUP = 3
"""Calls before recording: libraries pick algorithms and allocate workspaces in the first ones, which a recording cannot hold."""


def available(device: str) -> str | None:
    """Why it cannot run here, or None."""
    if not device.startswith("cuda"):
        return f"CUDA graphs run on an NVIDIA GPU, not on {device}"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def supports(form: str, precision: Precision | None, device: str) -> str | None:
    """Why this form, precision and device cannot be, or None."""
    if form not in FORMS:
        return f"a CUDA graph is recorded from a PyTorch module, not from {form}"
    if precision in (Precision.FP8, Precision.INT8):
        return f"a module cannot be cast to {precision}: quantise it first"
    return None if device.startswith("cuda") else f"CUDA graphs run on an NVIDIA GPU, not on {device}"


def build(model: Model, inputs: Inputs, options: Mapping[str, Any]) -> GraphRunner:
    """Warm up on a side stream, then record.

    `options`: `precision`; `static_outputs=true` returns the graph's own output buffers, which the next call overwrites: no copy, and one result alive at a time.
    Raises Unsupported for dynamic dimensions and for a forward that cannot be recorded (it waits for the device, or allocates on the host).
    """
    _checked(options)
    if options.get("dynamic"):
        names = ", ".join(options["dynamic"])
        raise Unsupported(
            f"a CUDA graph has one shape, and {names} is asked to be dynamic", fix="record one graph a shape, or use --backend aoti"
        )
    return _record(model.module, inputs, options)


def load(folder: Path, files: Mapping[str, str], options: Mapping[str, Any], device: str) -> GraphRunner:
    """Record again from the exported program of a bundle: a recorded graph cannot be written to a file."""
    module, accepts = artifact.load(folder, files, options)
    args, kwargs = zeros(accepts)
    runner = _record(module, Inputs(args=args, kwargs=kwargs), options)
    runner.accepts = Accepts(inputs=accepts.inputs, positional=accepts.positional, any_layout=True)
    runner.notes.append("recorded again from the exported program of the bundle")
    return runner


class GraphRunner:
    """Copies inputs into the graph's buffers, replays, copies outputs out."""

    def __init__(
        self,
        *,
        module: Any,
        inputs: Inputs,
        static: tuple[torch.Tensor, ...],
        graph: Any,
        outputs: Any,
        tally: Tally,
        options: Mapping[str, Any],
    ) -> None:
        self.device = str(static[0].device)
        self.notes: list[str] = []
        self.accepts = Accepts.of(inputs, any_layout=True)
        self._module = module
        self._inputs: Inputs | None = inputs
        self._static = static
        self._graph = graph
        self._outputs = outputs
        self._tally = tally
        self._precision = options.get("precision")
        self._copies = not options.get("static_outputs", False)
        if not self._copies:
            self.notes.append("static_outputs: a result is overwritten by the next call")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs in plain containers. Raises UsageError for anything but the recorded shapes, dtypes and device."""
        self.accepts.check(args, kwargs)
        given = (*args, *(kwargs[t.name] for t in self.accepts.inputs[self.accepts.positional :]))
        with torch.no_grad():
            for buffer, tensor in zip(self._static, given, strict=True):
                if tensor is not buffer:
                    buffer.copy_(tensor, non_blocking=True)
            self._graph.replay()
            return copied(self._outputs) if self._copies else self._outputs

    @property
    def static_inputs(self) -> tuple[torch.Tensor, ...]:
        """The graph's own buffers; writing into them and passing them costs no copy."""
        return self._static

    def audit(self) -> PrecisionAudit | None:
        """The ops dispatched while the graph was recorded: a replay runs exactly those kernels."""
        return self._tally.audit(self._precision, "aten dispatch of the recorded call")

    def ungraphed(self) -> tuple[torch.nn.Module, Callable[[], Any]] | None:
        """The recorded module and a call of it as it was recorded, for a trace that shows its modules: a replay shows none. None where nothing marks them (TorchScript, an
        exported program)."""
        module, args, names = self._module, self._static[: self.accepts.positional], self.accepts.inputs[self.accepts.positional :]
        if not isinstance(module, torch.nn.Module) or isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            return None
        kwargs = {spec.name: tensor for spec, tensor in zip(names, self._static[self.accepts.positional :], strict=True)}

        def call() -> Any:
            with torch.no_grad():
                return module(*args, **kwargs)

        return module, call

    def save(self, folder: Path) -> Mapping[str, str]:
        """The module as an exported program, to be recorded where it is opened. Raises Unsupported where it cannot be exported."""
        if self._inputs is None or isinstance(self._module, torch.jit.ScriptModule):
            raise Unsupported("a CUDA graph lives in its process and this one has no exportable source", fix="ship the source file itself")
        return artifact.save(self._module, self._inputs, None, folder)

    def close(self) -> None:
        """Free the graph and its memory pool."""
        if self._graph is not None:
            torch.cuda.synchronize(self.device)
            self._graph.reset()
        self._graph = self._outputs = self._module = self._inputs = None
        self._static = ()


def _record(module: Any, inputs: Inputs, options: Mapping[str, Any]) -> GraphRunner:
    Accepts.of(inputs, any_layout=True)  # refuses what is no tensor before anything is copied
    static = tuple(_buffer(t) for t in (*inputs.args, *inputs.kwargs.values()))
    if not static:
        raise Unsupported("a model without inputs has nothing to record on", fix="use --backend eager")
    device = static[0].device
    args = static[: len(inputs.args)]
    kwargs = dict(zip(inputs.kwargs, static[len(inputs.args) :], strict=True))
    tally = tally_for(str(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.no_grad():
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                module(*args, **kwargs)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        try:
            with torch.cuda.graph(graph, stream=stream), Weigh(tally):
                outputs = plain(module(*args, **kwargs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _free_generator(device)
            if "captur" not in str(error):
                raise
            reason = next((line.strip() for line in str(error).splitlines() if "captur" in line), "the capture failed")
            raise Unsupported(
                f"the forward cannot be recorded: {reason[:200]}",
                fix="remove what waits for the device (.item(), .cpu(), nonzero) from forward()",
            ) from error
        graph.replay()
        torch.cuda.synchronize(device)
    return GraphRunner(module=module, inputs=inputs, static=static, graph=graph, outputs=outputs, tally=tally, options=options)


def _buffer(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own, strides kept: the caller's tensors must not change under later calls."""
    return torch.empty_like(tensor, memory_format=torch.preserve_format).copy_(tensor)


def _checked(options: Mapping[str, Any]) -> None:
    """Raises UsageError for a preset or an option that does not exist."""
    if options.get("preset"):
        raise UsageError(f"cudagraphs has no preset {options['preset']!r}", fix="leave it away")
    for key in options:
        if key not in _OWN:
            raise UsageError(f"cudagraphs has no option {key!r}", fix="static_outputs=true")


def _free_generator(device: torch.device) -> None:
    """A capture that broke off leaves the device's random generator believing it is still captured; a clone of its state is not."""
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    generator.graphsafe_set_state(generator.clone_state())
