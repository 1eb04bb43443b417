"""A unit's forward -> CUDA graphs of it, one a shape of its arguments, on the fixed addresses of its weights. What cannot be recorded runs as it is, and `notes` says so and why.

Copies and the waits for them stay outside: between two graphs runs the protocol of `streamer`. Nobody but the unit sees a graph's memory: arguments are copied in, results are clones,
so what a caller keeps stays as it is. Weights are read where they lie, which is where they will lie as long as the module is bound.

The first call of a shape runs as ever, and is watched (`looking`); the second is recorded; from the third on it is replayed. Units run one after the other, so all graphs compute in one
pool of memory, and units of one shape share the buffers of arguments and results.

torch.compile's own graphs do not do here: its backend `cudagraphs` takes parameters for arguments, so each replay would copy the weights; and what `reduce-overhead` hands out is
overwritten by the next forward, keys and values that a cache holds among them. With `--compile`, what is recorded is the code that Inductor made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from gpuopt.core.errors import OutOfMemory, ResourceError, Unsupported
from gpuopt.core.streaming import Ledger, Plan
from gpuopt.core.units import format_bytes
from gpuopt.programs.capture import Recorder
from gpuopt.streaming.arguments import Layout, Refused, copy_into, filled, flat
from gpuopt.streaming.looking import Look, is_same, look
from gpuopt.streaming.stages import uncompiled

SHAPES = 8
"""Of a unit's arguments. One whose arguments grow with each token is not looked at for ever, nor is memory taken for each."""
_NEW = object()
_DIFFERS = "what it returns is not laid out as the last time, for arguments that are"


def require_gpu(device: torch.device) -> None:
    """Raises Unsupported on anything but an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        raise Unsupported(
            "CUDA graphs run on an NVIDIA GPU, and this is " + ("the CPU or a device on paper" if device.type == "cpu" else device.type),
            fix="leave --graphs out, or stream to --device cuda",
        )


@functools.cache
def _recorder(device: str) -> Recorder:
    """One for all that is ever bound in this process: libraries keep a workspace for each stream that was recorded on, and never let go of it."""
    return Recorder(device)


class Graphs:
    """Those of all units of a bound module, and the memory they share. One forward at a time calls them."""

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        device: torch.device,
        *,
        recorder: Recorder | None = None,
        reserved_bytes: Callable[[], int] | None = None,
    ) -> None:
        """Raises Unsupported without a GPU.

        Parameters
        ----------
        module: bound already. Its parameters and buffers, wherever in it they are, may be read by every unit.
        recorder, reserved_bytes: of the device, or what stands in for it. `reserved_bytes`: what torch holds of its memory, without what it only keeps in reserve.
        """
        if recorder is None:
            require_gpu(device)
        self.device = device
        self.num_graphs = 0
        self.num_bytes = 0
        """Of the device's memory, by torch's allocator: what graphs compute in, their buffers, libraries' workspaces. The driver's own bytes are in a measured plan's context."""
        self.storages = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers()) if type(t.data) is torch.Tensor}
        self._plan = plan
        self._recorder = recorder or _recorder(str(device))
        self._reserved_bytes = reserved_bytes or self._reserved
        self._units: dict[str, Unit] = {}
        self._buffers: dict[Hashable, tuple[torch.Tensor, ...]] = {}
        self._queue: Any = None
        """The stream of the last replay."""

    def of(self, name: str, module: nn.Module, call: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        """What to call instead of `call`, a unit's forward. plain: the same before it was compiled."""
        found = self._units[name] = Unit(self, name, module, call, plain)
        return found.__call__

    @property
    def graphed(self) -> tuple[str, ...]:
        """Units of which there is a graph."""
        return tuple(name for name, unit in self._units.items() if unit.num_graphs)

    @property
    def refused(self) -> dict[str, tuple[str, ...]]:
        """Why some calls run without a graph -> whose."""
        found: dict[str, list[str]] = {}
        for name, unit in self._units.items():
            for reason in unit.reasons:
                found.setdefault(reason, []).append(name)
        return {reason: tuple(names) for reason, names in found.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """How many units have graphs and what they take; why others have none. Nothing before the first forward."""
        refused = self.refused
        if not self.num_graphs and not refused:
            return ()
        took = f": {self.num_graphs} graphs, {format_bytes(self.num_bytes)} of device memory" if self.num_graphs else ""
        said = [f"CUDA graphs of {len(self.graphed)} of {len(self._units)} units{took}"]
        for reason, names in refused.items():
            who = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
            said.append(f"without a CUDA graph, {who}: {reason}")
        return tuple(said)

    def close(self) -> None:
        """Free graphs and buffers. Harmless twice."""
        if self.num_graphs:
            self._recorder.synchronize()
        for unit in self._units.values():
            unit.close()
        self._units.clear()
        self._buffers.clear()
        self.num_graphs = self.num_bytes = 0

    # -- for units ----------------------------------------------------------------------------------------------------------------------------------

    def buffers(self, kind: str, layouts: tuple[Layout, ...]) -> tuple[torch.Tensor, ...]:
        """Memory for arguments (`in`) or results (`out`) of these layouts, whosever turn it is."""
        # What is made in inference mode is written there alone; compiled code is made for the one kind of tensor or the other.
        key = (kind, torch.is_inference_mode_enabled(), layouts)
        if key not in self._buffers:
            self._buffers[key] = tuple(layout.empty(self.device) for layout in layouts)
            self.num_bytes += sum(tensor.untyped_storage().nbytes() for tensor in self._buffers[key])
        return self._buffers[key]

    def take_turn(self) -> None:
        """A caller may compute on another stream than before: buffers are shared, so it waits for the last one."""
        queue = self._recorder.queue()
        if self._queue is not None and queue != self._queue:
            queue.wait_stream(self._queue)
        self._queue = queue

    def record(self, name: str, once: Callable[[], None]) -> Any:
        """A graph of `once`, replayed once. Raises OutOfMemory, ResourceError where it does not fit the plan, Refused for what cannot be recorded."""
        before = self._reserved_bytes()
        try:
            # The recording's stream has workspaces of its own; and compiled code is made for these very buffers here, for it cannot be while recording.
            self._recorder.run(once)
            self._reserved_bytes()  # what the allocator only keeps goes back first: a recording takes memory from the device alone
            graph, _ = self._recorder.record(once, nullcontext)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"a CUDA graph of {name} does not fit: {self.num_graphs} graphs hold {format_bytes(self.num_bytes)} by now ({str(error).splitlines()[0][:200]})",
                fix="leave --graphs out, or raise --budget",
            ) from error
        except RuntimeError as error:
            reason = _broken_by(error)
            if reason is None:
                raise
            raise Refused(f"CUDA cannot record it: {reason[:200]}") from error
        took = max(0, self._reserved_bytes() - before)
        try:
            _require_room(self._plan, self.num_bytes + took)
        except ResourceError:
            graph.reset()
            raise
        self.num_bytes += took
        self.num_graphs += 1
        return graph

    def _reserved(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)


class Unit:
    """One unit's forward and its graphs."""

    def __init__(self, owner: Graphs, name: str, module: nn.Module, call: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self.name = name
        self.reasons: dict[str, None] = {}
        """Why some calls ran without a graph."""
        self.num_graphs = 0
        self._owner = owner
        self._module = module
        self._call = call
        self._plain = plain
        self._known: dict[Hashable, Look | Recorded | None] = {}
        """Shape of arguments -> what its first call showed, or its graph; None: it cannot have one."""
        self._hooks = [hooks for each in module.modules() if each is not module for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        """Of its parts; its own run around its forward."""

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the forward."""
        if any(self._hooks):
            return self._ungraphed("one of its parts has a forward hook, and a replay runs no Python", args, kwargs)
        given: list[torch.Tensor] = []
        try:
            spec = flat((args, kwargs), given)
            layouts = tuple(Layout.of(tensor, self._owner.device) for tensor in given)
            # Which arguments are one tensor: a unit that hands an argument on hands on that one.
            shared = tuple(next(place for place, other in enumerate(given) if is_same(tensor, other)) for tensor in given)
            key = (spec, layouts, shared, _settings(self._owner.device))
        except Refused as why:
            return self._ungraphed(f"it is called with {why}", args, kwargs)
        found = self._known.get(key, _NEW)
        if found is None:
            return self._call(*args, **kwargs)
        if isinstance(found, Recorded):
            self._owner.take_turn()
            return found.replay(given)
        if isinstance(found, Look):
            self._owner.take_turn()
            return self._record(key, spec, layouts, found, given, args, kwargs)
        if len(self._known) >= SHAPES:
            return self._ungraphed(f"its arguments come in more than {SHAPES} shapes; the first ones may have graphs", args, kwargs)
        owner = self._owner
        outputs, seen = look(self._module, self._call, self._plain, args, kwargs, given, spec, layouts, owner.device, owner.storages)
        if isinstance(seen, str):
            self.reasons[seen] = None
        self._known[key] = seen if isinstance(seen, Look) else None
        return outputs

    def close(self) -> None:
        """Its graphs' memory is free. Nothing of them may run."""
        for found in self._known.values():
            if isinstance(found, Recorded):
                found.graph.reset()
        self._known.clear()
        self.num_graphs = 0
        self._call = self._plain = _closed

    def _ungraphed(self, reason: str, args: Any, kwargs: Any) -> Any:
        self.reasons[reason] = None
        return self._call(*args, **kwargs)

    def _record(
        self, key: Hashable, spec: Any, layouts: tuple[Layout, ...], seen: Look, given: Sequence[torch.Tensor], args: Any, kwargs: Any
    ) -> Any:
        taken, left = self._owner.buffers("in", layouts), self._owner.buffers("out", seen.layouts)
        static_args, static_kwargs = filled(spec, taken)

        def once() -> None:
            made: list[torch.Tensor] = []
            if flat(self._call(*static_args, **static_kwargs), made) != seen.spec:
                raise Refused(_DIFFERS)
            if tuple(Layout.of(made[place], self._owner.device) for place in seen.places) != seen.layouts:
                raise Refused(_DIFFERS)
            # What the call allocated is free for the next unit's graph then.
            for buffer, place in zip(left, seen.places, strict=True):
                copy_into(buffer, made[place])

        for buffer, tensor in zip(taken, given, strict=True):
            copy_into(buffer, tensor)
        try:
            graph = self._owner.record(self.name, once)
        except Refused as why:
            self._known[key] = None
            return self._ungraphed(str(why), args, kwargs)
        self.num_graphs += 1
        recorded = self._known[key] = Recorded(graph, taken, left, seen)
        return recorded.handed(given)


class Recorded:
    """A graph, the buffers it reads and those it writes."""

    __slots__ = ("_left", "_seen", "_taken", "graph")

    def __init__(self, graph: Any, taken: tuple[torch.Tensor, ...], left: tuple[torch.Tensor, ...], seen: Look) -> None:
        self.graph, self._taken, self._left, self._seen = graph, taken, left, seen

    def replay(self, given: Sequence[torch.Tensor]) -> Any:
        """Results for these arguments, in memory of their own."""
        for buffer, tensor in zip(self._taken, given, strict=True):
            copy_into(buffer, tensor)
        self.graph.replay()
        return self.handed(given)

    def handed(self, given: Sequence[torch.Tensor]) -> Any:
        """What the last replay left, laid out as the forward lays it out. An argument that is handed on is that argument."""
        seen = self._seen
        fresh = iter([layout.copy(buffer) for layout, buffer in zip(seen.layouts, self._left, strict=True)])
        return filled(seen.spec, [next(fresh) if index is None else given[index] for index in seen.passed])


def _settings(device: torch.device) -> Hashable:
    """What else decides on kernels and may change from one call to the next. Others (TF32) are as they were when a graph was recorded."""
    if torch.is_autocast_enabled(device.type):
        # It keeps casts of weights, whose memory a graph would go on reading.
        raise Refused("autocast on")
    sdp = torch.backends.cuda
    return (
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        sdp.flash_sdp_enabled(),
        sdp.mem_efficient_sdp_enabled(),
        sdp.math_sdp_enabled(),
        sdp.cudnn_sdp_enabled(),
    )


def _require_room(plan: Plan, num_bytes: int) -> None:
    """Raises ResourceError, with the numbers, where graphs and what is on the device anyhow exceed the budget."""
    ledger: Ledger = plan.ledger
    beside = ledger.fixed + ledger.residents + ledger.slots + ledger.cache + ledger.context
    # A plan that was measured has graphs among its activations.
    total = beside + max(ledger.activations, num_bytes)
    if plan.budget_bytes and total > plan.budget_bytes:
        raise ResourceError(
            f"CUDA graphs take {format_bytes(num_bytes)}, and with {format_bytes(beside)} of weights, cache and context that is {format_bytes(total)}: "
            f"more than the {format_bytes(plan.budget_bytes)} of the budget",
            fix=f"a budget {format_bytes(total - plan.budget_bytes)} larger, fewer shapes of inputs, or leave --graphs out",
        )


def _broken_by(error: BaseException) -> str | None:
    """What CUDA said when a recording broke off, the first of it; None: the error is the forward's own."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return next((line.strip() for each in reversed(chain) for line in str(each).splitlines() if "captur" in line), None)


def _closed(*_args: Any, **_kwargs: Any) -> Any:
    raise AssertionError("a unit was called after its graphs were closed")
