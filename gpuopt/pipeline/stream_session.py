"""In the child: a model named, planned, bound and called, streamed or whole. Each method is one step of `gpuopt stream`. Imports torch."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpuopt import loaders
from gpuopt.core.errors import OutOfMemory, ResourceError, Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.registry import resolve
from gpuopt.core.spec import Candidate
from gpuopt.core.streamed import StreamRequest, StreamSpan
from gpuopt.core.streaming import Anatomy, Calibration, Plan, StreamSpec
from gpuopt.devices import info
from gpuopt.loaders import describe
from gpuopt.loaders import inputs as input_maker
from gpuopt.pipeline import environment, hostmemory, stream_device, stream_rivals, stream_verified
from gpuopt.pipeline.facts import ProgressCall
from gpuopt.pipeline.stream_calls import Work, cache_bytes, rings_of, timed
from gpuopt.pipeline.stream_device import StreamDevice
from gpuopt.pipeline.stream_facts import Answer, Checked, Meters, Opened, PackedFolder, Planned, Ready, Timed
from gpuopt.streaming import anatomy as anatomies
from gpuopt.streaming import bound as binding
from gpuopt.streaming import disk, hostpages, meta, packed, planner, timeline
from gpuopt.streaming.engines import ENGINES
from gpuopt.trust.policy import Format, classify

WARM_CALLS = 3
ELASTIC = 0.85
"""Of the budget, after running out of memory within it."""


class StreamSession:
    """One model on one device. The order is load, then any of plan, bind, resident, accelerate, verify and pack."""

    def __init__(self, progress: ProgressCall | None = None) -> None:
        self._progress: ProgressCall = progress or (lambda fraction, note: None)
        self._stack = contextlib.ExitStack()
        """What runs the model now: bound, or on the device."""
        self._weights: Any = None
        self._available_bytes: int | None = None
        self._others_bytes = 0
        """Of the device's memory, held by others before this process touched it."""
        self._anatomies: dict[tuple[str, str], Anatomy] = {}
        self._calibrations: dict[tuple[str, str], Calibration] = {}
        self._engine: Any = None
        self._bound: Any = None

    # -- load -------------------------------------------------------------------------------------------------------------------------------------

    def load(self, candidate: Candidate, request: StreamRequest) -> Opened:
        """Open the model, with its weights where they lie, and make its inputs. Raises what the loader of its form raises, UsageError, Unavailable."""
        began = time.monotonic()
        self._device = stream_device.parse(candidate.device)
        if not self._device.is_simulated:
            found = info.resolve(self._device.id)
            if not found.startswith("cuda"):
                raise UsageError(
                    "there is no CUDA device here to stream to", fix="--device simulated plans and runs with a device on paper"
                )
            self._device = StreamDevice(id=found)
            self._others_bytes = info.memory_used(found) or 0
        self._available_bytes = hostpages.available_bytes()
        self._progress(None, "loading the model")
        model, self._weights = opened(candidate)
        return self._adopt(candidate, request, model, began)

    def adopt(self, candidate: Candidate, request: StreamRequest, model: Model, device: StreamDevice, inputs: Inputs) -> Opened:
        """The same for a live module, whose memory is freed as its weights move. Without inputs its compute is estimated."""
        self._device, self._available_bytes = device, hostpages.available_bytes()
        self._weights = meta.empty(model.module)
        return self._adopt(candidate, request, model, time.monotonic(), inputs)

    def _adopt(self, candidate: Candidate, request: StreamRequest, model: Model, began: float, inputs: Inputs | None = None) -> Opened:
        if model.form != "module":
            raise Unsupported(f"streaming moves the weights of a PyTorch module, and this is {model.form}", fix="name the source model")
        self._module = model.module
        made = inputs if inputs is not None else input_maker.make(model, candidate.inputs, dict(candidate.dims), "cpu", None)
        where = "cpu" if self._device.is_simulated else self._device.id
        self._work = Work(module=self._module, inputs=made.map(lambda t: t.to(where)), device=where, new_tokens=request.generate)
        anatomy = self._dissected(StreamSpec())
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
        shown = timeline.simulate(
            made.anatomy.units,
            made.resident,
            made.binding,
            made.slots,
            made.calibration.compute_ms,
            made.calibration.link_bytes_per_s,
            wrap=not spec.once,
            homes=made.homes,
            pageable_bytes_per_s=made.calibration.pageable_bytes_per_s,
            disk_bytes_per_s=made.calibration.disk_bytes_per_s,
        )
        spans = tuple(StreamSpan(queue=s.stream, unit=s.unit, start_ms=s.start_ms, end_ms=s.end_ms) for s in shown.spans)
        return Planned(plan=made, spans=spans)

    def _plan(self, spec: StreamSpec) -> Plan:
        self.release()
        anatomy = self._dissected(spec)
        return planner.plan(anatomy, spec, self._calibrated(anatomy, spec), available_host_bytes=self._available_bytes)

    def _calibrated(self, anatomy: Anatomy, spec: StreamSpec) -> Calibration:
        key = (spec.granularity, spec.embed)
        if key not in self._calibrations:
            self._calibrations[key] = self._calibration(anatomy, spec)
        return self._calibrations[key]

    def _calibration(self, anatomy: Anatomy, spec: StreamSpec) -> Calibration:
        work = self._work
        cache = cache_bytes(self._module, work.inputs, work.new_tokens)
        rings = rings_of(self._module, anatomy, work.new_tokens)
        if self._device.is_simulated:
            return stream_device.made_up(self._device, anatomy, tokens=work.tokens, workload=work.words, cache_bytes=cache, rings=rings)
        from gpuopt.pipeline import stream_measured

        engine = resolve(ENGINES, "cuda", kind="engine")(self._device.id)
        if spec.disk is not None or not work.has_inputs:
            # Timing the units would bring all of them into host memory, which is what there is a disk for.
            return stream_measured.estimated(engine, anatomy, spec, work, cache_bytes=cache, rings=rings)
        return stream_measured.measured(
            self._module,
            anatomy,
            spec,
            engine,
            work.call,
            fill=self._fill(),
            workload=work.words,
            skip_prompt=bool(work.new_tokens),
            cache_bytes=cache,
            others_bytes=self._others_bytes,
            progress=self._progress,
        )

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
        bound = self._bound = self._stack.enter_context(self._streamed(plan))
        setup_s = time.monotonic() - began
        if spec.elastic:
            self._work.call()  # what a call needs shows when it is made
        return Ready(
            setup_s=setup_s,
            plan=bound.plan,
            pinned_bytes=int(getattr(self._engine, "pinned_bytes", 0)),
            clock="simulated" if self._device.is_simulated else "cuda-event",
            notes=tuple(bound.notes),
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
            bound = binding.bind(self._module, plan, self._engine, sources, self._fill(), poison=poison, audit=audit)
            stack.callback(bound.close)
            yield bound

    def engine(self, plan: Plan, *, schedule: str | None = None, seed: int | None = None) -> Any:
        """Of this session's device. schedule, seed: of copies on paper; on a real device a seed makes both queues sleep at random."""
        if not self._device.is_simulated:
            return resolve(ENGINES, "cuda", kind="engine")(self._device.id, sleeps=seed)
        known = plan.calibration
        return resolve(ENGINES, "simulated", kind="engine")(
            known.link_bytes_per_s,
            known.compute_ms,
            schedule or self._device.schedule,
            self._device.seed if seed is None else seed,
            pageable_bytes_per_s=known.pageable_bytes_per_s,
            disk_bytes_per_s=known.disk_bytes_per_s,
            disk_buffers=timeline.DISK_BUFFERS,
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
        self._stack.enter_context(stream_rivals.whole(self._module, self._device.id, self._dissected(spec).weight_bytes))
        return Ready(setup_s=time.monotonic() - began, clock="cuda-event")

    def accelerate(self, spec: StreamSpec, weight_bytes: int) -> Ready:
        """accelerate's dispatch at as many bytes of weights on the device. Raises Unavailable without the package, Unsupported on paper."""
        if self._device.is_simulated:
            raise Unsupported("accelerate moves weights to a real device", fix="--device cuda")
        stream_rivals.require_accelerate()
        self.release()
        self._require_values()
        began = time.monotonic()
        self._stack.enter_context(stream_rivals.accelerated(self._module, self._device.id, weight_bytes, self._dissected(spec)))
        return Ready(setup_s=time.monotonic() - began, clock="cuda-event")

    def _require_values(self) -> None:
        """The module's parameters on the CPU, where nothing has read them yet."""
        if any(parameter.is_meta for parameter in self._module.parameters()):
            self._weights.materialize()

    def warm(self) -> None:
        """Calls that nobody counts: the first one compiles, allocates, fills slots."""
        for _ in range(WARM_CALLS if not self._work.new_tokens else 1):
            self._work.call()
        if not self._device.is_simulated:
            torch.cuda.synchronize(self._device.id)
            torch.cuda.reset_peak_memory_stats(self._device.id)

    def block(self, count: int) -> Timed:
        """`count` calls, timed."""
        found = timed(self._work, count, self._engine if self._device.is_simulated else None)
        return replace(found, demand_fetches=self.demand_fetches)

    def answer(self) -> Answer:
        """One call's outputs."""
        return self._work.answer()

    def meters(self) -> Meters:
        """Memory by now."""
        if self._device.is_simulated:
            return Meters(host_rss_bytes=hostmemory.peak_bytes())
        free, total = torch.cuda.mem_get_info(self._device.id)
        return Meters(
            peak_allocated_bytes=torch.cuda.max_memory_allocated(self._device.id),
            peak_reserved_bytes=torch.cuda.max_memory_reserved(self._device.id),
            peak_device_bytes=max(0, total - free - self._others_bytes),
            host_rss_bytes=hostmemory.peak_bytes(),
        )

    def verify(self, spec: StreamSpec, forwards: int) -> Checked:
        """Bit for bit against everything resident, and a hunt for races."""
        plan = self._plan(spec)
        return Checked(checks=stream_verified.checks(self, plan, forwards), plan=plan)

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
        """A context in which everything is on the device, in the module's own memory. Raises ResourceError where it does not fit."""
        self.release()
        self._require_values()
        if self._device.is_simulated:
            yield
            return
        with stream_rivals.whole(self._module, self._device.id, plan.anatomy.weight_bytes):
            yield

    def release(self) -> None:
        """Nothing is bound after this."""
        self._bound = None
        self._stack.close()

    def close(self) -> None:
        """The weights' files too."""
        self.release()
        if self._weights is not None:
            self._weights.close()


def _lowered(spec: StreamSpec) -> StreamSpec:
    """A smaller budget of the same kind."""
    if spec.budget_share is not None:
        return replace(spec, budget_share=ELASTIC * spec.budget_share)
    assert spec.budget_bytes is not None
    return replace(spec, budget_bytes=int(ELASTIC * spec.budget_bytes))


def opened(candidate: Candidate) -> tuple[Model, Any]:
    """The model, and where its weights come from: a transformers folder is built without them, everything else is loaded whole. Raises what loaders raise."""
    ref = candidate.model
    path = Path(ref.text)
    if not ref.trust_remote_code and path.exists() and classify(ref.text) is Format.TRANSFORMERS:
        weights = meta.empty(path, cast=ref.cast)
        return describe.of_module(weights.module, name=describe.name_of(path), sha256=None, notes=[]), weights
    model = loaders.load(ref)
    if model.form != "module":
        return model, None
    if model.module is None or not isinstance(model.module, torch.nn.Module):
        raise ResourceError(f"{model.name} holds no module", fix="name the source model")
    return model, meta.empty(model.module)
