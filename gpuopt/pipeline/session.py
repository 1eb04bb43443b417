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
from typing import Any, cast

import torch

from gpuopt import converters, loaders
from gpuopt.accuracy import gate as accuracy_gate
from gpuopt.accuracy import tolerance as tolerances
from gpuopt.backends import load_backend
from gpuopt.bundles import fingerprint
from gpuopt.bundles import manifest as bundle_manifest
from gpuopt.converters import exported as exported_file
from gpuopt.converters import onnx as onnx_file
from gpuopt.converters import precision as precisions
from gpuopt.converters import rewrites
from gpuopt.converters import weights as weight_files
from gpuopt.core import codec
from gpuopt.core.errors import GpuoptError, Unsupported, UsageError
from gpuopt.core.generation import GenerateSpec, GenerationBuilt, TokenTimes
from gpuopt.core.live import Inputs, Model, Runner
from gpuopt.core.result import Accuracy, Count, Device, Manifest, PrecisionAudit, Samples, Sensitivity
from gpuopt.core.spec import BenchSpec, Candidate, EvalSpec, ModelRef, Precision, Tolerance, Transforms
from gpuopt.devices import info
from gpuopt.doctor import diagnose as doctor
from gpuopt.loaders import factory
from gpuopt.loaders import inputs as input_maker
from gpuopt.pipeline import (
    diagnosis,
    evaluated,
    facts,
    forking,
    gating,
    hostmemory,
    matrix,
    metering,
    nests,
    packs,
    probing,
    profiles,
    references,
    route,
    sensitivity,
    shortfall,
    stress,
    traits,
    verification,
)
from gpuopt.pipeline.anchor import Anchor
from gpuopt.pipeline.asked import describe_transforms, dynamic_ranges, layer_flops, own_precision
from gpuopt.pipeline.drawn import Drawn, positional
from gpuopt.pipeline.facts import ProgressCall
from gpuopt.pipeline.opened import opened
from gpuopt.profiling import count
from gpuopt.timing import clocks, loop

NOTHING_COUNTED = Count(records=(), flops=0.0, flops_by_dtype={}, bytes=0.0, coverage=0.0, method="not counted")


class Session:
    """One candidate. Each method is one step; the order is load, build, verify, measure or block, profile, save, close."""

    def __init__(self, progress: ProgressCall | None = None, started: float | None = None) -> None:
        self._progress: ProgressCall = progress or (lambda fraction, note: None)
        self._started = time.monotonic() if started is None else started
        self._stack = contextlib.ExitStack()
        self._candidate: Candidate | None = None
        self._model: Model | None = None
        """As loaded; what references are computed from."""
        self._is_remade = False
        """Whether it was built on the device by a factory that builds the same again."""
        self._is_parked = False
        """Whether its weights were let go of until somebody asks for them."""
        self._changed: Model | None = None
        """Converted, on the device; what the backend was given."""
        self._runner: Runner | None = None
        self._inputs: Drawn | None = None
        self._manifest: Manifest | None = None
        self._bundle: Path | None = None
        self._count: Count | None = None
        self._pack: packs.Pack | None = None
        self._notes: list[str] = []
        self._throttled: dict[str, float] = {}
        self._precision = Precision.FP32
        self._anchor = Anchor()
        self._evidence: packs.Pack | None = None
        self._facts: facts.Loaded | None = None
        self._evaluation: evaluated.Evaluation | None = None
        self._seen: diagnosis.Seen = diagnosis.Seen()
        """What the profile and the failures of this session leave for the doctor."""

    # -- load ---------------------------------------------------------------------------------------------------------------------

    def load(self, candidate: Candidate) -> facts.Loaded:
        """Open the model and make its inputs. Raises BadInput, Untrusted, UsageError, Unavailable."""
        began = time.monotonic()
        device = info.resolve(candidate.device)
        self._progress(None, "loading the model")
        candidate = replace(candidate, device=device)
        model = loaders.load(candidate.model, device=_home_of(candidate))
        self._is_remade = model.form == "module" and _where(model.module) != "cpu" and factory.places(candidate.model.text)
        return self._adopt(candidate, model, began)

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
            found = opened(candidate, model)
            self._manifest, self._bundle, self._pack = found.manifest, found.path, found.pack
            self._candidate, self._precision = found.candidate, found.precision
            self._notes += found.notes
            backend, preset, transforms = found.manifest.backend.name, found.manifest.backend.preset, found.manifest.transforms
        else:
            self._precision = candidate.precision or own_precision(model)
            device = info.describe(candidate.device)
            reason = info.supports(device, self._precision) or info.supports(device, self._precision.carrier)
            if reason:
                raise Unsupported(f"{self._precision} cannot run on {candidate.device}: {reason}", fix="another --precision or --device")
            if (slow := info.emulates(device, self._precision)) is not None:
                self._notes.append(slow)
        current = self._candidate
        made = inputs or input_maker.make(model, current.inputs, current.dims, "cpu", None)
        num_positional = self._manifest.positional if self._manifest is not None else None
        if num_positional is not None:
            made = positional(made, num_positional)
        # What the sources filled in (N=1, S=128) is part of the candidate from here on, so that every seed gets the same shapes.
        self._candidate = replace(current, dims=dict(made.dims))
        self._inputs = Drawn(self._candidate, model, made, num_positional)
        self._started -= forking.spared_s(candidate.backend.name, model.module)
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
        self._score(candidate.evaluation, model, made)
        return self._facts

    def _score(self, spec: EvalSpec, model: Model, made: Inputs) -> None:
        """Read real data and score the model as it is, before anything is built. It is no part of a cold start."""
        if spec == EvalSpec():
            return
        began = time.monotonic()
        self._evaluation = evaluated.Evaluation(spec, made)
        if self._manifest is None:
            self._evaluation.score_reference(model, self._loaded()[0].device, self._progress)
        else:
            evidence = self._manifest.run.accuracy if self._manifest.run is not None else None
            self._evaluation.known_reference(evidence.metric if evidence is not None else None)
        self._started += time.monotonic() - began

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
        told = len(self._notes)
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
        if audit is not None and self._manifest is None and executable and model.form == "module":
            audit = shortfall.judged(audit, lambda: self._audit_of_eager(candidate))
        host_peak_bytes = hostmemory.peak_bytes()
        # A cast says nothing new; what was quantised, and what was not, no other part of a report says.
        notes = [
            *(self._notes[told:] if self._precision.is_quantised or candidate.transforms.rewrites else ()),
            *getattr(self._runner, "notes", []),
        ]
        if audit is not None and audit.requested is None:
            audit = replace(audit, requested=self._precision.value)
        return facts.Built(
            compile_s=compile_s,
            cold_start_s=cold_start_s,
            audit=audit,
            count=self._count,
            executable=executable,
            host_peak_bytes=host_peak_bytes,
            transforms=transforms,
            notes=tuple(notes),
        )

    def _audit_of_eager(self, candidate: Candidate) -> PrecisionAudit | None:
        """What plain eager computes the changed module in, on the same inputs."""
        assert self._runner is not None
        if self._is_eager() or self._changed is None or self._changed.form != "module":
            return self._runner.audit() if self._is_eager() else None
        given = self._drawn().sample(self._precision, candidate.device)
        return cast(PrecisionAudit | None, load_backend("eager").build(self._changed, given, {"precision": self._precision.value}).audit())

    def _construct(
        self,
        candidate: Candidate,
        model: Model,
        precision: Precision,
        *,
        build_only: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Runner, Model]:
        """Converted model and its runner, at this precision. `options`: others than the candidate's own."""
        backend = load_backend(candidate.backend.name)
        way = route.check(model.form, backend, str(candidate.backend), precision, candidate.device, build_only=build_only)
        options = self._options(candidate, precision) if options is None else dict(options)
        if build_only:
            options["build_only"] = True
        if model.form == "onnx":
            if candidate.precision is not None and candidate.precision.dtype != own_precision(model).dtype:
                raise Unsupported(
                    f"an ONNX file keeps the precision it was exported in ({own_precision(model)})",
                    fix="export the source model at this precision: gpuopt convert MODEL --precision … --to onnx",
                )
            if candidate.transforms.rewrites:
                raise Unsupported(
                    f"an ONNX file has no modules that {candidate.transforms.rewrites[0]} could change", fix="rewrite the source model"
                )
            options["layer_flops"] = layer_flops(model.path, candidate)
            return backend.build(model, self._given(precision), options), model
        change = candidate.transforms
        # As it is means as it is: a cast to the dtype of most parameters would hide the few that differ, and what they cost.
        to = None if candidate.precision is None and precision is self._precision else precision
        where = candidate.device if way == "direct" else "cpu"
        changed = converters.apply(model, to, change, self._drawn().sample(precision, "cpu"), device=where)
        self._notes += [n for n in changed.notes if n not in self._notes]
        if way == "via ONNX":
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="gpuopt-onnx-")))
            self._progress(None, f"exporting to ONNX for {candidate.backend.name}")
            sample = self._drawn().sample(precision, "cpu")
            # Not run on the CPU here, as a conversion would be: what the backend makes of it is verified at full size anyway.
            path = onnx_file.export(changed, sample, folder / "model.onnx", dynamic_ranges(candidate), check=False)
            through = loaders.onnx_model(path, model.name)
            options["layer_flops"] = layer_flops(path, candidate)
            return backend.build(through, self._drawn().sample(precision, candidate.device), options), changed
        if changed.module is not None:
            changed.module.to(candidate.device)
        self._progress(None, f"building {candidate.backend}")
        return backend.build(changed, self._drawn().sample(precision, candidate.device), options), changed

    def _require_fitting_inputs(self, model: Model, error: Exception) -> None:
        """After a build failed: raises UsageError where the model as it was loaded does not run on these inputs either."""
        was_told = isinstance(error, GpuoptError) and not (isinstance(error, Unsupported) and error.__cause__ is not None)
        if was_told or isinstance(error, MemoryError | torch.OutOfMemoryError) or "CUDA" in str(error) or model.module is None:
            return
        candidate, _ = self._loaded()
        try:
            verification.eager_outputs(model, own_precision(model), [self._drawn().sample(own_precision(model), "cpu")], candidate.device)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as own:
            why = next((line.strip() for line in str(own).splitlines() if line.strip()), type(own).__name__)[:300]
            given = ", ".join(str(replace(s, high=None, fill=None)) for s in self._drawn().first.specs)
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
        return count.count(self._changed.module, self._drawn().sample(self._precision, "cpu"), tf32=self._precision is Precision.TF32)

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
        dtype = getattr(torch, self._precision.carrier.dtype)
        is_plain = candidate.backend.name == "eager" and candidate.transforms == Transforms()
        is_twin = is_plain and not self._precision.is_quantised
        held = self._gate(tolerance, scales=mode == "full" and not is_twin)
        found, twins, limits = held.found, held.twin.outputs, held.limits
        batches, seeds = list(held.material.drawn), held.material.seeds
        stages = []
        notes: list[str] = ["the model itself writes into its inputs"] if found.mutates_inputs else []
        if mode == "full" and model.form not in ("onnx", "torchscript"):
            if is_plain:
                notes.append("structure: not run, plain eager is the reference's own code")
            elif self._precision is not Precision.FP32:
                self._progress(None, "verifying the structure in fp32")
                kept, left = rewrites.in_fp32(candidate.transforms.rewrites, candidate.device)
                in_fp32 = replace(candidate, transforms=replace(candidate.transforms, rewrites=kept))
                if candidate.backend.name == "eager" and in_fp32.transforms == Transforms():
                    notes.append(f"structure: not run, {left[0]} has no fp32 form and nothing else differs from the reference's own code")
                else:
                    stages.append(self._structure(in_fp32, model, found, batches, seeds, limits))
                    notes += [f"structure: run without {text}, which has no fp32 form" for text in left]
        self._progress(None, "verifying the candidate")
        every, required = held.material.every, held.material.required
        answers = verification.runner_outputs(runner, every, dtype, candidate.device, required=required)
        outputs, first = answers.outputs, len(batches)
        spread = None if answers.deterministic else accuracy_gate.spread_of(runner, batches, dtype, candidate.device, outputs[:first])
        if mode == "full" and self._precision is Precision.FP32 and not is_plain and model.form not in ("onnx", "torchscript"):
            stages.append(accuracy_gate.judge_stage("structure", found.outputs, outputs, twins, limits, seeds))
        judged, more = held.judge(outputs, answers.raised, spread=spread)
        stages += judged
        notes += more
        if answers.overwrites:
            notes.append("what a call returned is overwritten by the next one: copy outputs that are kept")
        unstable = held.twin.unstable
        if unstable and is_twin and self._precision is own_precision(model):
            notes.append(unstable)  # the model as it is: there is nothing to hold it against but itself
            unstable = ""
        metric = None
        if self._evaluation is not None and not unstable and all(stage.passed for stage in stages):
            metric = self._evaluation.judged(runner, dtype, candidate.device, self._progress)
        accuracy = accuracy_gate.verdict(
            tuple(stages),
            reference=found.kind,
            deterministic=answers.deterministic,
            mutates_inputs=answers.mutates_inputs,
            reference_mutates_inputs=found.mutates_inputs,
            unstable=unstable,
            metric=metric,
            notes=tuple(notes),
        )
        self._pack = None
        self._evidence = packs.Pack.sampled(found.outputs[:first], twins[:first], seeds, found.kind)
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
        """Built without what only picks kernels or replays them, so candidates that differ in nothing else share its outputs: the first of them computes them."""
        options = self._options(candidate, Precision.FP32)
        structural = getattr(load_backend(candidate.backend.name), "structural", None)
        options = options if structural is None else structural(options)

        def computed() -> list[verification.Named]:
            runner, _ = self._construct(candidate, model, Precision.FP32, options=options)
            try:
                return verification.runner_outputs(runner, batches, torch.float32, candidate.device).outputs
            finally:
                runner.close()
                verification.release(candidate.device)

        with verification.exact_math():
            shared = references.Shared(candidate.model, model, batches, candidate.device)
            twins = shared.eager_outputs(Precision.FP32)
            outputs = shared.outputs(
                f"structure:{candidate.backend.name}:{sorted(options.items(), key=str)}:{codec.digest(candidate.transforms)}", computed
            )
        return accuracy_gate.judge_stage("structure", found.outputs, outputs, twins, limits, seeds)

    def _gate(self, tolerance: Tolerance, *, scales: bool) -> gating.Gate:
        """What this candidate is held against, at its precision."""
        candidate, model = self._loaded()
        batches, seeds = self._drawn().batches()
        material = gating.Material(
            drawn=batches,
            seeds=seeds,
            real=self._evaluation.batches() if self._evaluation is not None else (),
            stressed=stress.batches(self._drawn().first) if scales else (),
        )
        self._progress(None, "computing the reference")
        found, twin = self._references(model, material.every, candidate.device, required=material.required)
        limits = tolerances.merged(self._precision, tolerance, approximate=rewrites.is_approximate(candidate.transforms.rewrites))
        is_cast = self._precision.carrier.dtype != own_precision(model).dtype
        return gating.Gate(material=material, found=found, twin=twin, limits=limits, is_cast=is_cast)

    def sensitivity(self, tolerance: Tolerance, budget: int = 64, seconds: float = 300.0) -> Sensitivity:
        """Which modules must stay in fp32 for this candidate's precision to pass its gate. On eager copies, so nothing is built: after `load`, or a failed `verify`.

        At most `budget` sets are tried, and none is begun after `seconds`. Raises Unsupported for a form whose modules cannot be cast apart.
        """
        candidate, model = self._loaded()
        sensitivity.require(model)
        return sensitivity.find(
            model,
            candidate.transforms,
            self._precision,
            self._gate(tolerance, scales=True),
            sample=self._drawn().sample(self._precision, candidate.device),
            device=candidate.device,
            evaluation=self._evaluation,
            count=self._count,
            budget=budget,
            seconds=seconds,
            progress=self._progress,
        )

    def _references(
        self, model: Model, batches: list[Inputs], device: str, *, required: int | None = None
    ) -> tuple[verification.Reference, verification.Twin]:
        """What candidates are held against, and plain eager at the candidate's precision. Batches from `required` on may be refused by the model."""
        if model.form in ("onnx", "torchscript"):
            found = verification.reference_of_file(model, batches, required=required)
            return found, verification.Twin(outputs=found.outputs, refused=found.refused)
        shared = references.Shared(self._loaded()[0].model, model, batches, device, required=required)
        return shared.reference(), shared.twin(self._precision)

    def _verify_pack(self, tolerance: Tolerance) -> Accuracy:
        """A bundle against the reference outputs it carries."""
        pack = self._pack
        assert pack is not None
        candidate, _ = self._loaded()
        runner = self._built()
        dtype = getattr(torch, self._precision.carrier.dtype)
        assert self._manifest is not None
        if dict(candidate.dims) != dict(self._manifest.dims):
            # The reference was taken at the sizes the bundle was compiled for; they are within its ranges, so it can be run at them.
            batches = [self._drawn().batch(seed, dims=dict(self._manifest.dims)) for seed in pack.seeds]
        else:
            batches = [self._drawn().batch(seed) for seed in pack.seeds]
        answers = verification.runner_outputs(runner, batches, dtype, candidate.device)
        deterministic, mutates = answers.deterministic, answers.mutates_inputs
        sampled = []
        for named in answers.outputs:
            kept, reason = pack.of(named)
            if reason:
                return Accuracy(passed=False, reference=pack.kind, reason=reason, deterministic=deterministic, mutates_inputs=mutates)
            sampled.append(kept)
        limits = tolerances.merged(self._precision, tolerance, approximate=rewrites.is_approximate(self._manifest.transforms))
        stage = accuracy_gate.judge_stage("precision", list(pack.reference), sampled, list(pack.twins), limits, pack.seeds)
        metric = None
        if self._evaluation is not None and stage.passed:
            metric = self._evaluation.judged(runner, dtype, candidate.device, self._progress)
        return accuracy_gate.verdict(
            (stage,),
            reference=pack.kind,
            deterministic=deterministic,
            mutates_inputs=mutates,
            metric=metric,
            notes=(f"against the bundle's own reference, {packs.SAMPLES} elements an output at most",),
        )

    # -- generate -----------------------------------------------------------------------------------------------------------------

    def generate(self, generate: GenerateSpec, verify: bool = True) -> GenerationBuilt:
        """Instead of build and verify: a runner whose call is a whole generation. Raises what both raise."""
        from gpuopt.pipeline import generating  # brings transformers, which nothing else needs

        candidate, model = self._loaded()
        self._stack.enter_context(precisions.flags(self._precision))
        self._runner, found = generating.built(
            candidate, model, self._drawn(), self._precision, generate, verify=verify, started=self._started, progress=self._progress
        )
        return found

    def token_times(self) -> TokenTimes:
        """Prompt and tokens apart, of the calls that were timed."""
        found: TokenTimes = self._built().token_times()  # type: ignore[attr-defined]
        return found

    # -- measure ------------------------------------------------------------------------------------------------------------------

    def measure(self, spec: BenchSpec) -> facts.Measured:
        """Warm up and time this candidate alone."""
        call, clock, device = self._timed()
        before = info.throttle_counters(device)
        with precisions.flags(self._precision):  # another session of this process may have set its own since
            samples = loop.measure(call, clock, spec, progress=lambda share: self._progress(share, "timing"))
            return self._metered(samples, spec, metering.lost(before, info.throttle_counters(device)))

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
        for reason, lost_ms in metering.lost(before, info.throttle_counters(device)).items():
            self._throttled[reason] = self._throttled.get(reason, 0.0) + lost_ms
        return facts.Measured(samples=samples)

    def meters(self, spec: BenchSpec) -> facts.Measured:
        """Memory, energy and throttling, after the interleaved blocks: none of it disturbs a clock that is running."""
        with precisions.flags(self._precision):
            return self._metered(Samples(), spec, self._throttled)

    def _metered(self, samples: Samples, spec: BenchSpec, throttled_ms: Mapping[str, float]) -> facts.Measured:
        call, clock, device = self._timed()
        batch = self._drawn().first.batch
        found = metering.metered(call, clock, device, samples=samples, spec=spec, throttled_ms=throttled_ms, batch=batch)
        self._seen.peak_bytes, self._seen.throttled_ms = found.peak_bytes, dict(throttled_ms)
        self._seen.measured_ms = (samples.wall_ns or 0) / 1e6 or None
        return found

    def _timed(self) -> tuple[Callable[[], Any], clocks.Clock, str]:
        """The call that is timed: the runner alone, or with its inputs copied in and its outputs copied out."""
        device = self._asked().device
        self._park()
        return self._timed_on(self._given()), clocks.for_device(device), device

    def _timed_on(self, given: Inputs) -> Callable[[], Any]:
        candidate = self._asked()
        return metering.timed(self._built(), given, mode=candidate.input_mode, device=candidate.device)

    # -- probe --------------------------------------------------------------------------------------------------------------------

    def probe(self, device: Device, wall_ms: float) -> None:
        """For the doctor alone, before the trace: how long larger batches take, and what torch.compile compiles again at other sizes. Whatever cannot be tried is left out:
        the user's own tensors have one size, and so has most of what was built."""
        candidate, model = self._loaded()
        if self._drawn().is_given or self._manifest is not None or model.form != "module":
            return
        ranges = dynamic_ranges(candidate)
        call, clock, where = self._timed()
        if device.kind == "cuda" and "N" in candidate.dims and (self._is_eager() or "N" in ranges):
            self._progress(None, "timing larger batches")
            with precisions.flags(self._precision):
                self._seen.batch_curve = probing.curve(
                    lambda batch: self._timed_on(self._drawn().of_size({**candidate.dims, "N": batch}, self._precision, where)),
                    clock,
                    batch=self._drawn().first.batch,
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
            found = probing.calls(
                probing.sizes(candidate.dims, ranges), lambda dims: self._drawn().of_size(dims, self._precision, candidate.device)
            )
            self._seen.recompiles = breaks.probe(self._changed.module, found)

    # -- profile ------------------------------------------------------------------------------------------------------------------

    def profile(self, device: Device, wall_ms: float, depth: int) -> facts.Profiled:
        """Trace in a run of its own and set it against the untraced wall time. Raises ImpossibleFigure for one that cannot be."""
        call, _, where = self._timed()
        self.require_traceable()
        return profiles.profile(
            self._built(),
            call,
            where=where,
            given=self._given(),
            source=self._changed.module if self._changed is not None else None,
            has_modules=self._is_eager(),
            counted=self._count or NOTHING_COUNTED,
            device=device,
            wall_ms=wall_ms,
            depth=depth,
            seen=self._seen,
            progress=self._progress,
        )

    def require_traceable(self) -> None:
        """Raises Unsupported for a backend whose work no trace shows: asked before it is built, so that nobody waits for a refusal."""
        if self._asked().device == "cpu" and getattr(self._backend(), "OPAQUE_ON_CPU", False):
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
            model=self._on_host() if failed else self._loaded()[1],
            inputs=self._inputs.first if self._inputs is not None else None,
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
        return load_backend(self._manifest.backend.name if self._manifest is not None else self._asked().backend.name)

    def _is_eager(self) -> bool:
        return self._asked().backend.name == "eager"

    # -- save ---------------------------------------------------------------------------------------------------------------------

    def save(self, folder: str) -> facts.Saved:
        """Write the artifact, the reference outputs and the given inputs into an existing empty folder."""
        candidate, _ = self._loaded()
        target = Path(folder)
        runner = self._built()
        files = dict(runner.save(target))
        if self._evidence is None and getattr(runner, "build_only", False):
            # Built for another machine: it is verified there, against outputs that only the source can give.
            batches, seeds = self._drawn().batches()
            found, twin = self._references(self._loaded()[1], batches, "cpu")
            self._evidence = packs.Pack.sampled(found.outputs, twin.outputs, seeds, found.kind)
        if self._evidence is not None:
            files["reference"] = packs.write(self._evidence, target)
        inputs = self._drawn().first
        model = self._loaded()[1]
        nest = (
            nests.of_call(model.module, self._drawn().sample(own_precision(model), _where(model.module)))
            if model.form == "module"
            else None
        )
        if nest is not None:
            files["outputs"] = nests.write(nest, target)
        if self._drawn().is_given:
            files["inputs"] = packs.write_inputs(inputs, target)
        assert self._facts is not None
        loaded = self._facts
        if self._drawn().is_given and "N" not in input_maker.shared_dims(inputs):
            loaded = replace(
                loaded, dims={name: size for name, size in loaded.dims.items() if name != "N"}
            )  # as whoever reads the file will find them
        return facts.Saved(
            files=files,
            loaded=loaded,
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
        sample = self._drawn().sample(self._precision, "cpu")
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
        return matrix.survey(device_id, refresh, ceilings, self._progress)

    def require_preset(self, backend: str, preset: str) -> None:
        """Raises UsageError for a preset that the backend has none of, before anything is measured for it."""
        matrix.require_preset(backend, preset)

    def matrix(self, device_id: str, candidate: Candidate | None = None) -> facts.Matrix:
        """Every backend, for this model where one is named: the way to it, or the reason why there is none."""
        return matrix.matrix(device_id, candidate)

    def traits(self, ref: ModelRef) -> traits.Traits:
        """What a search asks of a model before anything is built."""
        return traits.of(loaders.load(ref, device="meta"))

    def anchor(self, quantity: str, device: Device, spec: BenchSpec) -> facts.Anchored:
        """One block of products in this quantity: the ceiling under the load of a bench. Raises OutOfMemory."""
        samples, flops, how = self._anchor.block(quantity, device, spec)
        return facts.Anchored(samples=samples, flops=flops, how=how)

    def runner(self) -> Runner:
        """What was built."""
        return self._built()

    def call_form(self) -> tuple[tuple[str, ...], int]:
        """Names of the inputs in order, and how many of them are positional."""
        inputs = self._drawn().first
        return tuple(spec.name for spec in inputs.specs), len(inputs.args)

    def around(self) -> Callable[[Any], Any] | None:
        """What puts the tensors of a bundle into the nest of the model it was built from; None where the bundle does not know it."""
        if self._manifest is None or self._bundle is None:
            return None
        name = bundle_manifest.file_of(self._manifest, "outputs")
        is_data = self._manifest.backend.name in bundle_manifest.DATA_BACKENDS
        return nests.Around(nests.read(self._bundle / name), may_construct=not is_data) if name is not None else None

    def changed_module(self) -> Any:
        """The converted nn.Module, on the CPU."""
        if self._changed is None or self._changed.module is None:
            raise AssertionError("build comes first")
        return self._changed.module.to("cpu")

    def close(self) -> None:
        """Give everything back. Harmless twice."""
        if self._runner is not None:
            self._runner.close()
        self._runner = self._changed = self._model = self._inputs = None
        self._is_parked = self._is_remade = False
        self._anchor.close()
        self._stack.close()

    # -- inputs -------------------------------------------------------------------------------------------------------------------

    def _given(self, precision: Precision | None = None) -> Inputs:
        """The first seed's inputs on the device, at the precision the runner takes."""
        return self._drawn().sample(precision or self._precision, self._asked().device)

    def _drawn(self) -> Drawn:
        if self._inputs is None:
            raise AssertionError("load comes first")
        return self._inputs

    def _asked(self) -> Candidate:
        if self._candidate is None or self._model is None:
            raise AssertionError("load comes first")
        return self._candidate

    def _loaded(self) -> tuple[Candidate, Model]:
        """The model with its weights."""
        candidate = self._asked()
        assert self._model is not None
        if self._is_parked:
            self._model.module = loaders.load(candidate.model, device=candidate.device).module
            self._is_parked = False
        return candidate, self._model

    def _on_host(self) -> Model:
        """The model where its inputs are made: what is wrong with a call is looked for on the CPU, and a device may be out of order, or of memory."""
        candidate, model = self._asked(), self._model
        assert model is not None
        if self._is_remade:
            model.module = loaders.load(candidate.model).module
            self._is_remade = self._is_parked = False
        return model

    def _park(self) -> None:
        """Let go of the weights the model was loaded with, where they lie on the device beside those that are timed, and its factory makes them again in no time.

        What is timed has the memory to itself then, and what it takes is its own.
        """
        model = self._model
        if model is None or not self._is_remade or self._is_parked or self._runs(model.module):
            return
        model.module.to("meta")
        self._is_parked = True
        verification.release(self._asked().device)

    def _runs(self, module: Any) -> bool:
        """Whether what was built is, or may be, this very module."""
        if self._changed is not None:
            return self._changed.module is module
        return getattr(self._runner, "module", module) is module

    def _built(self) -> Runner:
        if self._runner is None:
            raise AssertionError("build comes first")
        return self._runner


def _home_of(candidate: Candidate) -> str:
    """Where a factory may build: on the GPU that its model will run on, unless the way there leads over a file that is exported on the CPU."""
    if not candidate.device.startswith("cuda"):
        return "cpu"
    try:
        way = route.find("module", load_backend(candidate.backend.name), str(candidate.backend))
    except GpuoptError:  # said where it is built
        return "cpu"
    return candidate.device if way == "direct" else "cpu"


def _where(module: Any) -> str:
    """The device of a module's weights; the CPU for one that has none, or no real ones."""
    first = next(iter(module.parameters()), None)
    return "cpu" if first is None or first.is_meta else str(first.device)
