"""In the child: a model named, planned, bound and called, streamed or whole. Each method is one step of `gpuopt stream`. Imports torch."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from gpuopt.core.errors import OutOfMemory, Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.registry import resolve
from gpuopt.core.spec import Candidate
from gpuopt.core.streamed import StreamRequest, StreamSpan
from gpuopt.core.streaming import Anatomy, Calibration, Plan, StreamSpec
from gpuopt.devices import info
from gpuopt.loaders import inputs as input_maker
from gpuopt.pipeline import environment, hostmemory
from gpuopt.pipeline.facts import ProgressCall
from gpuopt.pipeline.streamed import files, rivals, verified
from gpuopt.pipeline.streamed import model as stream_model
from gpuopt.pipeline.streamed.calls import Work, cache_bytes, rings_of, timed
from gpuopt.pipeline.streamed.device import StreamDevice, made_up, parse
from gpuopt.pipeline.streamed.facts import Answer, Checked, Meters, Opened, PackedFolder, Plained, Planned, Ready, Timed
from gpuopt.pipeline.streamed.plain import Plain, plainly
from gpuopt.pipeline.streamed.rivals.resident import whole
from gpuopt.streaming import anatomy as anatomies
from gpuopt.streaming import bound as binding
from gpuopt.streaming import disk, hostpages, meta, packed, planner, timeline
from gpuopt.streaming.engines import ENGINES
from gpuopt.streaming.graphed import require_gpu
from gpuopt.streaming.shelf import Shelf
from gpuopt.streaming.stages import compiled

WARM_CALLS = 3
SHELF_SHARE = 0.8
"""Of the host memory that is available: what all units together may take of it, residents' too, for weights that are read from files."""
ELASTIC = 0.85
"""Of the budget, after running out of memory within it."""


class StreamSession:
    """One model on one device. The order is load, then any of plan, bind, resident, rival, verify and pack."""

    def __init__(self, progress: ProgressCall | None = None) -> None:
        self._progress: ProgressCall = progress or (lambda fraction, note: None)
        self._stack = contextlib.ExitStack()
        """What runs the model now: bound, or on the device."""
        self._weights: Any = None
        self._available_bytes = self._room_bytes = 0
        """Of host memory: when the model was loaded, and with what it holds itself."""
        self._others_bytes = 0
        """Of the device's memory, held by others before this process touched it."""
        self._baseline_bytes: int | None = None
        """Of the device's memory, allocated in this process before this session did anything."""
        self._anatomies: dict[tuple[str, str], Anatomy] = {}
        self._calibrations: dict[tuple[str, str, bool, bool], Calibration] = {}
        self._plans: dict[StreamSpec, Plan] = {}
        self._gpu: Any = None
        """The device's engine, one for all plans: what it locked once stays locked."""
        self._shelf: Shelf | None = None
        self._shelf_key: tuple[str, str] | None = None
        self._is_live = False
        """A caller's module, whose host memory is freed for what is resident."""
        self._engine: Any = None
        self._bound: Any = None
        self._plain: Plain | None = None
        """The module before it was bound, where nothing is streamed."""
        self._aside = contextlib.ExitStack()
        """What plain eager needs beside what is bound."""
        self._bounds: list[Any] = []
        """Whatever is bound and not closed yet, in whosever hands."""

    def __enter__(self) -> StreamSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # -- load -------------------------------------------------------------------------------------------------------------------------------------

    def load(self, candidate: Candidate, request: StreamRequest) -> Opened:
        """Open the model, with its weights where they lie, and make its inputs. Raises what the loader of its form raises, UsageError, Unavailable."""
        began = time.monotonic()
        hostmemory.return_at_once()
        self._device = parse(candidate.device)
        if not self._device.is_simulated:
            found = info.resolve(self._device.id)
            if not found.startswith("cuda"):
                raise UsageError(
                    "there is no CUDA device here to stream to", fix="--device simulated plans and runs with a device on paper"
                )
            self._device = StreamDevice(id=found)
            self._others_bytes = info.memory_held(found) or 0
        self._available_bytes = hostpages.available_bytes()
        self._progress(None, "loading the model")
        model, self._weights = stream_model.opened(candidate, hollow=request.action == "plan" and self._device.is_simulated)
        return self._adopt(candidate, request, model, began)

    def adopt(self, candidate: Candidate, request: StreamRequest, model: Model, device: StreamDevice, inputs: Inputs) -> Opened:
        """The same for a live module, whose memory is freed as its weights move. Without inputs its compute is estimated."""
        self._device, self._available_bytes, self._is_live = device, hostpages.available_bytes(), True
        self._weights = meta.empty(model.module)
        return self._adopt(candidate, request, model, time.monotonic(), inputs)

    def aim(self, candidate: Candidate, request: StreamRequest) -> Opened:
        """The same model with other inputs: what was measured with those before does not hold, and weights stay where they are."""
        self.release()
        self._calibrations.clear()
        self._plans.clear()
        return self._adopt(candidate, request, self._model, time.monotonic())

    def _adopt(self, candidate: Candidate, request: StreamRequest, model: Model, began: float, inputs: Inputs | None = None) -> Opened:
        if model.form != "module":
            raise Unsupported(f"streaming moves the weights of a PyTorch module, and this is {model.form}", fix="name the source model")
        self._model, self._module = model, model.module
        made = inputs if inputs is not None else input_maker.make(model, candidate.inputs, dict(candidate.dims), "cpu", None)
        where = "cpu" if self._device.is_simulated else self._device.id
        if self._baseline_bytes is None:
            self._baseline_bytes = 0 if self._device.is_simulated else torch.cuda.memory_allocated(where)
        self._work = Work(module=self._module, inputs=made.map(lambda t: t.to(where)), device=where, new_tokens=request.generate)
        anatomy = self._dissected(StreamSpec())
        # What the module holds itself is let go of block by block, as each is laid out. Memory that was looked at before the model was loaded counts that as free already.
        own = sum(p.numel() * p.element_size() for p in self._module.parameters() if p.device.type == "cpu" and not p.is_meta)
        self._room_bytes = self._available_bytes + (min(own, hostpages.anonymous_bytes()) if self._is_live else 0)
        return Opened(
            environment=environment.describe(),
            device=None if self._device.is_simulated else info.describe(self._device.id),
            device_text=str(self._device),
            name=model.name,
            dtype=model.dtype,
            num_parameters=model.num_parameters,
            weight_bytes=anatomy.weight_bytes,
            inputs=tuple(str(replace(s, high=None, fill=None).bind(dict(made.dims))) for s in made.specs),
            signature=tuple(str(s) for s in made.specs),
            input_source=made.source,
            dims=dict(made.dims),
            workload=self._work.words,
            load_s=time.monotonic() - began,
            notes=(*model.notes, *self._weights.notes),
        )

    def _dissected(self, spec: StreamSpec) -> Anatomy:
        key = (spec.granularity, spec.embed)
        if key not in self._anatomies:
            self._anatomies[key] = anatomies.dissect(self._module, spec.granularity, spec.embed)
        return self._anatomies[key]

    # -- plan -------------------------------------------------------------------------------------------------------------------------------------

    def plan(self, spec: StreamSpec) -> Planned:
        """The plan for a budget, and a picture of a forward. Calibrates once a granularity. Raises ResourceError where the budget is too small, with the numbers."""
        made = self._plan(spec)
        shown = planner.shown(made)
        spans = tuple(StreamSpan(queue=s.stream, unit=s.unit, start_ms=s.start_ms, end_ms=s.end_ms) for s in shown.spans)
        return Planned(plan=made, spans=spans)

    def _plan(self, spec: StreamSpec) -> Plan:
        self.release()
        if spec not in self._plans:
            if spec.graphs:
                require_gpu(torch.device(self._device.id if not self._device.is_simulated else "cpu"))
            anatomy = self._dissected(spec)
            self._plans[spec] = planner.plan(anatomy, spec, self._calibrated(anatomy, spec), available_host_bytes=self._room_bytes)
        return self._plans[spec]

    def _calibrated(self, anatomy: Anatomy, spec: StreamSpec) -> Calibration:
        key = (spec.granularity, spec.embed, spec.compile, spec.graphs)
        if key not in self._calibrations:
            self._calibrations[key] = self._calibration(anatomy, spec)
        return self._calibrations[key]

    def _calibration(self, anatomy: Anatomy, spec: StreamSpec) -> Calibration:
        work = self._work
        cache = cache_bytes(self._module, work.inputs, work.new_tokens)
        rings = rings_of(self._module, anatomy, work.new_tokens)
        if self._device.is_simulated:
            return made_up(
                self._device, anatomy, tokens=work.tokens, workload=work.words, cache_bytes=cache, rings=rings, waits=bool(work.new_tokens)
            )
        from gpuopt.pipeline.streamed import measured

        engine = self._cuda()
        if spec.disk is not None or not work.has_inputs:
            # Timing the units would bring all of them into host memory, which is what there is a disk for.
            return measured.estimated(engine, anatomy, spec, work, cache_bytes=cache, rings=rings)
        return measured.measured(
            self._module,
            anatomy,
            spec,
            engine,
            work.call,
            brief=work.brief,
            fill=self._fill(),
            shelf=self._shelf_for(spec, anatomy),
            workload=work.words,
            skip_prompt=bool(work.new_tokens),
            cache_bytes=cache,
            others_bytes=self._others_bytes,
            baseline_bytes=self._baseline_bytes or 0,
            progress=self._progress,
        )

    def _cuda(self) -> Any:
        if self._gpu is None:
            self._gpu = resolve(ENGINES, "cuda", kind="engine")(self._device.id)
        return self._gpu

    def _shelf_for(self, spec: StreamSpec, anatomy: Anatomy) -> Shelf | None:
        """Where slabs stay from one plan to the next; None with a disk, which is for hosts that have no room for that."""
        if spec.disk is not None:
            return None
        key = (spec.granularity, spec.embed)
        if self._shelf is None or key != self._shelf_key:
            if self._shelf is not None:
                self._shelf.close()
            is_read = not any(parameter.is_meta for parameter in self._module.parameters())
            keep = is_read or anatomy.weight_bytes <= SHELF_SHARE * self._room_bytes
            self._shelf, self._shelf_key = Shelf(keep_residents=keep), key
        return self._shelf

    def _fill(self) -> Any:
        """Who writes a parameter's values: its file where it has none yet. None: the module has all of them, and lets go of each when it is pointed elsewhere."""
        own = dict(self._module.named_parameters(remove_duplicate=False))
        if not any(parameter.is_meta for parameter in own.values()):
            return None

        def fill(name: str, target: torch.Tensor) -> None:
            known = own.get(name)
            if known is None or known.is_meta:
                self._weights.fill(name, target)
            else:  # a binding that broke off had come as far as this one
                target.copy_(known.detach())

        return fill

    # -- run --------------------------------------------------------------------------------------------------------------------------------------

    def bind(self, spec: StreamSpec) -> Ready:
        """Stream from now on. Raises what planning raises, OutOfMemory; with `elastic`, only after a second try with fewer residents."""
        try:
            return self._bind(spec)
        except (OutOfMemory, torch.OutOfMemoryError) as error:
            if not spec.elastic:
                raise
            self.release()
            less = _lowered(spec)
            ready = self._bind(less)
            said = str(error).splitlines()[0][:200]
            return replace(
                ready, notes=(*ready.notes, f"out of memory at first ({said}): the budget was lowered to {ELASTIC:.0%} of what was asked")
            )

    def _bind(self, spec: StreamSpec) -> Ready:
        plan = self._plan(spec)
        began = time.monotonic()
        self._progress(None, f"laying {len(plan.binding)} of {len(plan.anatomy.units)} units out in host memory")
        if not self._device.is_simulated and not self._is_live:  # a live module's process has other things to allocate
            from gpuopt.pipeline.streamed import measured

            self._stack.enter_context(measured.held_to(plan, self._device.id))
        plain = None if plan.binding or self._is_live else Plain(self._module)
        bound = self._bound = self._stack.enter_context(self._streamed(plan))
        if plain is not None:
            plain.note()
        self._plain = plain
        setup_s = time.monotonic() - began
        notes = tuple(bound.notes)  # of binding alone: what graphs have to say is asked for after the calls
        if spec.elastic:
            for _ in range(2 if spec.graphs else 1):  # what a call needs shows when it is made; graphs are recorded in the second
                self._work.call()
        return Ready(
            setup_s=setup_s,
            plan=bound.plan,
            pinned_bytes=bound.pinned_bytes,
            clock="simulated" if self._device.is_simulated else "cuda-event",
            notes=notes,
        )

    @contextlib.contextmanager
    def _streamed(self, plan: Plan, *, engine: Any = None, poison: bool = False, audit: bool = False) -> Any:
        """Bound for as long as it is entered; the weights are the module's own again after it."""
        self._engine = engine if engine is not None else self.engine(plan)
        with contextlib.ExitStack() as stack:
            sources: dict[str, Any] = {}
            on_disk = [unit for unit in plan.anatomy.units if plan.homes.get(unit.name) == "disk"]
            if on_disk:
                if plan.spec.disk is None:
                    raise UsageError("the plan reads from a disk, and none is named", fix="--disk FOLDER")
                folder = stack.enter_context(packed.opened(plan.spec.disk, anatomy=plan.anatomy, weights=self._weights.fingerprint()))
                ring = disk.Ring(self._engine, folder, on_disk, num_buffers=timeline.DISK_BUFFERS)
                stack.callback(ring.close)
                sources = {unit.name: ring for unit in on_disk}
            shelf = self._shelf_for(plan.spec, plan.anatomy)
            if shelf is not None and self._is_live:
                shelf.keep_residents = False
            bound = binding.bind(self._module, plan, self._engine, sources, self._fill(), poison=poison, audit=audit, shelf=shelf)
            self._bounds.append(bound)
            stack.callback(self._unbind, bound)
            yield bound

    def _unbind(self, bound: Any) -> None:
        bound.close()
        if bound in self._bounds:
            self._bounds.remove(bound)

    def engine(self, plan: Plan, *, schedule: str | None = None, seed: int | None = None) -> Any:
        """Of this session's device. schedule, seed: of copies on paper; on a real device a seed makes both queues sleep at random."""
        if not self._device.is_simulated:
            return self._cuda() if seed is None else resolve(ENGINES, "cuda", kind="engine")(self._device.id, sleeps=seed)
        known = plan.calibration
        return resolve(ENGINES, "simulated", kind="engine")(
            known.link_bytes_per_s,
            known.compute_ms,
            schedule or self._device.schedule,
            self._device.seed if seed is None else seed,
            pageable_bytes_per_s=known.pageable_bytes_per_s,
            disk_bytes_per_s=known.disk_bytes_per_s,
            disk_buffers=timeline.DISK_BUFFERS,
            host_ms=known.host_ms,
            host_waits=known.host_waits,
        )

    def resident(self, spec: StreamSpec) -> Ready:
        """Everything on the device, as it would be run if it fit. Raises ResourceError where it does not."""
        self.release()
        began = time.monotonic()
        if self._device.is_simulated:
            plan = self._plan(replace(spec, budget_bytes=None, budget_share=1.0, pin_limit_bytes=None, disk=None))
            self._stack.enter_context(self._streamed(plan))
            return Ready(setup_s=time.monotonic() - began, clock="simulated")
        self._require_values()
        anatomy = self._dissected(spec)
        self._stack.enter_context(whole(self._module, self._device.id, anatomy.weight_bytes))
        self._stack.enter_context(self._compiled(anatomy, spec))
        return Ready(setup_s=time.monotonic() - began, clock="cuda-event")

    def rival(self, name: str, spec: StreamSpec, weight_bytes: int) -> Ready:
        """Another library's way at as many bytes of weights on the device. Raises Unavailable without its packages, Unsupported on paper and for what it cannot run."""
        if self._device.is_simulated:
            raise Unsupported("other libraries move weights to a real device", fix="--device cuda")
        rivals.require(name)
        self.release()
        self._require_values()
        began = time.monotonic()
        setting = self._stack.enter_context(rivals.running(name, self._module, self._device.id, weight_bytes, self._dissected(spec)))
        torch.cuda.reset_peak_memory_stats(self._device.id)
        return Ready(setup_s=time.monotonic() - began, clock="cuda-event", notes=(setting,))

    def _require_values(self) -> None:
        """The module's parameters on the CPU, where nothing has read them yet."""
        if any(parameter.is_meta for parameter in self._module.parameters()):
            self._weights.materialize()

    def warm(self) -> None:
        """Calls that nobody counts: the first one compiles, allocates, fills slots."""
        for _ in range(WARM_CALLS if not self._work.new_tokens else 1):
            self._work.warm()
        if not self._device.is_simulated:
            torch.cuda.synchronize(self._device.id)
            torch.cuda.reset_peak_memory_stats(self._device.id)

    def block(self, count: int, tokens: int | None = None, plain: bool = False) -> Timed:
        """`count` calls, timed. tokens: of each generation, instead of those asked for. plain: after `plain`, with nothing of the binding on the module."""
        work = self._work if tokens is None else self._work.of(tokens)
        with contextlib.ExitStack() as stack:
            if self._plain is not None and self._plain.is_known:
                with self._plain.entered():  # either kind of block comes after the same going back and forth
                    pass
            if plain:
                assert self._plain is not None, "`plain` comes first"
                stack.enter_context(self._plain.entered())
            found = timed(work, count, self._engine if self._device.is_simulated else None)
        return replace(found, demand_fetches=self.demand_fetches)

    def plain(self) -> Plained:
        """Blocks may be of plain eager from now on, its weights in memory of their own where there is room for that. Raises Unsupported on paper, and where something is streamed."""
        if self._device.is_simulated or self._plain is None or self._bound is None:
            raise Unsupported("plain eager is timed where nothing is streamed, on a device that is there", fix="--budget 100%")
        self.unplain()
        self._aside = self._stack.enter_context(contextlib.ExitStack())
        apart = self._aside.enter_context(plainly(self._plain, self._bound, self._device.id))
        with self._plain.entered():
            self.warm()
        return Plained(apart=apart)

    def unplain(self) -> None:
        """What that took of the device is free. Harmless twice."""
        self._aside.close()

    def answer(self) -> Answer:
        """One call's outputs."""
        return self._work.answer()

    def meters(self) -> Meters:
        """Memory by now."""
        if self._device.is_simulated:
            return Meters(host_rss_bytes=hostmemory.peak_bytes(), notes=self.notes)
        free, total = torch.cuda.mem_get_info(self._device.id)
        return Meters(
            peak_allocated_bytes=torch.cuda.max_memory_allocated(self._device.id),
            peak_reserved_bytes=torch.cuda.max_memory_reserved(self._device.id),
            peak_device_bytes=max(0, total - free - self._others_bytes),
            host_rss_bytes=hostmemory.peak_bytes(),
            notes=self.notes,
        )

    def verify(self, spec: StreamSpec, forwards: int) -> Checked:
        """The files themselves; bit for bit against everything resident; and a hunt for races."""
        plan = self._plan(spec)
        of_files = tuple(files.checks(self._weights, spec.disk))
        if any(check.passed is False for check in of_files):  # what is damaged is damaged streamed and whole alike
            return Checked(checks=of_files, plan=plan)
        return Checked(checks=(*verified.checks(self, plan, forwards), *of_files), plan=plan)

    def pack(self, spec: StreamSpec, folder: str) -> PackedFolder:
        """Write the units to a folder."""
        self.release()
        began = time.monotonic()
        anatomy = self._dissected(spec)
        source = self._weights.keeping() if hasattr(self._weights, "keeping") else self._weights
        found = packed.pack(
            source, anatomy, Path(folder), on_unit=lambda name, done, total: self._progress(done / total, f"writing {name}")
        )
        try:
            return PackedFolder(
                folder=folder,
                num_units=len(found.units),
                num_bytes=found.num_bytes,
                seconds=time.monotonic() - began,
                notes=found.notes,
            )
        finally:
            found.close()

    @property
    def demand_fetches(self) -> int:
        """Of what is bound, so far."""
        return self._bound.streamer.demand_fetches if self._bound is not None else 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What is said of what is bound by now: of CUDA graphs, only calls tell."""
        return tuple(self._bound.notes) if self._bound is not None else ()

    # -- for what verifies --------------------------------------------------------------------------------------------------------------------------

    @property
    def work(self) -> Work:
        """The module and its call."""
        return self._work

    @property
    def device(self) -> StreamDevice:
        """What it runs on."""
        return self._device

    @property
    def progress(self) -> ProgressCall:
        """Whom to tell."""
        return self._progress

    def streamed(self, plan: Plan, **how: Any) -> Any:
        """A context in which the module is bound to this plan: `engine`, `poison`, `audit`."""
        return self._streamed(plan, **how)

    @contextlib.contextmanager
    def whole(self, plan: Plan) -> Any:
        """A context in which everything is on the device, in the module's own memory, and compiled where the plan has it so. Raises ResourceError where it does not fit."""
        self.release()
        self._require_values()
        simulated = self._device.is_simulated
        placed = contextlib.nullcontext() if simulated else whole(self._module, self._device.id, plan.anatomy.weight_bytes)
        with placed, self._compiled(plan.anatomy, plan.spec):
            yield

    def _compiled(self, anatomy: Anatomy, spec: StreamSpec) -> contextlib.AbstractContextManager[None]:
        return compiled(self._module, [unit.name for unit in anatomy.units]) if spec.compile else contextlib.nullcontext()

    def release(self) -> None:
        """Nothing that `bind`, `resident` or `rival` set up runs after this, and what it took of the device is free, for others too."""
        had = self._bound is not None
        self._bound = None
        self._stack.close()
        self._plain = None
        if had and not self._device.is_simulated:
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Whatever is bound, then the memory its weights are given back to, then their files. Harmless twice."""
        with contextlib.ExitStack() as closing:
            if self._weights is not None:
                closing.callback(self._weights.close)
            if self._shelf is not None:
                closing.callback(self._shelf.close)
            for bound in list(self._bounds):
                closing.callback(self._unbind, bound)
            closing.callback(self.release)


def _lowered(spec: StreamSpec) -> StreamSpec:
    """A smaller budget of the same kind."""
    if spec.budget_share is not None:
        return replace(spec, budget_share=ELASTIC * spec.budget_share)
    assert spec.budget_bytes is not None
    return replace(spec, budget_bytes=int(ELASTIC * spec.budget_bytes))
