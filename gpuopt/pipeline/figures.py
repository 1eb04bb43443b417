"""Candidate + what its session answered + ceilings -> Run. Every figure of a report is made here, from values alone."""

from __future__ import annotations

import shlex
from dataclasses import replace

from gpuopt.core import stats
from gpuopt.core.result import Count, Device, PrecisionAudit, Relative, Run, Samples, Status
from gpuopt.core.spec import Candidate, EvalSpec, Precision
from gpuopt.pipeline import facts, pairs
from gpuopt.profiling import roofline


def started(candidate: Candidate) -> Run:
    """A run nobody has begun: what was asked for."""
    return Run(
        model=candidate.model.text,
        backend=candidate.backend.name,
        preset=candidate.backend.preset,
        options=dict(candidate.backend.options),
        precision=candidate.precision.value if candidate.precision else None,
        dims=dict(candidate.dims),
        batch=candidate.dims.get("N"),
        dim_ranges={dim.name: (dim.low, dim.high) for dim in candidate.inputs.dims if dim.low is not None and dim.high is not None},
        input_mode=candidate.input_mode,
        device=candidate.device if candidate.device != "auto" else None,
        reproduce=reproducer(candidate),
    )


def loaded(run: Run, found: facts.Loaded) -> Run:
    """With what loading found out."""
    return replace(
        run,
        model=found.name,
        backend=found.bundle_backend or run.backend,
        preset=found.bundle_preset if found.bundle_backend else run.preset,
        precision=found.precision,
        device=found.device or run.device,
        transforms=found.transforms,
        batch=found.dims.get("N", 1),
        dims=found.dims,
        inputs=found.inputs,
        signature=found.signature,
        input_source=found.input_source,
        load_s=found.load_s,
        notes=(*run.notes, *found.notes),
    )


def built(run: Run, found: facts.Built, candidate: Candidate) -> Run:
    """With what the build found out. A precision that was asked for and not honoured ends the run; one that came with the file is a note."""
    run = replace(
        run,
        compile_s=found.compile_s,
        cold_start_s=found.cold_start_s,
        build_peak_host_bytes=found.host_peak_bytes,
        precision_audit=found.audit,
        transforms=found.transforms,
        notes=(*run.notes, *found.notes),
    )
    run = counted(run, found.count)
    if found.audit is not None and not found.audit.honoured:
        if candidate.precision is None or candidate.transforms.keep_fp32:
            run = replace(run, notes=(*run.notes, f"runs in another precision than the model's: {_instead(found.audit)}"))
            # Modules kept in fp32 were asked for beside a precision; whoever asked for none is told the one it is.
            return run if candidate.transforms.keep_fp32 else replace(run, precision=_runs_in(found.audit) or run.precision)
        return not_honoured(run, found.audit)
    return run


def not_honoured(run: Run, audit: PrecisionAudit) -> Run:
    """Ended: it was asked for a precision and computes in another."""
    return replace(
        run,
        status=Status.UNSUPPORTED,
        reason=f"precision not honoured: {_instead(audit)}",
        fix="another backend or precision; the audit names the layers",
    )


def _instead(audit: PrecisionAudit) -> str:
    shares = ", ".join(f"{share:.1%} of the FLOPs in {dtype}" for dtype, share in sorted(audit.shares.items(), key=lambda i: -i[1]))
    return audit.reason or f"asked for {audit.requested}, built {shares or 'something that cannot be read back'}"


def _runs_in(audit: PrecisionAudit) -> str | None:
    """The precision of most of its FLOPs; None where nothing could be read back, or no precision is called so."""
    main = max(audit.shares, key=lambda dtype: audit.shares[dtype], default=None)
    return next((p.value for p in Precision if main is not None and main in (p.dtype, p.value)), None)


def counted(run: Run, count: Count | None) -> Run:
    """With its FLOPs and bytes."""
    if count is None:
        return replace(run, notes=(*run.notes, "FLOPs cannot be counted in this form, so there is no TFLOP/s"))
    return replace(
        run,
        flops=count.flops,
        flops_by_dtype=dict(count.flops_by_dtype),
        flop_coverage=count.coverage,
        flop_source=count.method,
        bytes=count.bytes,
        unknown_ops=count.unknown_ops,
    )


def verified(run: Run, found: facts.Verified) -> Run:
    """With the verdict of the accuracy gate."""
    accuracy = found.accuracy
    run = replace(run, accuracy=accuracy)
    if accuracy.passed:
        return run
    return replace(
        run,
        status=accuracy.status,
        reason=accuracy.reason or f"output {accuracy.worst_output} is outside the accuracy gate",
        fix="another precision or backend; --allow-inaccurate keeps it all the same",
    )


def measured(run: Run, found: facts.Measured, device: Device, count: Count | None) -> Run:
    """With its times, and every rate against its ceiling. Raises ImpossibleFigure above the data sheet: that is an error of ours."""
    samples: Samples = found.samples
    if not samples.samples_ns:
        raise AssertionError("a measurement without samples is not a result")
    summary = stats.summarize(samples.samples_ns)
    seconds = summary.median / 1e3
    run = replace(
        run,
        latency_ms=summary,
        samples_per_s=(run.batch or 1) / seconds,
        peak_bytes=found.peak_bytes,
        energy_j_per_sample=found.energy_j_per_sample,
        mean_power_w=found.mean_power_w,
        samples_ns=samples.samples_ns,
        warmup_ns=samples.warmup_ns,
        block_sizes=samples.block_sizes,
        wall_ms=samples.wall_ns / len(samples.samples_ns) / 1e6 if samples.wall_ns else None,
        clock=samples.clock,
        throttled_ms=found.throttled_ms,
    )
    if not samples.steady:
        run = replace(run, notes=(*run.notes, "warm-up ended before two windows agreed: the machine is noisy, or the model's times drift"))
    if count is not None:
        run = replace(run, notes=(*run.notes, *count.notes))  # how it was counted is about rates: without times there are none
    if count is not None and count.flops:
        count = as_run(count, run)
        rate = roofline.whole(count, seconds, device.ceilings, slack=slack(device))
        run = replace(
            run,
            tflops=rate.tflops,
            pct_of_measured=rate.pct_of_measured,
            pct_of_sustained=rate.pct_of_sustained,
            pct_of_spec=rate.pct_of_spec,
            pct_of_roofline=rate.pct_of_roofline,
            notes=(*run.notes, *((rate.ceiling_note,) if rate.ceiling_note else ())),
        )
    return run


def as_run(count: Count, run: Run) -> Count:
    """Its FLOPs by the dtypes the artifact really runs in, where the audit found others than were asked for: an fp16 file in fp32 stands against fp32."""
    audit = run.precision_audit
    if audit is None or audit.honoured or not audit.shares:
        return count
    return replace(count, flops_by_dtype={dtype: share * count.flops for dtype, share in audit.shares.items()})


def slack(device: Device) -> float:
    """How far a figure may pass a measured ceiling before it is refused: GPUs repeat within 5%; a CPU that others use may have been busy while its ceiling was taken."""
    return 0.05 if device.kind == "cuda" else 0.3


def profiled(run: Run, found: facts.Profiled) -> Run:
    """With its waterfall, roofline and module tree."""
    return replace(
        run,
        waterfall=found.waterfall,
        roofline=found.roofline,
        modules=found.modules,
        bounds=found.bounds,
        useful=found.useful,
        flop_coverage=found.coverage if found.coverage is not None else run.flop_coverage,
        notes=(*run.notes, *found.notes),
    )


def failed(run: Run, status: Status, reason: str, fix: str = "") -> Run:
    """A run that ended before its figures; what it had stays, its times do not."""
    return replace(
        run,
        status=status,
        reason=reason,
        fix=fix,
        latency_ms=None,
        samples_per_s=None,
        tflops=None,
        pct_of_measured=None,
        pct_of_sustained=None,
        pct_of_spec=None,
        pct_of_roofline=None,
        samples_ns=(),
    )


def relative(run: Run, base: Samples, mine: Samples) -> Run:
    """With its speed against the first run of its group, from interleaved pairs of blocks."""
    verdict: Relative = stats.compare_pairs(pairs.split(base), pairs.split(mine))
    return replace(run, relative=verdict)


def _evaluation(spec: EvalSpec) -> list[str]:
    words = []
    for option, value in (("--eval-data", spec.data), ("--metric", spec.metric), ("--calib", spec.calib)):
        words += [option, value] if value else []
    if spec.metric and spec.min_ratio != EvalSpec().min_ratio:
        words += ["--min-metric-ratio", f"{spec.min_ratio:g}"]
    return [*words, "--metric-lower-is-better"] if spec.lower_is_better else words


def reproducer(candidate: Candidate) -> str:
    """A command line that runs this candidate alone; empty for a live module, which no command line can name."""
    if not candidate.model.text:
        return ""
    words = ["gpuopt", "bench", candidate.model.text, "--backend", str(candidate.backend)]
    if candidate.model.arch:
        words += ["--arch", candidate.model.arch]
    for key, value in candidate.backend.options.items():
        words += ["--option", f"{key}={value}"]
    if candidate.precision:
        words += ["--precision", candidate.precision.value]
    if candidate.transforms.channels_last:
        words.append("--channels-last")
    if candidate.transforms.fold_batch_norm:
        words.append("--fold-bn")
    for text in candidate.transforms.rewrites:
        words += ["--rewrite", text]
    for name in candidate.transforms.keep_fp32:
        words += ["--keep-fp32", name]
    for tensor in candidate.inputs.tensors:
        words += ["--input", str(tensor)]
    if candidate.inputs.file:
        words += ["--inputs", candidate.inputs.file]
    for name, value in candidate.dims.items():
        words += ["--dim", f"{name}={value}"]
    if candidate.input_mode != "device":
        words += ["--input-mode", candidate.input_mode]
    words += _evaluation(candidate.evaluation)
    words += ["--device", candidate.device]
    return shlex.join(words)
