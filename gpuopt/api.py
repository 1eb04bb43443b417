"""The verbs for a live `nn.Module`: the same steps as the command line, in the caller's own process.

    report = gpuopt.profile(model, x)
    report = gpuopt.bench(model, x, backends=("eager", "inductor"), precisions=("fp32", "fp16"))
    half = gpuopt.convert(model, x, precision="fp16", channels_last=True)
    report = gpuopt.compile(model, x, backend="aoti", precision="fp16", output="fast/")
    fast = gpuopt.load("fast/"); y = fast(x)
    best = gpuopt.optimize(model, x, output="best/"); y = best.model(x)
    whole = gpuopt.optimize(pipe, run=lambda: pipe(prompt)); print(whole); whole.restore()
    big = gpuopt.stream(model, budget="8GiB", inputs=x); y = big(x); print(big.plan.predicted_ms); big.close()

Nothing is isolated here but the candidates of `optimize`: a backend that crashes takes the caller with it. The command line runs each in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gpuopt.bundles import write as bundle_writer
from gpuopt.converters.rewrites import checked
from gpuopt.core import binding, units
from gpuopt.core.errors import GateFailed, GpuoptError, ResourceError, Unsupported, UsageError
from gpuopt.core.result import SCHEMA_VERSION, Count, Device, Report, Run, Samples, Status
from gpuopt.core.search import SearchSpec
from gpuopt.core.spec import BackendSpec, BenchSpec, Candidate, ModelRef, Precision, Tolerance, Transforms
from gpuopt.pipeline import anchor, facts, figures, livemodel, manifests, pairs
from gpuopt.pipeline.search.live import whole
from gpuopt.pipeline.search.live.searched import Optimized, optimized
from gpuopt.pipeline.search.live.whole import OptimizedPipeline
from gpuopt.pipeline.seats import MIN_ANCHOR_BLOCKS
from gpuopt.pipeline.session import Session
from gpuopt.pipeline.streamed.command import spec_of
from gpuopt.pipeline.streamed.live import StreamedModule, streamed
from gpuopt.pipeline.worker import classify


def profile(
    model: torch.nn.Module,
    inputs: Any,
    *,
    backend: str = "eager",
    precision: str | None = None,
    device: str = "auto",
    depth: int = 3,
    spec: BenchSpec | None = None,
) -> Report:
    """Where the time of `model(*inputs)` goes, and how far that is from the roofline.

    `inputs` is a tensor, a tuple of them, or a dict of keyword arguments. Raises GpuoptError for whatever the caller can act on.
    """
    spec = spec or BenchSpec()
    found = _survey(device)
    candidate = _candidate(backend, precision, device)
    with _session(model, inputs, candidate) as (session, run):
        made = session.build()
        run = _required(figures.built(run, made, candidate))
        run = figures.measured(run, session.measure(spec), found.device, made.count)
        assert run.latency_ms is not None
        run = figures.profiled(run, session.profile(found.device, run.latency_ms.median, depth))
    return _report("profile", found, [run])


def bench(
    model: torch.nn.Module,
    inputs: Any,
    *,
    backends: Sequence[str] = ("eager",),
    precisions: Sequence[str | None] = (None,),
    device: str = "auto",
    spec: BenchSpec | None = None,
    tolerance: Tolerance | None = None,
) -> Report:
    """Verified times of every backend x precision, in interleaved blocks. `backends` are written as on the command line: `inductor:max-autotune`.

    One that cannot be, or fails its verification, is a run with its status and reason, and the others go on; where all fail with an error, it is raised.
    """
    spec, tolerance = spec or BenchSpec(), tolerance or Tolerance()
    found = _survey(device)
    runs: list[Run] = []
    counts: list[Count | None] = []
    errors: list[GpuoptError] = []
    live: list[tuple[int, Session]] = []
    given = livemodel.handles(model, inputs)
    with _closing(live):
        for precision in precisions:
            for backend in backends:
                session = Session()
                candidate = _candidate(backend, precision, device)
                live.append((len(runs), session))
                run, count = figures.started(candidate), None
                try:
                    run = figures.loaded(run, session.adopt(candidate, *given))
                    made = session.build()
                    run, count = figures.built(run, made, candidate), made.count
                    if run.status is Status.OK and spec.verify != "off":
                        run = figures.verified(run, session.verify(tolerance, spec.verify))
                except GpuoptError as error:
                    errors.append(error)
                    run = figures.failed(run, classify(error, "build"), error.message, error.fix)
                runs.append(run)
                counts.append(count)
        if errors and len(errors) == len(runs):
            raise errors[0]
        timed = {index: session for index, session in live if runs[index].status is Status.OK}
        samples = {index: session.warm(spec).samples for index, session in timed.items()}
        sides: dict[int, Callable[[], Samples]] = {i: (lambda s=s: s.block(spec).samples) for i, s in timed.items()}  # type: ignore[misc]
        with _products([counts[i] for i in timed], samples.values(), found.device, spec) as products:
            blocks = pairs.interleave(sides, spec, beside=products.sides)
        found = replace(found, device=products.beside(found.device, blocks))
        for index, session in timed.items():
            samples[index] = samples[index] + pairs.joined(blocks[index])
            runs[index] = figures.measured(runs[index], replace(session.meters(spec), samples=samples[index]), found.device, counts[index])
    first = min(timed, default=None)
    for index in timed:
        if first is not None and index != first:
            runs[index] = figures.relative(runs[index], samples[first], samples[index])
    return _report("bench", found, runs)


def stream(
    model: torch.nn.Module,
    *,
    budget: str,
    inputs: Any = None,
    device: str = "auto",
    generate: int | None = None,
    pin_limit: str | None = None,
    disk: str | None = None,
    slots: int | None = None,
    granularity: str = "block",
    embed: str = "device",
    compile: bool = False,
    graphs: bool = False,
    once: bool = False,
) -> StreamedModule:
    """`model` within a budget of device memory: blocks stay as far as it goes, the others are copied in time. Ready to call, `generate()` included.

    budget: `"8GiB"` of device memory in all, or `"50%"` of the weights on the device. inputs: of a typical call (a tensor, a tuple, or a dict of keyword
    arguments; the prompt where `generate` tokens are made), on which units are timed; without them compute is estimated. device: `cuda`, or
    `simulated:link=25e9` for one on paper. compile, graphs: of each block, after it was bound; graphs want a GPU. The answer has `.plan` and `.close()`, which gives the weights back on the CPU; it is a context manager, too.

    Raises ResourceError where the budget is too small, with the numbers and the setting that would lower it; UsageError for a module in training mode.
    """
    spec = spec_of(
        budget,
        pin_limit_bytes=None if pin_limit is None else units.parse_bytes(pin_limit),
        disk=disk,
        num_slots=slots,
        granularity=granularity,
        embed=embed,
        compile=compile,
        graphs=graphs,
        once=once,
    )
    return streamed(model, inputs, spec, device=device, generate=generate)


@dataclass(slots=True)
class _Products:
    """Blocks of products between the candidates' own: the ceiling under the load of this bench."""

    sides: dict[int, Callable[[], Samples]] = field(default_factory=dict)
    made: dict[int, tuple[str, float, str]] = field(default_factory=dict)
    """Side -> quantity, FLOPs a call and how, as its last block said."""

    def beside(self, device: Device, blocks: Mapping[int, Sequence[Samples]]) -> Device:
        """The device with the sustained ceilings of these blocks."""
        rows = [
            anchor.ceiling(quantity, pairs.joined(blocks[side]), flops, how)
            for side, (quantity, flops, how) in self.made.items()
            if len(blocks.get(side, ())) >= MIN_ANCHOR_BLOCKS
        ]
        return replace(device, ceilings=replace(device.ceilings, rows=(*device.ceilings.rows, *rows)))


@contextmanager
def _products(counts: Sequence[Count | None], samples: Iterable[Samples], device: Device, spec: BenchSpec) -> Iterator[_Products]:
    """One side a quantity that these candidates compute in; none where that is off, or the models leave no memory for it."""
    found, products = _Products(), anchor.Anchor()
    seen = [s.samples_ns or s.warmup_ns[-5:] for s in samples]
    blocks = anchor.block_spec(spec, min((median(times) / 1e6 for times in seen if times), default=0.0))
    try:
        for side, quantity in enumerate(anchor.wanted(list(counts), device, spec.sustained), 1):

            def block(side: int = -side, quantity: str = quantity) -> Samples:  # below the candidates' own numbers
                timed, flops, how = products.block(quantity, device, blocks)
                found.made[side] = (quantity, flops, how)
                return timed

            try:
                block()
            except ResourceError:
                continue
            found.sides[-side] = block
        yield found
    finally:
        products.close()


def convert(
    model: torch.nn.Module,
    inputs: Any,
    *,
    precision: str | None = None,
    channels_last: bool = False,
    fold_batch_norm: bool = False,
    keep_fp32: Sequence[str] = (),
    tolerance: Tolerance | None = None,
) -> torch.nn.Module:
    """A changed, verified copy of `model` on the CPU; the original is left alone. Raises GateFailed when the copy is outside the accuracy gate."""
    change = Transforms(channels_last=channels_last, fold_batch_norm=fold_batch_norm, keep_fp32=tuple(keep_fp32))
    candidate = replace(_candidate("eager", precision, "cpu"), transforms=change)
    with _session(model, inputs, candidate) as (session, run):
        run = _required(figures.built(run, session.build(), candidate))
        _required(figures.verified(run, session.verify(tolerance or Tolerance())))
        module: torch.nn.Module = session.changed_module()
        return module


def compile(
    model: torch.nn.Module,
    inputs: Any,
    *,
    backend: str = "inductor",
    precision: str | None = None,
    output: str | Path,
    device: str = "auto",
    force: bool = False,
    spec: BenchSpec | None = None,
    tolerance: Tolerance | None = None,
) -> Report:
    """Build one backend, verify it, time it and write a bundle. Raises GateFailed when it is outside the accuracy gate; nothing is written then."""
    spec = spec or BenchSpec()
    target = Path(output)
    bundle_writer.check_target(target, force=force)
    found = _survey(device)
    candidate = _candidate(backend, precision, device)
    with _session(model, inputs, candidate) as (session, run):
        made = session.build()
        run = _required(figures.built(run, made, candidate))
        run = _required(figures.verified(run, session.verify(tolerance or Tolerance())))
        run = figures.measured(run, session.measure(spec), found.device, made.count)
        with bundle_writer.staging(target, force=force) as folder:
            saved = session.save(str(folder))
            bundle_writer.publish(folder, target, manifests.assemble(candidate, run, saved, verified=True), force=force)
    return replace(_report("compile", found, [run]), output=target.name)


def optimize(
    model: Any,
    inputs: Any = None,
    *,
    run: Callable[[], Any] | None = None,
    goal: str = "latency",
    output: str | Path | None = None,
    backends: Sequence[str] = (),
    precisions: Sequence[str] = (),
    rewrites: Sequence[str] | None = None,
    time_budget: float | str | None = None,
    latency_budget: float | str | None = None,
    max_memory: int | str | None = None,
    device: str = "auto",
    spec: BenchSpec | None = None,
    tolerance: Tolerance | None = None,
    resume: bool = False,
) -> Optimized | OptimizedPipeline:
    """The fastest verified way to run `model(*inputs)`, never one slower than the model as it is: `.model` is called in its place, `.search` says what was tried.

    With `run=lambda: pipe(...)` instead of `inputs`, `model` is anything that holds modules (a diffusion, speech or retrieval pipeline): the calls that one `run()`
    makes of each are recorded, each is optimized, the winners are put in place, and the whole is verified and measured; `.restore()` undoes it.

    Budgets are texts as on the command line (`"10m"`, `"8ms"`, `"40GiB"`) or numbers: seconds for time, milliseconds for latency, bytes for memory.
    `goal="throughput"` is at the batch of `inputs`: a live call has one size. Each candidate runs in a process of its own where the module can be saved and its
    classes imported there; else in this one, which the report says (`not-isolated`). Raises GpuoptError for whatever the caller can act on.
    """
    search = SearchSpec(
        goal=goal,
        latency_budget_ms=None if latency_budget is None else units.parse_seconds(str(latency_budget), default="ms") * 1e3,
        max_memory_bytes=None if max_memory is None else units.parse_bytes(str(max_memory)),
        time_budget_s=None if time_budget is None else units.parse_seconds(str(time_budget)),
        backends=tuple(backends),
        precisions=tuple(Precision(p).value for p in precisions),
        rewrites=None if rewrites is None else checked(tuple(rewrites)),
        resume=resume,
    )
    spec, tolerance = spec or BenchSpec(), tolerance or Tolerance()
    if run is None:
        if inputs is None:
            raise UsageError("optimize needs the inputs of a call", fix="optimize(model, inputs), or optimize(pipe, run=lambda: pipe(...))")
        return optimized(model, inputs, spec=search, bench=spec, tolerance=tolerance, device=device, output=output)
    for name, value in (("inputs", inputs), ("output", output), ("resume", resume or None)):
        if value is not None:
            raise UsageError(
                f"{name} goes with one module, and run= with a whole pipeline", fix=f"leave {name} away, or optimize one module by itself"
            )
    return whole.optimized(model, run, spec=search, bench=spec, tolerance=tolerance, device=device)


def load(bundle: str | Path, *, device: str = "auto", trust: Sequence[str] = ()) -> Callable[..., Any]:
    """A bundle -> a callable that checks shapes, dtypes and devices before it runs. Close it with `.close()`, or let the process end.

    It returns what the model it was built from returns: the same nest of dicts, tuples and named classes (a class that is not importable here comes as a namedtuple or dict of
    the same names), with tensors in the dtype that the artifact computes in. A bundle that does not know its model's nest (built from an ONNX or TorchScript file, from a model that
    returns caches, or by an older gpuopt) gives the outputs as its backend does: by name in a dict, or in order.
    """
    session = Session()
    candidate = Candidate(model=ModelRef(text=str(bundle), trust=tuple(trust)), device=device)
    try:
        found = session.load(candidate)
        if found.form != "bundle":
            raise UsageError(f"{bundle} is no bundle", fix="gpuopt.compile(model, inputs, output=FOLDER) writes one")
        session.build()
        return Loaded(session)
    except BaseException:
        session.close()
        raise


class Loaded:
    """A bundle's runner with the session that keeps it alive."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._runner = session.runner()
        self._around = session.around()
        names, self._positional = session.call_form()
        self._names = names
        self._keywords = frozenset(names[self._positional :])

    def __repr__(self) -> str:
        return f"gpuopt.load(...) -> a callable of {', '.join(self._names)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run once, without gradients. Inputs may be given by position or by name, however the artifact itself takes them; outputs nest as the model's own."""
        if len(args) != self._positional or kwargs.keys() != self._keywords:
            bound = list(binding.bind(self._names, args, kwargs).items())
            args, kwargs = tuple(value for _, value in bound[: self._positional]), dict(bound[self._positional :])
        outputs = self._runner(*args, **kwargs)
        return outputs if self._around is None else self._around(outputs)

    def close(self) -> None:
        """Give back device memory."""
        self._session.close()


def _required(run: Run) -> Run:
    """The run where it is still ok; its verdict as an error where it is not. Raises Unsupported, GateFailed."""
    if run.status is Status.OK:
        return run
    raise (Unsupported if run.status is Status.UNSUPPORTED else GateFailed)(run.reason, fix=run.fix)


@contextmanager
def _session(model: torch.nn.Module, inputs: Any, candidate: Candidate) -> Iterator[tuple[Session, Run]]:
    session = Session()
    try:
        yield session, figures.loaded(figures.started(candidate), session.adopt(candidate, *livemodel.handles(model, inputs)))
    finally:
        session.close()


@contextmanager
def _closing(live: list[tuple[int, Session]]) -> Iterator[None]:
    try:
        yield
    finally:
        for _, session in reversed(live):  # each puts back the precision switches it found
            session.close()


def _candidate(backend: str, precision: str | None, device: str) -> Candidate:
    return Candidate(
        model=ModelRef(text=""), backend=BackendSpec.parse(backend), precision=Precision(precision) if precision else None, device=device
    )


def _survey(device: str) -> facts.Survey:
    session = Session()
    try:
        return session.survey(device, refresh=False, ceilings=True)
    finally:
        session.close()


def _report(verb: str, found: facts.Survey, runs: Sequence[Run]) -> Report:
    return Report(
        schema_version=SCHEMA_VERSION,
        command=f"gpuopt.{verb}(...)",
        verb=verb,
        environment=found.environment,
        device=found.device,
        runs=tuple(runs),
    )


__all__ = ["Optimized", "OptimizedPipeline", "bench", "compile", "convert", "load", "optimize", "profile"]
