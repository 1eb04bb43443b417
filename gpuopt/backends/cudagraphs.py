"""Model + inputs -> Runner, by recording one eager forward as a CUDA graph and replaying it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpuopt.core.accepts import Accepts, device_of
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision
from gpuopt.core.tally import Tally
from gpuopt.programs import artifact, capture, streams
from gpuopt.programs.sample import zeros
from gpuopt.programs.weigh import Weigh, tally_for

FORMS = frozenset({"module", "torchscript", "exported"})
PRESETS: dict[str, dict[str, Any]] = {}
_OWN = frozenset({"preset", "precision", "dynamic", "trust", "signed_by_us", "static_outputs", "streams"})


def available(device: str) -> str | None:
    """Why it cannot run here, or None."""
    if not device.startswith("cuda"):
        return f"CUDA graphs run on an NVIDIA GPU, not on {device}"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def supports(form: str, precision: Precision | None, device: str) -> str | None:
    """Why this form, precision and device cannot be, or None."""
    if form not in FORMS:
        return f"a CUDA graph is recorded from a PyTorch module, not from {form}"
    if precision is not None and precision.is_quantised and form != "module":
        return f"{precision} replaces a module's layers: this is {form}"
    return None if device.startswith("cuda") else f"CUDA graphs run on an NVIDIA GPU, not on {device}"


def build(model: Model, inputs: Inputs, options: Mapping[str, Any]) -> GraphRunner:
    """Warm up on a side stream, then record.

    `options`: `precision`; `static_outputs=true` returns the graph's own output buffers, which the next call overwrites: no copy, and one result alive at a time.
    `streams=2` runs the batch in two parts side by side, each on a stream of its own (`programs/streams.py`).
    Raises Unsupported for dynamic dimensions and for a forward that cannot be recorded (it waits for the device, or allocates on the host) or that writes into its inputs.
    """
    _checked(options)
    if options.get("dynamic"):
        names = ", ".join(options["dynamic"])
        raise Unsupported(
            f"a CUDA graph has one shape, and {names} is asked to be dynamic",
            fix="record one graph a shape, or use --backend inductor:graphed or aoti",
        )
    count = streams.asked(options)
    return _record(model.module, inputs, options, split=streams.of(model.module, inputs, count) if count > 1 else None)


def load(folder: Path, files: Mapping[str, str], options: Mapping[str, Any], device: str) -> GraphRunner:
    """Record again from the exported program of a bundle: a recorded graph cannot be written to a file."""
    module, accepts = artifact.load(folder, files, options)
    args, kwargs = zeros(accepts)
    runner = _record(module, Inputs(args=args, kwargs=kwargs), options, named=accepts, split=streams.read(folder, files))
    runner.notes.append("recorded again from the exported program of the bundle")
    return runner


class GraphRunner:
    """A recorded forward: copies inputs into the graph's buffers, replays, copies outputs out (`programs/capture.py`)."""

    def __init__(
        self, *, module: Any, inputs: Inputs, graphs: capture.Graphs, tally: Tally, options: Mapping[str, Any], split: streams.Split | None = None
    ) -> None:  # fmt: skip
        self.device = str(graphs.static_inputs[0].device)
        self.notes: list[str] = []
        self.accepts = graphs.accepts
        self._module = module
        self._inputs: Inputs | None = inputs
        self._graphs = graphs
        self._split = split
        self._tally = tally
        self._precision = options.get("precision")
        if options.get("static_outputs", False):
            self.notes.append(capture.STATIC_OUTPUTS)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs in plain containers. Raises UsageError for anything but the recorded shapes, dtypes and device."""
        return self._graphs(*args, **kwargs)

    @property
    def static_inputs(self) -> tuple[torch.Tensor, ...]:
        """The graph's own buffers; writing into them and passing them costs no copy."""
        return self._graphs.static_inputs

    def audit(self) -> PrecisionAudit | None:
        """The ops dispatched while the graph was recorded: a replay runs exactly those kernels."""
        return self._tally.audit(self._precision, "aten dispatch of the recorded call")

    def ungraphed(self) -> tuple[torch.nn.Module, Callable[[], Any]] | None:
        """The recorded module and a call of it as it was recorded, for a trace that shows its modules: a replay shows none. None where nothing marks them (TorchScript, an
        exported program), and of a batch in parts, whose kernels are others than those of all of it."""
        module, static, names = self._module, self._graphs.static_inputs, self.accepts.inputs[self.accepts.positional :]
        if (
            self._split is not None
            or not isinstance(module, torch.nn.Module)
            or isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule)
        ):
            return None
        args = static[: self.accepts.positional]
        kwargs = {spec.name: tensor for spec, tensor in zip(names, static[self.accepts.positional :], strict=True)}

        def call() -> Any:
            with torch.no_grad():
                return module(*args, **kwargs)

        return module, call

    def save(self, folder: Path) -> Mapping[str, str]:
        """The module as an exported program, to be recorded where it is opened. Raises Unsupported where it cannot be exported."""
        if self._inputs is None or isinstance(self._module, torch.jit.ScriptModule):
            raise Unsupported("a CUDA graph lives in its process and this one has no exportable source", fix="ship the source file itself")
        if self._split is not None:
            return streams.save(self._module, self._inputs, self._split, folder)
        return artifact.save(self._module, self._inputs, None, folder)

    def close(self) -> None:
        """Free the graph and its memory pool."""
        self._graphs.close()
        self._module = self._inputs = None


def _record(
    module: Any, inputs: Inputs, options: Mapping[str, Any], named: Accepts | None = None, split: streams.Split | None = None
) -> GraphRunner:
    """named: the inputs as a bundle knows them; ranges of it are left away, what is recorded is one shape."""
    accepts = Accepts.of(inputs, any_layout=True)
    if named is not None:
        accepts = replace(accepts, inputs=tuple(replace(a, name=n.name) for a, n in zip(accepts.inputs, named.inputs, strict=True)))
    tally = tally_for(device_of(inputs))
    graphs = capture.Graphs(
        module if split is None else streams.Parted(module, split, tuple(inputs.kwargs), device_of(inputs)),
        accepts,
        holds=capture.tensors_of(module),
        static_outputs=bool(options.get("static_outputs", False)),
        watch=lambda: Weigh(tally),
    )
    graphs.record(inputs)
    return GraphRunner(module=module, inputs=inputs, graphs=graphs, tally=tally, options=options, split=split)


def _checked(options: Mapping[str, Any]) -> None:
    """Raises UsageError for a preset or an option that does not exist."""
    if options.get("preset"):
        raise UsageError(f"cudagraphs has no preset {options['preset']!r}", fix="leave it away")
    for key in options:
        if key not in _OWN:
            raise UsageError(f"cudagraphs has no option {key!r}", fix="static_outputs=true, streams=2")
