"""A module, a plan and an engine -> the same module with its weights streamed: parameters become views of slots once, forwards run the protocol, and `close` gives everything back.

A parameter's `.data` is set when the module is bound and never again: what looked at it (guards of torch.compile, the addresses in a CUDA graph) stays right. The protocol runs around
each unit's `forward`, outside what is compiled: a compiled block has no hook in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import nn

from gpuopt.core.errors import BadInput, ResourceError, UsageError
from gpuopt.core.streaming import Plan, Unit
from gpuopt.streaming import guards
from gpuopt.streaming.engines import Engine, Fill, Filler, HostBuffer, Source
from gpuopt.streaming.graphed import Graphs, require_gpu
from gpuopt.streaming.parameters import Tensors
from gpuopt.streaming.reaching import Watch
from gpuopt.streaming.shelf import Shelf
from gpuopt.streaming.slabs import Held, Slab, Staged, bits_of, checksum
from gpuopt.streaming.slabs import fill as fill_slab
from gpuopt.streaming.stages import Stage, compile_all, uncompiled
from gpuopt.streaming.streamer import Streamer

_UNWATCHED = nullcontext()
_unseen = torch._C.DisableTorchFunction
"""Around what fills slots, which is no function of the model's: a watched forward looks away."""


def bind(
    module: nn.Module,
    plan: Plan,
    engine: Engine,
    sources: Mapping[str, Source] | None = None,
    fill: Fill | Filler | None = None,
    *,
    poison: bool = False,
    audit: bool = False,
    shelf: Shelf | None = None,
) -> Bound:
    """Stream a module's weights from now on, in place. The module is called as ever, one forward at a time, in eval mode without gradients.

    Parameters
    ----------
    sources: streamed unit -> who has its bytes, for units that are not to be kept in host memory of ours. They stay the caller's to close.
    fill: for a module on the meta device: writes a tensor's true values (or has a method `fill` that does, and `fill_unit` for a slab at once). Names are those of the plan,
        and of buffers.
    poison, audit: as `Streamer`'s, to look for races.
    shelf: where slabs lie that the next binding will want again. It stays the caller's to close, after this binding. None: slabs live as long as the binding.

    Raises BadInput where the plan is not this module's, UsageError in training mode, OutOfMemory, ResourceError. The module is as before then.
    """
    bound = Bound(module, plan, engine, shelf)
    try:
        with torch.inference_mode(False), torch.no_grad():
            bound._bind(dict(sources or {}), fill, poison=poison, audit=audit)
    except BaseException:
        bound.close()
        raise
    return bound


class Bound:
    """A streamed module. A context manager: leaving it closes it."""

    streamer: Streamer
    """Counts copies, bytes and demand fetches."""

    def __init__(self, module: nn.Module, plan: Plan, engine: Engine, shelf: Shelf | None = None) -> None:
        self.module = module
        self.plan = plan
        """As it came out: a unit that could not be locked is `pageable`."""
        self.engine = engine
        self.checksums: dict[str, int] = {}
        """Unit -> of the slab it was filled with, as `slabs.checksum`. None of units with a source of their own."""
        self.graphs: Graphs | None = None
        """Of units, with `--graphs`."""
        self._said: tuple[str, ...] = ()
        self._units = {unit.name: unit for unit in plan.anatomy.units}
        self._tensors = Tensors(module, plan.anatomy)
        self._had_values: dict[str, bool] = {}
        """Of units with a source of their own: whether the module held them before."""
        self._sources: dict[str, Source] = {}
        self._ours: list[Source] = []
        self._own_shelf = Shelf(keep_residents=False) if shelf is None else None
        self._shelf = shelf if shelf is not None else self._own_shelf or Shelf()
        self._homes: dict[str, HostBuffer] = {}
        """Of streamed units, on the shelf."""
        self._residents: dict[str, Slab] = {}
        self._read_last: Slab | None = None
        self._stages: list[Stage] = []
        self._turn = guards.Turn()
        self._writes = guards.Writes({})
        self._undo = ExitStack()
        """Forwards and guards."""
        self._watch: Watch | None = None
        """Of the first forward, before and while it runs."""
        self._is_open = True

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not come out as planned; and of CUDA graphs, once there was a forward, which units have one."""
        return self._said if self.graphs is None else (*self._said, *self.graphs.notes)

    @property
    def num_units(self) -> int:
        """Streamed units."""
        return len(self.plan.binding)

    @property
    def pinned_bytes(self) -> int:
        """Of host memory, locked for this plan: slabs, and the ring before those that are not."""
        rings = (source.ring_bytes for source in self._ours if isinstance(source, Staged))
        return sum(home.bytes.numel() for home in self._homes.values() if home.pinned) + sum(rings)

    @property
    def pinned_units(self) -> int:
        """Of them, those whose slab is locked."""
        return sum(1 for name in self.plan.binding if self.plan.homes.get(name) == "pinned")

    def __enter__(self) -> Bound:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- binding -----------------------------------------------------------------------------------------------------------------------------------

    def _bind(self, sources: dict[str, Source], fill: Fill | Filler | None, *, poison: bool, audit: bool) -> None:
        if self.module.training:
            raise UsageError("the model is in training mode", fix="call model.eval() before streaming")
        if self.plan.spec.graphs:
            require_gpu(self.engine.device)
        empty = self._tensors.unfilled(sources) if fill is None else None
        if empty is not None:
            raise UsageError(f"{empty} is on the meta device and nothing says what its values are", fix="pass fill=")
        given: Any = fill
        write: Fill = self._own if fill is None else getattr(given, "fill", given)
        self._write_unit: Callable[[Unit, torch.Tensor], int] = functools.partial(_filled, write, getattr(fill, "fill_unit", None))
        self._tensors.settle(self.engine.device, write, keep=self._shelf.keep_residents)
        if any(home != "pinned" for home in self.plan.homes.values()):
            self._shelf.unlock_others({name for name, home in self.plan.homes.items() if home == "pinned"})
        for name in self.plan.resident:
            self._settle(self._units[name])
        for name in self.plan.binding:
            self._house(self._units[name], sources)
        self._take_sources(sources)
        self.streamer = Streamer(self.plan, self.engine, self._sources, poison=poison, audit=audit)
        for name, lane in self.streamer.lanes.items():
            self._tensors.point(self._units[name], Slab(lane.unit, lane.slot.buffer))
        self._writes = guards.Writes({p.name: self._tensors.parameter(p.name) for n in self.plan.binding for p in self._units[n].places})
        self._guard()
        self._wrap()
        self.streamer.start_forward()
        self.streamer.forwards = 0
        self._watch = Watch({name: lane.slot.buffer for name, lane in self.streamer.lanes.items()}) if self.streamer.lanes else None
        if self.plan.spec.compile:
            self.compile()
        if self.plan.spec.graphs:
            self.record()

    def _own(self, name: str, target: torch.Tensor) -> None:
        """Writes a parameter of the module's own, and looks whether it arrived."""
        source = self._tensors.parameter(name).detach()
        target.copy_(source)
        if bits_of(target) != bits_of(source):
            raise ResourceError(f"{name} was copied to host memory and is not the same there", fix="check this machine's memory")

    def _housed(self, unit: Unit, *, pin: bool) -> HostBuffer:
        """The unit's slab on the shelf; written now, unless it lies there and the module has its weights from there. The module's own memory is free for the next one's then."""
        home = self._shelf.find(unit)
        if home is not None and self._tensors.lies_in(unit, home.bytes):
            if pin:
                self.engine.lock(home)
            self.checksums[unit.name] = self._shelf.checksums[unit.name]
            return home
        if home is None:
            home = self.engine.home(unit.num_bytes, pin=pin)
        elif pin:
            self.engine.lock(home)
        try:
            self.checksums[unit.name] = self._write_unit(unit, home.bytes)
        except BaseException:
            self._shelf.drop(unit.name)
            home.close()
            raise
        self._shelf.put(unit, home, self.checksums[unit.name])
        self._tensors.point(unit, Slab(unit, home.bytes))
        return home

    def _settle(self, unit: Unit) -> None:
        """A resident unit: laid out as in a slot, so that it is computed with the same kernels."""
        home = self._housed(unit, pin=False)
        slab = Slab(unit, self.engine.slot(unit.num_bytes))
        slab.bytes.copy_(home.bytes)
        if checksum(slab.bytes) != self.checksums[unit.name]:
            raise BadInput(f"{unit.name} arrived on the device with other bytes", fix="check this machine's memory and its link")
        self._tensors.point(unit, slab)
        self._residents[unit.name] = slab
        if not self._shelf.keep_residents:
            self._shelf.drop(unit.name)

    def _house(self, unit: Unit, sources: Mapping[str, Source]) -> None:
        """A streamed unit: its bytes go to a slab."""
        if unit.name in sources:
            self._had_values[unit.name] = not any(self._tensors.parameter(place.name).is_meta for place in unit.places)
            return
        wanted = self.plan.homes.get(unit.name, "pinned")
        if wanted == "disk":
            raise UsageError(f"the plan reads {unit.name} from a disk", fix="pack the model and pass --disk DIR")
        self._homes[unit.name] = self._housed(unit, pin=wanted == "pinned")

    def _take_sources(self, given: dict[str, Source]) -> None:
        locked = {name: home for name, home in self._homes.items() if home.pinned}
        pageable = {name: home for name, home in self._homes.items() if not home.pinned}
        self._sources = dict(given)
        if pageable:
            self._ours.append(self._staged(locked, pageable))
            self._sources |= dict.fromkeys(pageable, self._ours[-1])
        if locked:
            self._ours.append(Held(locked))
            self._sources |= dict.fromkeys(locked, self._ours[-1])
        refused = sum(1 for name in pageable if self.plan.homes.get(name, "pinned") == "pinned")
        self.plan = replace(self.plan, homes={**self.plan.homes, **dict.fromkeys(locked, "pinned"), **dict.fromkeys(pageable, "pageable")})
        if refused:
            said = f"{self.pinned_units} of {self.num_units} units pinned: the system would not lock {refused}; the host copies those to locked memory first"
            self._said = (*self._said, said)

    def _staged(self, locked: dict[str, HostBuffer], pageable: dict[str, HostBuffer]) -> Staged:
        """The ring in front of pageable slabs. Where slabs have used up what may be locked, the last of them make room."""
        while True:
            try:
                return Staged(self.engine, pageable)
            except ResourceError:
                if not locked:
                    raise
                name, home = locked.popitem()
                home.unpin()
                pageable[name] = home

    # --- a forward ---------------------------------------------------------------------------------------------------------------------------------

    def _guard(self) -> None:
        owned: dict[str, dict[str, str]] = {}
        for name in self.plan.binding:
            for place in self._units[name].places:
                parent, _, local = place.name.rpartition(".")
                owned.setdefault(parent, {})[local] = place.name
        self._undo.callback(guards.install(self.module, owned, self.read, self.engine.device))

    def _wrap(self) -> None:
        """Forwards of the model and of streamed units run the protocol. Residents run as they are, but for a simulated clock; so does a model that fits."""
        if not self.plan.binding and not self.engine.listens:
            return
        self._stage("", self.module, None)
        for name in self._units:
            if name in self.plan.binding or self.engine.simulated:
                lane = self.streamer.lanes.get(name)
                self._stage(name, self.module.get_submodule(name), lane.slot.buffer if lane else None)

    def _stage(self, name: str, module: nn.Module, slot: torch.Tensor | None) -> None:
        stage = Stage(name, module, module.forward, module.forward, slot)
        self._stages.append(stage)
        self._undo.callback(guards.put(module, "forward", self._around(stage)))

    def _around(self, stage: Stage) -> Callable[..., Any]:
        @functools.wraps(stage.call)
        def forward(*args: Any, **kwargs: Any) -> Any:
            generation, segment = self._enter(stage)
            try:
                with _UNWATCHED if self._watch is None else self._watching(stage):
                    outputs = stage.call(*args, **kwargs)
                self._leave(stage, segment)
            except BaseException as error:  # Ctrl-C within a forward as well
                self._broken(generation, error)
                raise
            return outputs

        # This frame alone is left to Python when somebody compiles around it: what it calls may be compiled.
        return torch.compiler.disable(forward, recursive=False)  # type: ignore[no-any-return]

    @contextmanager
    def _watching(self, stage: Stage) -> Iterator[None]:
        """The first forward of the model, and the units in it."""
        watch = self._watch
        assert watch is not None
        if stage.name:
            watch.running.append(stage.name)
            try:
                yield
            finally:
                watch.running.pop()
            return
        watch.running.clear()
        with watch:
            yield
        self._watch = None  # after a whole forward: one that was refused is refused again

    @uncompiled
    def _enter(self, stage: Stage) -> tuple[int, AbstractContextManager[Any]]:
        self._turn.take()
        try:
            guards.refuse_training(stage.module)
            with _unseen():
                if not stage.name:
                    self._writes.refuse()
                    self._read_last = None
                    self.streamer.start_forward()
                elif stage.slot is not None:
                    self.streamer.before(stage.name)
                segment = self.engine.segment(stage.name, stage.slot)
                segment.__enter__()
        except BaseException:
            self._turn.give()
            raise
        return self.streamer.generation, segment

    @uncompiled
    def _leave(self, stage: Stage, segment: AbstractContextManager[Any]) -> None:
        with _unseen():
            segment.__exit__(None, None, None)
            if stage.slot is not None:
                self.streamer.after(stage.name)
        self._turn.give()

    @uncompiled
    def _broken(self, generation: int, error: BaseException) -> None:
        try:
            # A forward within a forward breaks off with it, once.
            if self.streamer.generation == generation:
                with _unseen():
                    self.streamer.abort()
        except RuntimeError as second:  # a device that is lost answers everything so; the first error says why
            error.add_note(f"and the streams could not be drained: {second}")
        finally:
            self._turn.give()

    def compile(self, **options: Any) -> None:
        """`torch.compile` each unit's forward, streamed or resident; what runs around it stays outside, so `fullgraph=True` holds. Options are torch.compile's."""
        self._refuse_closed()
        self._watch = None  # compiled code, and a recording, are no operations that could be watched
        if self.graphs is not None:
            raise UsageError("the units' CUDA graphs are of what they were before", fix="compile() first, or plan with --compile --graphs")
        self._undo.callback(compile_all(self._all_units(), options))

    def record(self, graphs: Graphs | None = None) -> None:
        """CUDA graphs of each unit's forward, compiled or not, streamed or resident, from its second call of a shape on. graphs: on another device than a GPU, for tests.

        Raises Unsupported without a GPU.
        """
        self._refuse_closed()
        if self.graphs is not None:
            raise UsageError("the units have CUDA graphs already", fix="call record() once")
        self._watch = None
        self.graphs = graphs or Graphs(self.module, self.plan, self.engine.device)
        self._undo.callback(self.graphs.close)
        for stage in self._all_units():
            stage.call = self.graphs.of(stage.name, stage.module, stage.call, stage.forward)

    def _all_units(self) -> list[Stage]:
        """Residents' too, which run without a stage as long as nothing is to be done about them."""
        wrapped = {stage.name for stage in self._stages}
        for name in self._units:
            if name not in wrapped:
                self._stage(name, self.module.get_submodule(name), None)
        return [stage for stage in self._stages if stage.name]

    # --- reading and giving back -------------------------------------------------------------------------------------------------------------------

    def read(self, name: str) -> torch.Tensor:
        """The true values of a parameter, on the CPU: a view of the host's slab, or read from where its unit comes from."""
        self._refuse_closed()
        for unit in self._units.values():
            for place in unit.places:
                if place.name == name:
                    if unit.name in self._sources:
                        # A disk is read once for all of a unit's parameters, which are asked for one after the other; by several threads maybe, and a forward forgets it.
                        last = self._read_last
                        if last is None or last.unit is not unit:
                            last = self._read_last = Slab(unit, self._sources[unit.name].read(unit.name))
                        return last.view(place)
                    return self._residents[unit.name].view(place).to("cpu")
        raise UsageError(f"no unit has a parameter {name!r}", fix="name one of module.named_parameters()")

    def _refuse_closed(self) -> None:
        if not self._is_open:
            raise UsageError("the model is not streamed any more", fix="stream it again")

    def close(self) -> None:
        """Stop streaming: weights are the module's own again, on the CPU, and the device's memory is free. Harmless twice.

        Units whose source was given and that the module never held (a disk's, larger than memory) are on the meta device again.
        """
        if not self._is_open:
            return
        self._is_open = False
        # From the last to the first, and each even where one before it failed: the module first, what it was given back from after it.
        with ExitStack() as closing:
            closing.callback(self._forget)
            if self._own_shelf is not None:
                closing.callback(self._own_shelf.close)
            for source in self._ours:
                closing.callback(source.close)
            closing.callback(self._give_back)
            closing.callback(self._undo.close)

    def _forget(self) -> None:
        """Nothing keeps the device's memory, or the host's."""
        self._stages.clear()
        self._residents.clear()
        self._read_last = None
        self._sources, self._ours, self._homes = {}, [], {}
        if hasattr(self, "streamer"):
            self.streamer.forget()
            del self.streamer
        # It refers back to this object, which a ring of references would keep alive, and the device's memory with it, until the garbage collector comes by.
        self._write_unit = _written_already

    @torch.inference_mode(False)
    @torch.no_grad()
    def _give_back(self) -> None:
        tensors = self._tensors
        self.engine.drain()
        for name in self.plan.binding:
            unit = self._units[name]
            home = self._shelf.find(unit)
            if name in self._homes and home is not None:
                tensors.point(unit, Slab(unit, home.bytes))
            elif name in self._sources and hasattr(self, "streamer"):
                # What never was in host memory need not fit there.
                if self._had_values[name]:
                    tensors.point(unit, Slab(unit, self._sources[name].read(name)))
                else:
                    tensors.empty(unit)
        for slab in self._residents.values():
            kept = self._shelf.find(slab.unit)
            tensors.point(slab.unit, Slab(slab.unit, slab.bytes.to("cpu") if kept is None else kept.bytes))
        tensors.unsettle()


def _written_already(unit: Unit, target: torch.Tensor) -> int:
    raise AssertionError(f"{unit.name} was to be written into {target.numel()} bytes after closing")


def _filled(write: Fill, write_unit: Callable[[Unit, torch.Tensor], None] | None, unit: Unit, target: torch.Tensor) -> int:
    """The checksum of the slab, written whole where that can be done."""
    if write_unit is None:
        return fill_slab(unit, target, write)
    write_unit(unit, target[: unit.num_bytes])
    return checksum(target[: unit.num_bytes])
