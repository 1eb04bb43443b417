"""What was seen of a user's own program while it ran, as values: its models and their calls, weights read and moved, waits and copies, each with its source line.

Recorded by gpuopt/script, judged by the doctor. A line is `file.py:12`, relative to the folder the program was started in where it lies below it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What was seen of a user's own program while it ran (profile -- python infer.py)."""

    modules: tuple[ModelCalls, ...] = ()
    loads: tuple[Load, ...] = ()
    syncs: tuple[CallSite, ...] = ()
    """Host waits for the device, by source line."""
    copies: tuple[CallSite, ...] = ()
    """Copies between host and device, by source line."""
    wall_s: float = 0.0
    """From the first moment of recording to the last."""
    overhead_s: float = 0.0
    """What observing itself took of that, by its own clock."""
    tracing_s: float = 0.0
    """What starting, stopping and writing a profiler took of it, where one ran; not in `overhead_s`."""
    notes: tuple[str, ...] = ()
    """What could not be observed, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCalls:
    """One root module of a script and its calls."""

    name: str
    module_class: str
    num_calls: int
    wall_s: float
    line: str = ""
    """Where it is called most often."""
    is_data_parallel: bool = False
    inputs: tuple[str, ...] = ()
    """Tensor specs of the commonest call."""
    device: str = ""
    """Where its first parameter lay at its last call: `cpu`, `cuda:0`; "" for a module without parameters."""
    typical_s: float | None = None
    """Median of its calls after the first; None under two calls. Host time: a GPU may still be at work when a call returns."""
    period_s: float | None = None
    """Median time from the start of one call to the start of the next, the first left out: an iteration of the program around the model. None under three calls."""
    first_s: float | None = None
    saved_inputs: str | None = None
    """File of the first call's tensors, for `--inputs`; None where none was asked for, or they could not be saved."""
    failure: str | None = None
    """What a call raised, in one line."""
    num_grad_calls: int = 0
    """Of its calls, those in eval mode that recorded a graph for gradients all the same: in training mode nobody can tell whether a backward pass comes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Weights read or moved: how often one line did it."""

    line: str
    what: str
    """`torch.load`, `load_file`, `load_state_dict`, `.to(device)`, `from_pretrained`."""
    count: int
    seconds: float
    bytes: float = 0.0
    in_calls: int = 0
    """How many of them happened while a model was being called."""
    at_start: int = 0
    """How many of them happened before any model was called: that is where loading belongs, in however many pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSite:
    """Calls of one kind from one source line."""

    line: str
    what: str
    count: int
    seconds: float
    bytes: float = 0.0
    in_calls: int = 0
    """How many of them happened while a model was being called."""
