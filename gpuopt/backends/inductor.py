"""Model + inputs -> Runner, by torch.compile, read back: what it compiled, what it gave up on, and the dtypes it computes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo

from gpuopt.core.accepts import Accepts, device_of
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.launches import Launch
from gpuopt.core.live import Inputs, Model
from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision
from gpuopt.programs import artifact, breaks, capture, cuda, generated, streams
from gpuopt.programs import inductor as compiler
from gpuopt.programs.plain import copied, plain
from gpuopt.programs.sample import widened, zeros
from gpuopt.programs.weigh import tally_for

if TYPE_CHECKING:
    from gpuopt.programs.flex import Flex

FORMS = frozenset({"module", "exported"})

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "reduce-overhead": {"triton.cudagraphs": True},
    "max-autotune": {"max_autotune": True, "coordinate_descent_tuning": True, "triton.cudagraphs": True},
    "max-autotune-no-cudagraphs": {"max_autotune": True, "coordinate_descent_tuning": True},
    "freezing": {"freezing": True},
    "freezing-reduce-overhead": {"freezing": True, "triton.cudagraphs": True},
    "max-autotune-freezing": {"freezing": True, "max_autotune": True, "coordinate_descent_tuning": True, "triton.cudagraphs": True},
    "max-autotune-freezing-no-cudagraphs": {"freezing": True, "max_autotune": True, "coordinate_descent_tuning": True},
    "graphed": {"triton.cudagraphs": False},
    "freezing-graphed": {"freezing": True, "triton.cudagraphs": False},
    "max-autotune-graphed": {"max_autotune": True, "coordinate_descent_tuning": True, "triton.cudagraphs": False},
    "max-autotune-freezing-graphed": {
        "freezing": True, "max_autotune": True, "coordinate_descent_tuning": True, "triton.cudagraphs": False,
    },
}  # fmt: skip
"""Inductor's own settings; the first four are torch.compile's modes. `freezing` folds weights (batch norm into convolutions) and wants inference.

`graphed`: the whole call, guards and code between graph breaks included, is recorded once as one CUDA graph of ours. Under `reduce-overhead` every call goes through Dynamo's guards
and Inductor's trees of graphs, which decide in Python what to replay: worth it where a program calls many graphs in changing order, and time lost where it calls one.
"""
_GRAPHED = "graphed"
"""Ending of the presets whose code we record."""

_OWN = frozenset({"preset", "precision", "dynamic", "static_outputs", "wide_rows", "flex", "streams", "fullgraph", "trust", "signed_by_us"})


def available(device: str) -> str | None:
    """Why it cannot run here, or None."""
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        if torch.cuda.get_device_capability(device) < (7, 0):
            major, minor = torch.cuda.get_device_capability(device)
            return f"Triton needs compute capability 7.0, this is {major}.{minor}"
        return None if _has_triton() else "the package triton is missing"
    return None if compiler.has_cpp_compiler() else "Inductor needs a C++ compiler on a CPU and finds none: install g++"


def supports(form: str, precision: Precision | None, device: str) -> str | None:
    """Why this form, precision and device cannot be, or None."""
    if form == "torchscript":
        return "torch.compile does not look into a ScriptModule: it would run as it is, uncompiled"
    if form not in FORMS:
        return f"torch.compile takes PyTorch modules, not {form}"
    if precision is not None and precision.is_quantised and form != "module":
        return f"{precision} replaces a module's layers: this is {form}"
    if precision is Precision.TF32 and not device.startswith("cuda"):
        return "TF32 is a mode of NVIDIA tensor cores"
    return None


def build(model: Model, inputs: Inputs, options: Mapping[str, Any]) -> InductorRunner:
    """Compile and call until nothing compiles any more.

    `options`: `preset`, `precision`, `dynamic`; `fullgraph=true` makes a graph break an error; `static_outputs=true` returns CUDA-graph memory
    that the next call overwrites; `wide_rows=true` reduces rows of up to 8,192 elements in one piece;
    `flex=true` runs attention with a mask in FlexAttention kernels (`programs/flex.py`); `streams=2`, with a `graphed` preset, runs the batch in two parts side by side (`programs/streams.py`); anything else is a setting of Inductor by its own name (`epilogue_fusion=false`).
    The `graphed` presets record one CUDA graph a shape: of the inputs' shape here, with `dynamic` of any other when it is first called with (`capture.KEPT` are kept).
    Raises UsageError for an unknown preset or setting, Unsupported when nothing was captured, the preset needs a GPU, an option finds nothing to do, or what was compiled cannot be recorded; what the compiler
    raises goes through.
    """
    device = device_of(inputs)
    settings, notes = _settings(options, device)
    count = streams.asked(options)
    split = streams.of(model.module, inputs, count) if count > 1 else None
    runner = InductorRunner(
        module=model.module, device=device, settings=settings, options=options, inputs=inputs, dynamic=options.get("dynamic") or {}, split=split
    )  # fmt: skip
    runner.notes += notes
    runner.compile(inputs)
    return runner


def structural(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the same program without what only picks its kernels or replays them: what the fp32 stage of a verification builds. The kernels themselves
    are judged at the candidate's own precision; picking others for fp32 would take longer than the candidate took."""
    preset = "freezing" if "freezing" in str(options.get("preset")) else "default"
    return {**{key: value for key, value in options.items() if key not in compiler.PICKING}, "preset": preset}


def load(folder: Path, files: Mapping[str, str], options: Mapping[str, Any], device: str) -> InductorRunner:
    """Compile a bundle's exported program again: Inductor's kernels are not shipped, its graph is."""
    module, accepts = artifact.load(folder, files, options)
    settings, notes = _settings(options, device)
    split = streams.read(folder, files)
    runner = InductorRunner(module=module, device=device, settings=settings, options=options, inputs=None, dynamic={}, split=split)
    runner.notes += [*notes, "compiled again from the exported program of the bundle"]
    args, kwargs = zeros(accepts)
    runner.accepts = accepts
    runner.compile(Inputs(args=args, kwargs=kwargs))
    return runner


class InductorRunner:
    """A compiled module, called without gradients."""

    def __init__(
        self,
        *,
        module: Any,
        device: str,
        settings: dict[str, Any],
        options: Mapping[str, Any],
        inputs: Inputs | None,
        dynamic: Mapping[str, Any],
        split: streams.Split | None = None,
    ) -> None:
        self.device = device
        self.notes: list[str] = []
        self.accepts: Accepts | None = None
        """What a loaded program was exported for; a module being compiled accepts whatever it can."""
        self._module = module
        self._inputs = inputs
        self._dynamic = dict(dynamic)
        self._precision = options.get("precision")
        self._reader = compiler.GraphReader(tally_for(device))
        self._graphs = bool(settings.get("triton.cudagraphs"))
        self._is_static = bool(options.get("static_outputs", False))
        self._has_wide_rows = bool(options.get("wide_rows", False))
        self._is_recording = str(options.get("preset")).endswith(_GRAPHED)
        self._recorded: capture.Graphs | None = None
        self._skipped = 0
        self._heard = breaks.Heard()
        self._generated: list[generated.Generated] = []
        self._classes = compiler.class_names(module)
        self._flex: Flex | None = None
        if options.get("flex", False):
            from gpuopt.programs.flex import Flex  # with FlexAttention and what it imports

            self._flex = Flex()
            settings = {**settings, **self._flex.settings}
        self._call: Any = torch.compile(
            module, fullgraph=bool(options.get("fullgraph", False)), options={**settings, "post_grad_custom_post_pass": self._reader}
        )
        self._split = split

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own outputs; under CUDA graphs, copies of them in plain containers, which the next call does not touch."""
        if self._recorded is not None:
            return self._recorded(*args, **kwargs)
        if self.accepts is not None:
            self.accepts.check(args, kwargs)
        # no_grad, not inference_mode: the compiled code tracks no views anyway, and inference tensors are refused by some graph inputs.
        with torch.no_grad():
            if not self._graphs:
                return self._call(*args, **kwargs)
            torch.compiler.cudagraph_mark_step_begin()
            out = self._call(*args, **kwargs)
            return out if self._is_static else copied(plain(out))

    def compile(self, inputs: Inputs) -> None:
        """First calls: everything that compiles, warms up or records a graph happens here, and what it gave up on is noted."""
        from gpuopt.programs.wide_rows import wide_rows  # with every lowering there is: not for those who only ask what this backend can do

        if self._split is not None and not isinstance(self._call, streams.Parted):
            self._call = streams.Parted(self._call, self._split, tuple(inputs.kwargs), self.device)
        accepts = None
        if self._is_recording:
            accepts = replace(self.accepts or Accepts.of(inputs, self._dynamic), any_layout=True, align_bytes=1)
            # The layout and alignment of the buffers the graph will run on: code for others would be compiled first, and listed.
            inputs = inputs.map(capture.buffer)
        # The limit is kept by code object: a process that compiles one class many times (a search, a test) would end in silent eager.
        with (
            self._heard.listening(),
            compiler.reading(self._generated),
            wide_rows(self._has_wide_rows),
            torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096),
        ):
            if self._dynamic:
                sample = _marked(widened(inputs, {k: (int(v[0]), int(v[1])) for k, v in self._dynamic.items()}), self._dynamic)
                self(*sample.args, **sample.kwargs)
            # CUDA graph trees warm up in the first call, record in the second and replay from the third on.
            for _ in range(3 if self._graphs else 1):
                self(*inputs.args, **inputs.kwargs)
            if self._dynamic:
                self._heard.recompiles.clear()  # of these sizes one may be 1, which is a graph of its own in any model
            # A model that counts its calls in a plain number is compiled in every one of them: three say so.
            for _ in range(3):
                compiled = self._heard.num_compiled
                self(*inputs.args, **inputs.kwargs)
                if self._heard.num_compiled == compiled:
                    break
            else:
                self._refuse_restless()
            cuda.synchronize(self.device)
            if accepts is not None and self._reader.num_graphs:
                self._record(accepts, inputs)
        broken, reasons, skips = self._heard.breaks, self._heard.skips, self._heard.num_skipped
        if broken:
            total = broken.total()
            first = "; ".join(_first_line(reason) + (f" ({line})" if line else "") for (reason, line), _ in broken.most_common(3))
            self.notes.append(f"{total} graph break{'s' if total > 1 else ''}: {first}")
        if not self._reader.num_graphs:
            why = _first_line(next(iter(broken))[0]) if broken else "its recompile limit was reached or the module is excluded from tracing"
            raise Unsupported(f"torch.compile captured no graph: {why}", fix="use --backend eager, or make forward() traceable")
        if self._flex is not None and not self._flex.num_changed:
            raise Unsupported(f"flex=true has nothing to change: {self._flex.why()}", fix="leave flex out")
        if self._graphs and self.device.startswith("cuda") and skips:
            self._skipped = skips
            why = "; ".join(dict.fromkeys(_first_line(r) for r in reasons)) or "Inductor gave no reason"
            self.notes.append(f"CUDA graphs were asked for and skipped in {skips} graph{'s' if skips > 1 else ''}: {why}")

    def _refuse_restless(self) -> None:
        """What is compiled anew in every call has no code that could be recorded."""
        if self._is_recording:
            function, guard = (self._heard.recompiles or [("forward", "a guard that fails every time")])[-1]
            raise Unsupported(
                f"every call is compiled anew, so there is no code to record: {function}: {guard}",
                fix="keep what forward() counts out of plain Python attributes, or use the preset default",
            )

    def _record(self, accepts: Accepts, inputs: Inputs) -> None:
        graphs = capture.Graphs(
            self._call,
            accepts,
            holds=capture.tensors_of(self._module),
            static_outputs=self._is_static,
            remedy=f"{capture.REMEDY}, or use a preset without CUDA graphs",
        )
        graphs.record(inputs)
        self._recorded, self.accepts = graphs, accepts
        if self._is_static:
            self.notes.append(capture.STATIC_OUTPUTS)

    @property
    def static_inputs(self) -> tuple[torch.Tensor, ...]:
        """Of a `graphed` preset, the buffers of the graph used last: writing into them and passing them costs no copy. Empty for the others."""
        return self._recorded.static_inputs if self._recorded is not None else ()

    def audit(self) -> PrecisionAudit | None:
        """From the post-grad graphs, as Inductor handed them to its code generator."""
        extra = f"CUDA graphs skipped in {self._skipped} graphs" if self._skipped else ""
        audit: PrecisionAudit = self._reader.tally.audit(self._precision, "post-grad graph", extra=extra)
        if any("graph break" in note for note in self.notes):
            return replace(
                audit, reason="; ".join(filter(None, [audit.reason, "code between graph breaks is not in the graphs read back"]))
            )
        return audit

    def compiled(self) -> Mapping[str, Any]:
        """What the compiler gave up on: `graph_breaks` as (reason, `file.py:12` or "", how often), `recompiles` as (function with its line, guard), `cudagraph_skips`,
        `num_graphs`."""
        return {
            "graph_breaks": tuple((reason, line, number) for (reason, line), number in self._heard.breaks.items()),
            "recompiles": tuple(self._heard.recompiles),
            # Inductor splits graphs for CUDA graphs, and says so, whether or not it was asked to record any.
            "cudagraph_skips": tuple(dict.fromkeys(self._heard.skips)) if self._graphs else (),
            "num_graphs": self._reader.num_graphs,
        }

    def launches(self) -> tuple[Launch, ...]:
        """What the generated code launches in a call, in order, with the modules and lines it stems from. Code between graph breaks is not in it.
        Nothing of a batch in parts: their launches run side by side, in an order of their own."""
        if self._split is not None:
            return ()
        return generated.launches(self._generated, self._classes)

    def save(self, folder: Path) -> Mapping[str, str]:
        """The source graph, to be compiled again where it is opened. Raises Unsupported where the module cannot be exported."""
        if self._inputs is None:
            raise Unsupported("a bundle that was loaded is not saved again", fix="copy its folder")
        if self._split is not None:
            return streams.save(self._module, self._inputs, self._split, folder)
        return artifact.save(self._module, self._inputs, self._dynamic, folder)

    def close(self) -> None:
        """Let go of the module and its compiled code. Dynamo is not reset: that would make every other runner of this process compile again."""
        if self._recorded is not None:
            self._recorded.close()
        self._call = None
        self._module = None
        self._inputs = None


def _settings(options: Mapping[str, Any], device: str) -> tuple[dict[str, Any], list[str]]:
    """Inductor settings of a preset plus the user's own, and what had to be left out. Raises UsageError and Unsupported."""
    settings = compiler.settings("inductor", PRESETS, options, own=_OWN, names="static_outputs, wide_rows, flex, streams, fullgraph, or ")
    preset = options.get("preset") or "default"
    notes = []
    if streams.asked(options) > 1 and not preset.endswith(_GRAPHED):
        raise UsageError(
            f"streams run side by side in a recorded graph, and preset {preset} records none of ours", fix="the preset graphed"
        )
    if preset.endswith(_GRAPHED) and settings["triton.cudagraphs"]:
        raise UsageError(
            f"preset {preset} records the graph itself: Inductor's own would lie inside it", fix="leave triton.cudagraphs away"
        )
    if "triton.cudagraphs" in PRESETS[preset] and not device.startswith("cuda"):
        if preset.endswith(("reduce-overhead", _GRAPHED)):
            raise Unsupported(
                f"preset {preset} means CUDA graphs, and the model is on {device}", fix="use --device cuda, or the preset default"
            )
        del settings["triton.cudagraphs"]
        notes.append(f"{preset} without CUDA graphs: the model is on {device}")
    return settings, notes


def _marked(inputs: Inputs, dynamic: Mapping[str, Any]) -> Inputs:
    """The same storage under new tensor objects whose dynamic dimensions are marked: marks stay out of the caller's tensors."""
    bound = [*inputs.args, *inputs.kwargs.values()]
    for index, spec in enumerate(inputs.specs[: len(bound)]):
        axes = [(axis, d) for axis, d in enumerate(spec.shape) if isinstance(d, str) and d in dynamic and dynamic[d][0] < dynamic[d][1]]
        if axes:
            bound[index] = bound[index].detach()
        for axis, letter in axes:
            low, high = dynamic[letter]
            # A symbolic size starts at 2: Dynamo compiles size 1 as a graph of its own when it meets it.
            torch._dynamo.mark_dynamic(bound[index], axis, min=max(2, int(low)), max=int(high))
    count = len(inputs.args)
    return Inputs(args=tuple(bound[:count]), kwargs=dict(zip(inputs.kwargs, bound[count:], strict=True)), specs=inputs.specs)


def _first_line(text: str) -> str:
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no reason given"


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())
