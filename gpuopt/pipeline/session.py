"""One candidate in one process: load, build, verify, measure, profile, save, close. The only place that order is written.

Used by the worker (a child of the command line) and, in the caller's own process, by the Python API.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpuopt import backends, converters, loaders
from gpuopt.accuracy import compare
from gpuopt.accuracy import gate as accuracy_gate
from gpuopt.accuracy import tolerance as tolerances
from gpuopt.backends import load_backend
from gpuopt.bundles import fingerprint
from gpuopt.bundles import manifest as bundle_manifest
from gpuopt.bundles import read as bundle_files
from gpuopt.converters import exported as exported_file
from gpuopt.converters import onnx as onnx_file
from gpuopt.converters import precision as precisions
from gpuopt.converters import weights as weight_files
from gpuopt.core.errors import GpuoptError, Unavailable, Unsupported, UsageError
from gpuopt.core.launches import Launch
from gpuopt.core.live import Inputs, Model, Runner
from gpuopt.core.result import Accuracy, Count, Device, Manifest, Samples
from gpuopt.core.spec import BackendSpec, BenchSpec, Candidate, InputSpec, Precision, TensorSpec, Tolerance, Transforms
from gpuopt.core.trace import Trace
from gpuopt.devices import ceilings as measured_ceilings
from gpuopt.devices import info
from gpuopt.doctor import diagnose as doctor
from gpuopt.loaders import inputs as input_maker
from gpuopt.pipeline import diagnosis, environment, facts, figures, packs, probing, route, verification
from gpuopt.pipeline.anchor import Anchor
from gpuopt.profiling import attribute, bounds, count, memory, roofline, trace, useful, waterfall, waves
from gpuopt.timing import clocks, loop

SEEDS = 2
"""Different random inputs a candidate is verified on."""

NOTHING_COUNTED = Count(records=(), flops=0.0, flops_by_dtype={}, bytes=0.0, coverage=0.0, method="not counted")

ProgressCall = Callable[[float | None, str], None]


class Session:
    """One candidate. Each method is one step; the order is load, build, verify, measure or block, profile, save, close."""

    def __init__(self, progress: ProgressCall | None = None, started: float | None = None) -> None:
        self._progress: ProgressCall = progress or (lambda fraction, note: None)
        self._started = time.monotonic() if started is None else started
        self._stack = contextlib.ExitStack()
        self._candidate: Candidate | None = None
        self._model: Model | None = None
        """As loaded; what references are computed from."""
        self._changed: Model | None = None
        """Converted, on the device; what the backend was given."""
        self._runner: Runner | None = None
        self._inputs: Inputs | None = None
        self._manifest: Manifest | None = None
        self._bundle: Path | None = None
        self._count: Count | None = None
        self._pack: packs.Pack | None = None
        self._notes: list[str] = []
        self._throttled: dict[str, float] = {}
        self._precision = Precision.FP32
        self._anchor = Anchor()
        self._seen: diagnosis.Seen = diagnosis.Seen()
        """What the profile and the failures of this session leave for the doctor."""

    # -- load ---------------------------------------------------------------------------------------------------------------------

    def load(self, candidate: Candidate) -> facts.Loaded:
        """Open the model and make its inputs. Raises BadInput, Untrusted, UsageError, Unavailable."""
        began = time.monotonic()
        device = info.resolve(candidate.device)
        self._progress(None, "loading the model")
        model = loaders.load(candidate.model)
        return self._adopt(replace(candidate, device=device), model, began)

    def adopt(self, candidate: Candidate, model: Model, inputs: Inputs | None = None) -> facts.Loaded:
        """The same for a live module (the Python API)."""
        return self._adopt(replace(candidate, device=info.resolve(candidate.device)), model, time.monotonic(), inputs)

    def _adopt(self, candidate: Candidate, model: Model, began: float, inputs: Inputs | None = None) -> facts.Loaded:
        if candidate.device == "null":
            raise Unsupported("the null device is made up: no model runs on it", fix="--device cpu or cuda")
        self._candidate, self._model = candidate, model
        self._notes = list(model.notes)
        transforms = describe_transforms(candidate.transforms)
        backend, preset = None, None
        if model.form == "bundle":
            transforms = self._open_bundle(candidate, model)
            manifest = self._manifest
            assert manifest is not None
            backend, preset = manifest.backend.name, manifest.backend.preset
        else:
            self._precision = candidate.precision or own_precision(model)
            reason = info.supports(info.describe(candidate.device), self._precision)
            if reason:
                raise Unsupported(f"{self._precision} cannot run on {candidate.device}: {reason}", fix="another --precision or --device")
        current = self._candidate
        made = inputs or input_maker.make(model, current.inputs, current.dims, "cpu", None)
        if self._manifest is not None:
            made = positional(made, self._manifest.positional)
        self._inputs = made
        # What the sources filled in (N=1, S=128) is part of the candidate from here on, so that every seed gets the same shapes.
        self._candidate = replace(current, dims=dict(made.dims))
        self._facts = facts.Loaded(
            name=model.name,
            form=model.form,
            sha256=model.sha256,
            dtype=model.dtype,
            num_parameters=model.num_parameters,
            inputs=tuple(str(replace(s, high=None, fill=None).bind(dict(made.dims))) for s in made.specs),
            signature=tuple(str(s) for s in made.specs),
            input_source=made.source,
            dims=dict(made.dims),
            precision=self._precision.value,
            load_s=time.monotonic() - began,
            device=candidate.device,
            notes=tuple(self._notes),
            bundle_backend=backend,
            bundle_preset=preset,
            transforms=transforms,
        )
        return self._facts

    def _open_bundle(self, candidate: Candidate, model: Model) -> tuple[str, ...]:
        """A bundle says everything itself: backend, precision, inputs. What was typed may change dimensions inside the ranges it was built for."""
        assert model.path is not None
        manifest = bundle_files.open_bundle(model.path, candidate.model.trust)
        found = fingerprint.current(manifest.backend.name, info.describe(candidate.device))
        bundle_files.require_match(manifest, found)
        self._manifest, self._bundle = manifest, model.path
        self._precision = manifest.precision or Precision.FP32
        model.name = manifest.model
        model.sha256 = manifest.model_sha256
        dims = dict(manifest.dims)
        for name, value in candidate.dims.items():
            low, high = manifest.dim_ranges.get(name, (dims.get(name, value), dims.get(name, value)))
            if name not in dims or not low <= value <= high:
                allowed = f"{low}" if low == high else f"{low} to {high}"
                raise UsageError(
                    f"dimension {name}={value} does not fit the bundle",
                    fix=f"it was built for {name} = {allowed}" if name in dims else f"it has {', '.join(dims)}",
                )
            dims[name] = value
        stored = bundle_manifest.file_of(manifest, "inputs")
        specs = tuple(TensorSpec.parse(text) for text in manifest.inputs)
        model.signature = specs
        spec = InputSpec(file=str(model.path / stored), seed=manifest.seed) if stored else InputSpec(tensors=specs, seed=manifest.seed)
        asked = [str(candidate.backend)] if candidate.backend not in (BackendSpec(), manifest.backend) else []
        asked += [candidate.precision.value] if candidate.precision not in (None, manifest.precision) else []
        asked += describe_transforms(candidate.transforms)
        if asked:
            own = f"{manifest.backend} {self._precision}"
            self._notes.append(f"a bundle is what it was built as, {own}: {', '.join(asked)} changes nothing")
        self._candidate = replace(candidate, inputs=spec, dims=dims, backend=manifest.backend, precision=manifest.precision)
        self._pack = packs.read(self._bundle, bundle_manifest.file_of(manifest, "reference"))
        return manifest.transforms

    # -- build --------------------------------------------------------------------------------------------------------------------

    def build(self, *, build_only: bool = False) -> facts.Built:
        """Convert, compile, and call once. Raises Unsupported, Unavailable, OutOfMemory, UsageError for inputs that the model itself does not take, or
        whatever the compiler raised."""
        candidate, model = self._loaded()
        try:
            return self._build(candidate, model, build_only)
        except Exception as error:  # a compiler may raise anything: whose fault it is shows when the model is called without it
            self._seen.failure = error
            self._require_fitting_inputs(model, error)
            raise

    def _build(self, candidate: Candidate, model: Model, build_only: bool) -> facts.Built:
        backend = load_backend(candidate.backend.name)
        self._seen.own_flags = diagnosis.switches()
        self._stack.enter_context(precisions.flags(self._precision))
        self._progress(None, f"building {candidate.backend}")
        began = time.monotonic()
        if self._manifest is not None:
            assert self._bundle is not None
            files = {f.role: f.name for f in self._manifest.files}
            # open_bundle has checked every hash and asked for consent: what is behind them may be loaded.
            options = {**self._options(candidate), "signed_by_us": True}
            self._runner = backend.load(self._bundle, files, options, candidate.device)
            self._count = bundle_manifest.stored_count(self._manifest) if dict(candidate.dims) == dict(self._manifest.dims) else None
            transforms = self._manifest.transforms
        else:
            self._runner, self._changed = self._construct(candidate, model, self._precision, build_only=build_only)
            transforms = describe_transforms(candidate.transforms)
            self._count = self._counted(candidate)
        executable = not getattr(self._runner, "build_only", False)
        compile_s = time.monotonic() - began
        cold_start_s = time.monotonic() - self._started
        if executable:
            given = self._given()
            self._runner(*given.args, **given.kwargs)
            clocks.for_device(candidate.device).synchronize()
            cold_start_s = time.monotonic() - self._started
        audit = self._runner.audit() if self._manifest is None or executable else None
        notes = [*getattr(self._runner, "notes", [])]
        if audit is not None and audit.requested is None:
            audit = replace(audit, requested=self._precision.value)
        return facts.Built(
            compile_s=compile_s,
            cold_start_s=cold_start_s,
            audit=audit,
            count=self._count,
            executable=executable,
            transforms=transforms,
            notes=tuple(notes),
        )

    def _construct(self, candidate: Candidate, model: Model, precision: Precision, *, build_only: bool = False) -> tuple[Runner, Model]:
        """Converted model and its runner, at this precision."""
        backend = load_backend(candidate.backend.name)
        way = route.check(model.form, backend, str(candidate.backend), precision, candidate.device, build_only=build_only)
        options = self._options(candidate, precision)
        if build_only:
            options["build_only"] = True
        if model.form == "onnx":
            if candidate.precision is not None and candidate.precision.dtype != own_precision(model).dtype:
                raise Unsupported(
                    f"an ONNX file keeps the precision it was exported in ({own_precision(model)})",
                    fix="export the source model at this precision: gpuopt convert MODEL --precision … --to onnx",
                )
            options["layer_flops"] = layer_flops(model.path, candidate)
            return backend.build(model, self._given(precision, model), options), model
        change = candidate.transforms
        # As it is means as it is: a cast to the dtype of most parameters would hide the few that differ, and what they cost.
        to = None if candidate.precision is None and precision is self._precision else precision
        changed = converters.apply(model, to, change, self._sample(precision, "cpu"))
        self._notes += [n for n in changed.notes if n not in self._notes]
        if way == "via ONNX":
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="gpuopt-onnx-")))
            self._progress(None, f"exporting to ONNX for {candidate.backend.name}")
            sample = self._sample(precision, "cpu")
            # Not run on the CPU here, as a conversion would be: what the backend makes of it is verified at full size anyway.
            path = onnx_file.export(changed, sample, folder / "model.onnx", dynamic_ranges(candidate), check=False)
            through = loaders.onnx_model(path, model.name)
            options["layer_flops"] = layer_flops(path, candidate)
            return backend.build(through, self._sample(precision, candidate.device), options), changed
        if changed.module is not None:
            changed.module.to(candidate.device)
        self._progress(None, f"building {candidate.backend}")
        return backend.build(changed, self._sample(precision, candidate.device), options), changed

    def _require_fitting_inputs(self, model: Model, error: Exception) -> None:
        """After a build failed: raises UsageError where the model as it was loaded does not run on these inputs either."""
        was_told = isinstance(error, GpuoptError) and not (isinstance(error, Unsupported) and error.__cause__ is not None)
        if was_told or isinstance(error, MemoryError | torch.OutOfMemoryError) or "CUDA" in str(error) or model.module is None:
            return
        candidate, _ = self._loaded()
        try:
            verification.eager_outputs(model, own_precision(model), [self._sample(own_precision(model), "cpu")], candidate.device)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as own:
            why = next((line.strip() for line in str(own).splitlines() if line.strip()), type(own).__name__)[:300]
            given = ", ".join(str(replace(s, high=None, fill=None)) for s in (self._inputs.specs if self._inputs else ()))
            raise UsageError(
                f"{model.name} itself does not run on {given}: {type(own).__name__}: {why}",
                fix="--input 'name:dtype[dims]' says what it takes",
            ) from error

    def _options(self, candidate: Candidate, precision: Precision | None = None) -> dict[str, Any]:
        return {
            **candidate.backend.options,
            "preset": candidate.backend.preset,
            "precision": (precision or self._precision).value,
            "dynamic": dynamic_ranges(candidate),
        }

    def _counted(self, candidate: Candidate) -> Count | None:
        assert self._changed is not None and self._model is not None
        if self._model.form == "onnx":
            from gpuopt.profiling import count_onnx  # onnx is an extra: only its own models need it

            assert self._model.path is not None
            return count_onnx.from_onnx(self._model.path, dict(candidate.dims), tf32=self._precision is Precision.TF32)
        return count.count(self._changed.module, self._sample(self._precision, "cpu"), tf32=self._precision is Precision.TF32)

    # -- verify -------------------------------------------------------------------------------------------------------------------

    def verify(self, tolerance: Tolerance, mode: str = "full") -> facts.Verified:
        """Both stages (`full`), or the second alone (`precision`)."""
        if self._pack is not None:
            return facts.Verified(accuracy=self._verify_pack(tolerance))
        if self._manifest is not None:
            raise Unsupported(
                "the bundle carries no reference outputs: it was never verified",
                fix="compile it again, or --verify off to time it all the same",
            )
        candidate, model = self._loaded()
        runner = self._built()
        batches, seeds = self._batches()
        dtype = getattr(torch, self._precision.dtype)
        limits = tolerances.merged(self._precision, tolerance)
        self._progress(None, "computing the reference")
        found, twins = self._references(model, batches, candidate.device)
        stages = []
        notes: list[str] = ["the model itself writes into its inputs"] if found.mutates_inputs else []
        is_twin = candidate.backend.name == "eager" and candidate.transforms == Transforms()
        if mode == "full" and model.form not in ("onnx", "torchscript"):
            if is_twin:
                notes.append("structure: not run, plain eager is the reference's own code")
            elif self._precision is not Precision.FP32:
                self._progress(None, "verifying the structure in fp32")
                stages.append(self._structure(candidate, model, found, batches, seeds, limits))
        self._progress(None, "verifying the candidate")
        outputs, deterministic, mutates = verification.runner_outputs(runner, batches, dtype, candidate.device)
        spread = accuracy_gate.spread_of(runner, batches, dtype, candidate.device, outputs) if not deterministic else None
        if mode == "full" and self._precision is Precision.FP32 and not is_twin and model.form not in ("onnx", "torchscript"):
            stages.append(accuracy_gate.judge_stage("structure", found.outputs, outputs, twins, limits, seeds))
        stages.append(accuracy_gate.judge_stage("precision", found.outputs, outputs, twins, limits, seeds, spread=spread))
        accuracy = accuracy_gate.verdict(
            tuple(stages),
            reference=found.kind,
            deterministic=deterministic,
            mutates_inputs=mutates,
            reference_mutates_inputs=found.mutates_inputs,
            notes=tuple(notes),
        )
        self._pack = None
        self._evidence = packs.Pack.sampled(found.outputs, twins, seeds, found.kind)
        return facts.Verified(accuracy=accuracy)

    def _structure(
        self,
        candidate: Candidate,
        model: Model,
        found: verification.Reference,
        batches: list[Inputs],
        seeds: tuple[int, ...],
        limits: Tolerance,
    ) -> Any:
        with verification.exact_math():
            twins = verification.eager_outputs(model, Precision.FP32, batches, candidate.device)
            runner, _ = self._construct(candidate, model, Precision.FP32)
            try:
                outputs, _, _ = verification.runner_outputs(runner, batches, torch.float32, candidate.device)
            finally:
                runner.close()
                verification.release(candidate.device)
        return accuracy_gate.judge_stage("structure", found.outputs, outputs, twins, limits, seeds)

    def _references(self, model: Model, batches: list[Inputs], device: str) -> tuple[verification.Reference, list[verification.Named]]:
        """What candidates are held against, and the outputs of plain eager at the candidate's dtype."""
        if model.form in ("onnx", "torchscript"):
            found = self._reference_of_file(model, batches)
            return found, found.outputs
        return verification.reference(model, batches, device), verification.eager_outputs(model, self._precision, batches, device)

    def _reference_of_file(self, model: Model, batches: list[Inputs]) -> verification.Reference:
        """Forms without parameters to widen: ONNX Runtime's CPU provider for ONNX, the script itself for TorchScript."""
        if model.form == "torchscript":
            return verification.Reference(
                outputs=verification.eager_outputs(model, own_precision(model), batches, "cpu"),
                kind=f"{own_precision(model)}: TorchScript cannot be widened",
            )
        backend = load_backend("ort")
        own = own_precision(model)
        given = batches[0].map(lambda t: verification.cast(t, getattr(torch, own.dtype), "cpu"))
        runner = backend.build(model, given, {"preset": "basic", "precision": own.value, "dynamic": {}})
        try:
            outputs, _, _ = verification.runner_outputs(runner, batches, getattr(torch, own.dtype), "cpu")
        finally:
            runner.close()
        return verification.Reference(outputs=outputs, kind=f"{own}: ONNX Runtime's CPU provider")

    def _verify_pack(self, tolerance: Tolerance) -> Accuracy:
        """A bundle against the reference outputs it carries."""
        pack = self._pack
        assert pack is not None
        candidate, _ = self._loaded()
        runner = self._built()
        dtype = getattr(torch, self._precision.dtype)
        assert self._manifest is not None
        if dict(candidate.dims) != dict(self._manifest.dims):
            # The reference was taken at the sizes the bundle was compiled for; they are within its ranges, so it can be run at them.
            batches = [self._batch(seed, dims=dict(self._manifest.dims)) for seed in pack.seeds]
        else:
            batches = [self._batch(seed) for seed in pack.seeds]
        outputs, deterministic, mutates = verification.runner_outputs(runner, batches, dtype, candidate.device)
        sampled = []
        for named in outputs:
            kept, reason = pack.of(named)
            if reason:
                return Accuracy(passed=False, reference=pack.kind, reason=reason, deterministic=deterministic, mutates_inputs=mutates)
            sampled.append(kept)
        limits = tolerances.merged(self._precision, tolerance)
        stage = accuracy_gate.judge_stage("precision", list(pack.reference), sampled, list(pack.twins), limits, pack.seeds)
        return accuracy_gate.verdict(
            (stage,),
            reference=pack.kind,
            deterministic=deterministic,
            mutates_inputs=mutates,
            notes=(f"against the bundle's own reference, {packs.SAMPLES} elements an output at most",),
        )

    # -- measure ------------------------------------------------------------------------------------------------------------------

    def measure(self, spec: BenchSpec) -> facts.Measured:
        """Warm up and time this candidate alone."""
        call, clock, device = self._timed()
        before = info.throttle_counters(device)
        with precisions.flags(self._precision):  # another session of this process may have set its own since
            samples = loop.measure(call, clock, spec, progress=lambda share: self._progress(share, "timing"))
            return self._metered(samples, spec, _lost(before, info.throttle_counters(device)))

    def warm(self, spec: BenchSpec) -> facts.Measured:
        """Warm up for interleaved blocks."""
        call, clock, _ = self._timed()
        self._throttled = {}
        with precisions.flags(self._precision):
            warmup, steady = loop.warm_up(call, clock, spec)
        return facts.Measured(samples=Samples(warmup_ns=warmup, steady=steady, clock=clock.name))

    def block(self, spec: BenchSpec) -> facts.Measured:
        """Time one block of an interleaved pair. What was lost to throttling is counted over this block alone: the others are somebody else's."""
        call, clock, device = self._timed()
        before = info.throttle_counters(device)
        with precisions.flags(self._precision):
            samples = loop.block(call, clock, spec)
        for reason, lost_ms in _lost(before, info.throttle_counters(device)).items():
            self._throttled[reason] = self._throttled.get(reason, 0.0) + lost_ms
        return facts.Measured(samples=samples)

    def meters(self, spec: BenchSpec) -> facts.Measured:
        """Memory, energy and throttling, after the interleaved blocks: none of it disturbs a clock that is running."""
        with precisions.flags(self._precision):
            return self._metered(Samples(), spec, self._throttled)

    def _metered(self, samples: Samples, spec: BenchSpec, throttled_ms: Mapping[str, float]) -> facts.Measured:
        call, clock, device = self._timed()
        joules = info.energy_counter(device)
        energy, power = None, None
        start = joules() if spec.energy_s > 0 else None
        if start is not None:
            began, calls = time.monotonic(), 0
            while time.monotonic() - began < spec.energy_s:
                # In batches: a synchronisation after each call would let the device idle between them.
                clock.time_calls(call, 3)
                calls += 3
            seconds, end = time.monotonic() - began, joules()
            if end is not None and end > start:
                energy, power = (end - start) / (calls * self._inputs_batch()), (end - start) / seconds
        self._seen.peak_bytes = memory.peak(call, device)
        self._seen.throttled_ms = dict(throttled_ms)
        self._seen.measured_ms = (samples.wall_ns or 0) / 1e6 or None
        return facts.Measured(
            samples=samples,
            peak_bytes=self._seen.peak_bytes,
            energy_j_per_sample=energy,
            mean_power_w=power,
            throttled_ms=dict(throttled_ms),
        )

    def _timed(self) -> tuple[Callable[[], Any], clocks.Clock, str]:
        """The call that is timed: the runner alone, or with its inputs copied in and its outputs copied out."""
        candidate, _ = self._loaded()
        return self._timed_on(self._given()), clocks.for_device(candidate.device), candidate.device

    def _timed_on(self, given: Inputs) -> Callable[[], Any]:
        candidate, _ = self._loaded()
        runner, device = self._built(), candidate.device
        if candidate.input_mode == "device":
            args, kwargs = given.args, dict(given.kwargs)
            return lambda: runner(*args, **kwargs)
        if candidate.input_mode != "host":
            raise UsageError(f"input mode {candidate.input_mode!r} is not known", fix="--input-mode device|host")
        held = given.map(lambda t: t.cpu() if isinstance(t, torch.Tensor) else t)

        def with_copies() -> Any:
            moved = held.map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t)
            return move(runner(*moved.args, **moved.kwargs), "cpu")

        return with_copies

    # -- probe --------------------------------------------------------------------------------------------------------------------

    def probe(self, device: Device, wall_ms: float) -> None:
        """For the doctor alone, before the trace: how long larger batches take, and what torch.compile compiles again at other sizes. Whatever cannot be tried is left out:
        the user's own tensors have one size, and so has most of what was built."""
        candidate, model = self._loaded()
        if self._is_given(candidate) or self._manifest is not None or model.form != "module":
            return
        ranges = dynamic_ranges(candidate)
        call, clock, where = self._timed()
        if device.kind == "cuda" and "N" in candidate.dims and (self._is_eager() or "N" in ranges):
            self._progress(None, "timing larger batches")
            with precisions.flags(self._precision):
                self._seen.batch_curve = probing.curve(
                    lambda batch: self._timed_on(self._of_size({**candidate.dims, "N": batch})),
                    clock,
                    batch=self._inputs_batch(),
                    wall_ms=wall_ms,
                    peak_bytes=self._seen.peak_bytes,
                    device=device,
                    largest=ranges["N"][1] if not self._is_eager() else None,
                )
                probing.settle(call, where)
        if candidate.backend.name == "inductor":
            from gpuopt.programs import breaks  # takes a second, and no other backend has any

            self._progress(None, "tracing other sizes")
            assert self._changed is not None
            found = probing.calls(probing.sizes(candidate.dims, ranges), self._of_size)
            self._seen.recompiles = breaks.probe(self._changed.module, found)

    def _of_size(self, dims: dict[str, int]) -> Inputs:
        candidate, _ = self._loaded()
        dtype = getattr(torch, self._precision.dtype)
        return self._batch(candidate.inputs.seed, dims).map(lambda t: verification.cast(t, dtype, candidate.device))

    # -- profile ------------------------------------------------------------------------------------------------------------------

    def profile(self, device: Device, wall_ms: float, depth: int) -> facts.Profiled:
        """Trace in a run of its own and set it against the untraced wall time. Raises ImpossibleFigure for one that cannot be."""
        call, _, where = self._timed()
        self.require_traceable()
        self._progress(None, "tracing")
        module = self._changed.module if self._changed is not None and self._is_eager() else None
        own = (
            getattr(self._built(), "trace", None) if where == "cpu" else None
        )  # what torch.profiler cannot see there, a runner may tell itself
        traced = own() if own is not None else trace.record(call, where, with_modules=module)
        counted = self._count or NOTHING_COUNTED
        told: Callable[[], tuple[Launch, ...]] | None = getattr(self._built(), "launches", None)
        twin, notes = self._twin(where)
        records = attribute.attribute(traced, counted, launches=told() if told is not None else (), twin=twin)
        timed_ns = sum(r.time_ns or 0.0 for r in records)
        placed_ns = sum(r.time_ns or 0.0 for r in records if r.module != "?")
        self._seen.trace, self._seen.records, self._seen.wall_ms = traced, records, wall_ms
        source = self._changed.module if self._changed is not None else None
        parameters = count.module_parameters(source) if source is not None else None
        classes = count.module_classes(source) if source is not None else None
        self._seen.waterfall = waterfall.build(traced, wall_ms, device.ceilings, records)
        points = roofline.points(records, device.ceilings, cache_bytes=device.cache_bytes, slack=figures.slack(device))
        lost = waves.losses(traced, records, num_sms=device.num_sms, capability=device.capability)
        given, outside = self._given(), None
        if source is not None:
            outside = bounds.external(source, given, call(), counted)
        return facts.Profiled(
            waterfall=self._seen.waterfall,
            roofline=waves.annotate(points, records, lost),
            bounds=bounds.build(counted, device.ceilings, outside),
            useful=useful.of_call(counted, source, given),
            modules=tuple(
                row
                for row in attribute.modules(records, counted, wall_ms, ceilings=device.ceilings, parameters=parameters, classes=classes)
                if row.depth <= depth
            ),
            coverage=attribute.coverage(records),
            attributed=placed_ns / timed_ns if timed_ns else None,
            notes=notes,
        )

    def _twin(self, where: str) -> tuple[Trace | None, tuple[str, ...]]:
        """The call a CUDA graph was recorded from, traced with its modules; None for what is no graph of a module. And what there is to say about it."""
        found = getattr(self._built(), "ungraphed", lambda: None)()
        if found is None:
            return None, ()
        self._progress(None, "tracing without the CUDA graph")
        try:
            return trace.record(found[1], where, steps=1, warmup=1, with_modules=found[0]), ()
        except torch.OutOfMemoryError:
            return None, ("no memory to run the model beside its CUDA graph: the graph's kernels belong to no module",)
        except Unavailable as error:
            return None, (
                f"the model beside its CUDA graph could not be traced ({error.message}): the graph's kernels belong to no module",
            )

    def require_traceable(self) -> None:
        """Raises Unsupported for a backend whose work no trace shows: asked before it is built, so that nobody waits for a refusal."""
        candidate, _ = self._loaded()
        if candidate.device == "cpu" and getattr(self._backend(), "OPAQUE_ON_CPU", False):
            raise Unsupported(
                "what this backend runs on a CPU is invisible to torch.profiler: all of its time would read as python and framework",
                fix="gpuopt bench times it; profile the source model with --backend eager",
            )

    # -- diagnose -----------------------------------------------------------------------------------------------------------------

    def diagnose(self, device: Device, ignore: list[str]) -> facts.Diagnosed:
        """Findings about this candidate: after `profile` with all that it saw, after a failed `build` with the failure, without a model about the machine alone."""
        if self._candidate is None or self._model is None:
            return facts.Diagnosed(findings=doctor.diagnose(diagnosis.of_machine(device), ignore=ignore))
        self._progress(None, "looking for what to change")
        failed = self._seen.failure is not None
        evidence = diagnosis.of_candidate(
            candidate=self._candidate,
            model=self._model,
            inputs=self._inputs,
            given=None if failed else self._given(),
            precision=self._precision,
            device=device,
            transforms=describe_transforms(self._candidate.transforms),
            runner=self._runner,
            count=self._count,
            seen=self._seen,
        )
        return facts.Diagnosed(findings=doctor.diagnose(evidence, ignore=ignore))

    def _backend(self) -> Any:
        candidate, _ = self._loaded()
        return load_backend(self._manifest.backend.name if self._manifest is not None else candidate.backend.name)

    def _is_eager(self) -> bool:
        candidate, _ = self._loaded()
        return candidate.backend.name == "eager"

    # -- save ---------------------------------------------------------------------------------------------------------------------

    def save(self, folder: str) -> facts.Saved:
        """Write the artifact, the reference outputs and the given inputs into an existing empty folder."""
        candidate, _ = self._loaded()
        target = Path(folder)
        runner = self._built()
        files = dict(runner.save(target))
        if self._evidence is None and getattr(runner, "build_only", False):
            # Built for another machine: it is verified there, against outputs that only the source can give.
            batches, seeds = self._batches()
            found, twins = self._references(self._loaded()[1], batches, "cpu")
            self._evidence = packs.Pack.sampled(found.outputs, twins, seeds, found.kind)
        if self._evidence is not None:
            files["reference"] = packs.write(self._evidence, target)
        inputs = self._inputs
        assert inputs is not None
        if self._is_given(candidate):
            files["inputs"] = packs.write_inputs(inputs, target)
        assert self._facts is not None
        return facts.Saved(
            files=files,
            loaded=self._facts,
            positional=len(inputs.args),
            dim_ranges=dynamic_ranges(candidate),
            fingerprint=fingerprint.current(candidate.backend.name, info.describe(candidate.device)),
            device=candidate.device,
        )

    def export(self, kind: str, folder: str, name: str) -> facts.Exported:
        """Write the converted model as `onnx`, `pt2` or `safetensors`; each is read back before it counts."""
        candidate, _ = self._loaded()
        changed = self._changed
        if changed is None or changed.module is None:
            raise Unsupported(
                f"a model of form {self._model.form if self._model else '?'!r} cannot be converted", fix="name the source model"
            )
        verification.release(candidate.device)
        changed.module.to("cpu")
        target = Path(folder) / name
        sample = self._sample(self._precision, "cpu")
        self._progress(None, f"writing {kind}")
        if kind == "onnx":
            onnx_file.export(changed, sample, target, dynamic_ranges(candidate))
        elif kind == "pt2":
            exported_file.save(exported_file.export(changed, sample, dynamic_ranges(candidate)), target)
        elif kind == "safetensors":
            weight_files.save(changed, target)
        else:
            raise UsageError(f"--to {kind} is not known", fix="--to onnx|pt2|safetensors")
        names = sorted(p.name for p in Path(folder).iterdir() if p.name != name)
        return facts.Exported(files=(*names, name), notes=())

    # -- what needs no candidate --------------------------------------------------------------------------------------------------

    def survey(self, device_id: str, refresh: bool, ceilings: bool) -> facts.Survey:
        """Environment and device, with measured and data-sheet ceilings."""
        device = info.describe(info.resolve(device_id))
        if ceilings:
            found = measured_ceilings.all_ceilings(
                device,
                refresh=refresh,
                progress=lambda share, note: self._progress(share, f"measuring its ceilings: {note}" if note else ""),
            )
            device = replace(device, ceilings=found)
        return facts.Survey(environment=environment.describe(), device=device)

    def matrix(self, device_id: str, candidate: Candidate | None = None) -> facts.Matrix:
        """Every backend, for this model where one is named: the way to it, or the reason why there is none."""
        where = info.resolve(device_id)
        device = info.describe(where)
        model = loaders.load(candidate.model) if candidate is not None else None
        cells = tuple(_cell(name, model.form if model else None, device) for name in backends.listed())
        return facts.Matrix(
            environment=environment.describe(),
            device=device,
            cells=cells,
            form=model.form if model else None,
            model=model.name if model else None,
        )

    def anchor(self, quantity: str, device: Device, spec: BenchSpec) -> facts.Anchored:
        """One block of products in this quantity: the ceiling under the load of a bench. Raises OutOfMemory."""
        samples, flops, how = self._anchor.block(quantity, device, spec)
        return facts.Anchored(samples=samples, flops=flops, how=how)

    def runner(self) -> Runner:
        """What was built."""
        return self._built()

    def call_form(self) -> tuple[tuple[str, ...], int]:
        """Names of the inputs in order, and how many of them are positional."""
        assert self._inputs is not None
        return tuple(spec.name for spec in self._inputs.specs), len(self._inputs.args)

    def changed_module(self) -> Any:
        """The converted nn.Module, on the CPU."""
        if self._changed is None or self._changed.module is None:
            raise AssertionError("build comes first")
        return self._changed.module.to("cpu")

    def close(self) -> None:
        """Give everything back. Harmless twice."""
        if self._runner is not None:
            self._runner.close()
        self._runner = self._changed = self._model = None
        self._anchor.close()
        self._stack.close()

    # -- inputs -------------------------------------------------------------------------------------------------------------------

    def _given(self, precision: Precision | None = None, model: Model | None = None) -> Inputs:
        """The first seed's inputs on the device, at the precision the runner takes."""
        candidate, _ = self._loaded()
        return self._sample(precision or self._precision, candidate.device)

    def _sample(self, precision: Precision, device: str) -> Inputs:
        inputs = self._inputs
        assert inputs is not None
        key = (precision.dtype, device)
        if self._samples_key != key:
            dtype = getattr(torch, precision.dtype)
            self._samples_key, self._samples_value = key, inputs.map(lambda t: verification.cast(t, dtype, device))
        value = self._samples_value
        assert value is not None
        return value

    _samples_key: tuple[str, str] | None = None
    _samples_value: Inputs | None = None
    _evidence: packs.Pack | None = None
    _facts: facts.Loaded | None = None

    def _batches(self) -> tuple[list[Inputs], tuple[int, ...]]:
        """Inputs to verify on: SEEDS draws of random data, or the one set that was given."""
        candidate, _ = self._loaded()
        assert self._inputs is not None
        first = candidate.inputs.seed
        if self._is_given(candidate):
            return [self._inputs], (first,)
        seeds = tuple(first + i for i in range(SEEDS))
        return [self._inputs, *(self._batch(seed) for seed in seeds[1:])], seeds

    @staticmethod
    def _is_given(candidate: Candidate) -> bool:
        """Whether the inputs are the user's own tensors, which no seed can draw again: from a file, or beside a live module."""
        return candidate.inputs.file is not None or candidate.model.text == ""

    def _batch(self, seed: int, dims: dict[str, int] | None = None) -> Inputs:
        candidate, model = self._loaded()
        made = input_maker.make(model, replace(candidate.inputs, seed=seed), dims or dict(candidate.dims), "cpu", None)
        return positional(made, self._manifest.positional) if self._manifest is not None else made

    def _inputs_batch(self) -> int:
        return self._inputs.batch if self._inputs is not None else 1

    def _loaded(self) -> tuple[Candidate, Model]:
        if self._candidate is None or self._model is None:
            raise AssertionError("load comes first")
        return self._candidate, self._model

    def _built(self) -> Runner:
        if self._runner is None:
            raise AssertionError("build comes first")
        return self._runner


def _lost(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds by reason between two readings of the throttle counters."""
    return {reason: value - before.get(reason, 0.0) for reason, value in after.items() if value > before.get(reason, 0.0)}


def layer_flops(path: Path | None, candidate: Candidate) -> dict[str, tuple[float | None, str]]:
    """FLOPs and dtype of each node of an ONNX file, for a backend's audit."""
    from gpuopt.profiling import count_onnx

    assert path is not None
    return dict(count_onnx.layer_flops(path, dict(candidate.dims)))


def own_precision(model: Model) -> Precision:
    """The precision a model has as it was loaded. fp32 means TF32 off: the flag that says otherwise is --precision tf32."""
    for precision in (Precision.FP32, Precision.FP16, Precision.BF16, Precision.FP64):
        if model.dtype == precision.dtype:
            return precision
    return Precision.FP32


def dynamic_ranges(candidate: Candidate) -> dict[str, tuple[int, int]]:
    """Dimensions a build must accept a range of: those written `NAME=MIN:USUAL:MAX`."""
    found: dict[str, tuple[int, int]] = {}
    for dim in candidate.inputs.dims:
        if dim.low is not None and dim.high is not None:
            found[dim.name] = (dim.low, dim.high)
    return found


def describe_transforms(transforms: Transforms) -> tuple[str, ...]:
    """Transforms in the words of the report."""
    names = []
    if transforms.channels_last:
        names.append("channels_last")
    if transforms.fold_batch_norm:
        names.append("fold_batch_norm")
    names += [f"keep_fp32:{name}" for name in transforms.keep_fp32]
    return tuple(names)


def positional(inputs: Inputs, num: int) -> Inputs:
    """The same tensors with the first `num` by position: the call an artifact was built for."""
    values = [*inputs.args, *inputs.kwargs.values()]
    names = [spec.name for spec in inputs.specs]
    return replace(inputs, args=tuple(values[:num]), kwargs=dict(zip(names[num:], values[num:], strict=True)))


def move(value: Any, device: str) -> Any:
    """Every tensor of an output nesting, copied to `device`; the nesting becomes plain tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [v.to(device) if isinstance(v, torch.Tensor) else v for _, v in compare.flatten(value)]


def _cell(name: str, form: str | None, device: Device) -> facts.MatrixCell:
    """One row of the matrix; nothing is built."""
    way, reason = "", ""
    presets: tuple[str, ...] = ()
    precisions_: dict[str, str] = {}
    try:
        backend = load_backend(name)
        presets = tuple(backend.PRESETS)
        way = route.find(form, backend, name) if form is not None else ""
        reached = "onnx" if way == "via ONNX" else form or next(iter(sorted(backend.FORMS)))
        reason = backend.available(device.id) or ""
        for precision in Precision:
            precisions_[precision.value] = info.supports(device, precision) or backend.supports(reached, precision, device.id) or ""
        if not reason and all(precisions_.values()):
            reason = precisions_[Precision.FP32.value]
    except GpuoptError as error:
        reason = error.message + (f" ({error.fix})" if error.fix else "")
    return facts.MatrixCell(
        backend=name, summary=backends.SUMMARY.get(name, ""), route=way, reason=reason, presets=presets, precisions=precisions_
    )
