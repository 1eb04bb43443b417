"""In the child: a loaded model and a way to generate -> its runner, verified against eager generate(), with what one step reads. Imports transformers."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch._dynamo.utils import counters

from gpuopt import converters, generation
from gpuopt.core.errors import Unsupported
from gpuopt.core.generation import PLACED, Generated, GenerateSpec, GenerationBuilt
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Candidate, Precision, Transforms
from gpuopt.generation import judging, reading
from gpuopt.generation.runner import GenerationRunner
from gpuopt.generation.shipped import Shipped
from gpuopt.generation.stepped import Stepped
from gpuopt.generation.subject import Prompt, Subject, subject
from gpuopt.pipeline import eagerly, verification
from gpuopt.pipeline.drawn import Drawn
from gpuopt.pipeline.facts import ProgressCall
from gpuopt.timing import clocks

OTHER_TOKENS = 16
"""Compared at another length of the prompt: enough to tell a wrong position or mask, and short, as eager takes its time."""


def built(
    candidate: Candidate,
    model: Model,
    drawn: Drawn,
    precision: Precision,
    spec: GenerateSpec,
    *,
    verify: bool,
    started: float,
    progress: ProgressCall,
) -> tuple[GenerationRunner, GenerationBuilt]:
    """Convert, compile and record, generate once, compare tokens, try other lengths. `started`: when the process did, for its cold start.

    Raises Unsupported for what cannot generate so, UsageError for prompts that do not fit, or whatever the compiler raised.
    """
    if model.form != "module":
        raise Unsupported(f"generation wants a PyTorch module, not {model.form}", fix="name the source model")
    way = generation.resolve(candidate.backend)
    device = candidate.device
    to = None if candidate.precision is None else precision
    was_there = all(str(parameter.device) == device for parameter in model.module.parameters())  # its session lets go of it
    given = drawn.sample(precision, device)
    names = tuple(spec.name for spec in given.specs)
    changed = converters.apply(model, to, candidate.transforms, drawn.sample(precision, "cpu"), device=device)
    changed.module.to(device)
    progress(None, PLACED)
    found = subject(changed.module)
    whole = found.prompt(_named(given, names))
    most = _fitting(candidate, found, whole, spec, given)
    prompt = found.shortened(whole, most)
    length = found.length(prompt)
    found.require_positions(length, spec.new_tokens)
    cut = () if most is None else (f"prompts of {most} tokens instead of {found.length(whole)}: the model has {found.positions} positions",)
    batch = next(iter(prompt.values())).shape[0]

    progress(None, f"building: {way.told(device)}")
    began = time.monotonic()
    shipped = Shipped(found, new_tokens=spec.new_tokens, stop_at_eos=spec.stop_at_eos)
    stepped = None
    if not way.shipped:
        stepped = Stepped(
            found,
            way,
            batch=batch,
            prompt_tokens=length,
            new_tokens=spec.new_tokens,
            stop_at_eos=spec.stop_at_eos,
            device=device,
        )
    runner = GenerationRunner(found, stepped or shipped, names, device, longest=most)
    tokens = runner(*given.args, **given.kwargs)
    clocks.for_device(device).synchronize()
    now = time.monotonic()
    told = Generated(
        kind=found.kind,
        way=way.told(device),
        batch=batch,
        prompt_tokens=length,
        new_tokens=tokens.shape[1],
        bucket=stepped.bucket(prompt) if stepped else None,
        cache_tokens=stepped.cache_tokens if stepped else None,
    )
    answer = GenerationBuilt(
        generated=told,
        passed=None,
        compile_s=now - began,
        cold_start_s=now - started,
        held_bytes=reading.held(changed.module),
        notes=(*changed.notes, *found.notes, *cut, *(stepped.launcher.notes if stepped else ())),
        call_s=now - began if stepped is None else None,
    )
    if stepped is not None:
        twin = _twin(candidate, model, to, drawn, precision, found)
        if verify:
            answer = _verified(answer, found, stepped, twin, prompt, tokens, spec, progress)
        answer = _at_other_lengths(answer, found, stepped, twin, prompt, spec, verify=verify, device=device, progress=progress)
        if twin is not found:
            if twin.module is model.module and not was_there:
                twin.module.to("cpu")  # the session's own model: left on the device it would count as memory of the candidate
            del twin
            verification.release(device)
        answer = replace(answer, generated=replace(answer.generated, graphs=stepped.launcher.graphs))
    elif verify:  # the reference itself
        answer = replace(answer, passed=True, generated=replace(answer.generated, equal=True))
    return runner, _read(answer, found, stepped, prompt, spec, device)


def _fitting(candidate: Candidate, found: Subject, prompt: Prompt, spec: GenerateSpec, given: Inputs) -> int | None:
    """Tokens to cut a prompt to whose length nobody asked for, where it and the answer are longer than the model's positions; None leaves it."""
    length, fitting = found.length(prompt), found.fitting(spec.new_tokens)
    if length is None or fitting is None or not 1 <= fitting < length or candidate.inputs.file is not None:
        return None
    shape = next((s.shape for s in given.specs if s.name == found.main_input), ())
    asked = {dim.name for dim in candidate.inputs.dims}
    return fitting if len(shape) > 1 and isinstance(shape[1], str) and shape[1] not in asked else None


def _named(given: Inputs, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return dict(zip(names, (*given.args, *given.kwargs.values()), strict=True))


def _twin(candidate: Candidate, model: Model, to: Precision | None, drawn: Drawn, precision: Precision, found: Subject) -> Subject:
    """The model without its transforms, at the same dtype: what tokens are held against."""
    if candidate.transforms == Transforms():
        return found
    plain = converters.apply(model, to, Transforms(), drawn.sample(precision, "cpu"), device=candidate.device)
    if plain.module is found.module:
        return found
    plain.module.to(candidate.device)
    return subject(plain.module)


def _verified(
    answer: GenerationBuilt,
    found: Subject,
    stepped: Stepped,
    twin: Subject,
    prompt: Prompt,
    tokens: torch.Tensor,
    spec: GenerateSpec,
    progress: ProgressCall,
) -> GenerationBuilt:
    progress(None, "generating eagerly, to compare tokens")
    reference, logits = _eager(twin, prompt, spec.new_tokens, spec)
    verdict = _judged(found, stepped, twin, prompt, tokens, reference, logits)
    told = replace(
        answer.generated,
        equal=verdict.equal,
        first_mismatch=verdict.first_mismatch,
        steps_checked=verdict.steps_checked,
        steps_agreeing=verdict.steps_agreeing,
        gap=verdict.gap,
        gap_allowed=verdict.gap_allowed,
        reason=verdict.reason,
    )
    return replace(answer, generated=told, passed=verdict.passed)


def _eager(twin: Subject, prompt: Prompt, new_tokens: int, spec: GenerateSpec) -> eagerly.Answer:
    """Once a command, not once a child: it is slow."""
    shipped = Shipped(twin, new_tokens=new_tokens, stop_at_eos=spec.stop_at_eos)
    return eagerly.shared(twin, prompt, new_tokens, stop_at_eos=spec.stop_at_eos, compute=lambda: shipped.explained(prompt))


def _judged(
    found: Subject, stepped: Stepped, twin: Subject, prompt: Prompt, tokens: torch.Tensor, reference: torch.Tensor, logits: torch.Tensor
) -> judging.Verdict:
    return judging.judge(
        tokens,
        reference,
        logits,
        forced=lambda: stepped.forced(prompt, reference),
        again=lambda: judging.at_once(twin, prompt, reference),
        dtype=found.module.dtype,
    )


def _at_other_lengths(
    answer: GenerationBuilt,
    found: Subject,
    stepped: Stepped,
    twin: Subject,
    prompt: Prompt,
    spec: GenerateSpec,
    *,
    verify: bool,
    device: str,
    progress: ProgressCall,
) -> GenerationBuilt:
    """Shorter prompts of the same bucket: nothing may be compiled or recorded again, and the tokens must be right there, too."""
    length = found.length(prompt)
    if length is None:
        return answer
    bucket = stepped.bucket(prompt) or 0
    lengths = [n for n in dict.fromkeys((length - 1, bucket // 2 + 1)) if 1 <= n < length]
    lengths = [n for n in lengths if stepped.bucket({name: t[:, -n:] for name, t in prompt.items()}) == bucket]
    progress(None, "trying other lengths")
    before = counters["stats"]["unique_graphs"] + stepped.launcher.graphs
    passed, notes = answer.passed, []
    for n in lengths:
        shorter = {name: tensor[:, -n:].contiguous() for name, tensor in prompt.items()}
        began = time.monotonic()
        tokens = stepped(shorter)
        clocks.for_device(device).synchronize()
        answer = replace(answer, call_s=time.monotonic() - began)
        if verify and n == lengths[-1]:
            few = min(spec.new_tokens, OTHER_TOKENS)
            reference, logits = _eager(twin, shorter, few, spec)
            verdict = _judged(found, stepped, twin, shorter, tokens[:, : reference.shape[1]], reference, logits)
            if not verdict.passed:
                passed = False
                notes.append(f"with a prompt of {n} tokens: {verdict.reason}")
    again = counters["stats"]["unique_graphs"] + stepped.launcher.graphs - before
    if again:
        notes.append(f"prompts of {', '.join(map(str, lengths))} tokens had {again} graphs made again, within one bucket")
    told = replace(answer.generated, lengths=tuple(lengths), recompiles=again)
    if passed is False and answer.passed:
        told = replace(told, equal=False, reason=notes[0])
    return replace(answer, generated=told, passed=passed, notes=(*answer.notes, *notes))


def _read(
    answer: GenerationBuilt, found: Subject, stepped: Stepped | None, prompt: Prompt, spec: GenerateSpec, device: str
) -> GenerationBuilt:
    """With the bytes of one step. generate() reads the same weights, so a loop of our own tells them for it, too."""
    length, batch = found.length(prompt), answer.generated.batch
    looked = stepped
    try:
        if looked is None:
            static = generation.WAYS["eager", "static"]
            looked = Stepped(found, static, batch=batch, prompt_tokens=length, new_tokens=spec.new_tokens, stop_at_eos=False, device=device)
        weights, flops = reading.read(found.module, looked.step_once(prompt))
    except Unsupported as error:
        return replace(answer, notes=(*answer.notes, f"no bound: {error.message}"))
    mine = looked.kv_bytes(length)
    told = replace(answer.generated, weight_bytes=weights, kv_bytes=batch * mine, step_flops=batch * flops)
    return replace(answer, generated=told, kv_bytes_a_sequence=mine, full_kv_bytes_a_sequence=looked.full_kv_bytes(length))
