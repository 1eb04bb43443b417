"""Runs that generated -> tokens a second beside their bound, whether the tokens are eager's, and how far many requests together could go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpuopt.core.generation import Generated
from gpuopt.core.result import Report, Run, Status
from gpuopt.reports import figures as f
from gpuopt.reports.content.blocks import Block, Cell, Column, Message, Messages, Table
from gpuopt.reports.figures import clean

SERVERS = "vLLM, SGLang, TensorRT-LLM"


def build(report: Report, name: Callable[[Run], str]) -> list[Block]:
    """The table, and a word on servers where one request leaves most of the machine idle."""
    told = [(run, run.generated) for run in report.runs if run.generated is not None]
    if not told:
        return []
    blocks: list[Block] = [_table(told, name)]
    together = _together(told)
    if together is not None:
        blocks.append(Messages(title="Many requests at once", items=(together,)))
    return blocks


def headline(report: Report, name: Callable[[Run], str]) -> list[Message]:
    """The fastest of those whose tokens stand."""
    ok = [(run, g) for run in report.runs if (g := run.generated) is not None and run.status is Status.OK and g.tokens_per_s]
    if not ok:
        return []
    run, best = max(ok, key=lambda pair: pair[1].tokens_per_s_overall or pair[1].tokens_per_s or 0.0)
    text = f"{name(run)} decodes {f.rate(best.tokens_per_s)} tokens/s"
    if best.pct_of_bound is not None:
        text += f", {f.percent(best.pct_of_bound)} of the {f.rate(best.bound_tokens_per_s)} that reading the weights once a token allows"
    alike = [g for other, g in ok if g.batch == best.batch and other.precision == run.precision and g.tokens_per_s_overall]
    shipped = next((g for g in alike if g.cache_tokens is None), None)
    if shipped is not None and shipped is not best and shipped.tokens_per_s_overall and best.tokens_per_s_overall:
        text += f"; a whole generation runs at {f.ratio(best.tokens_per_s_overall / shipped.tokens_per_s_overall)} the speed of generate() as shipped"
    return [Message("good", text)]


def _table(told: Sequence[tuple[Run, Generated]], name: Callable[[Run], str]) -> Table:
    columns = (
        Column("run"),
        Column("how", spare=6, folds=True),
        Column("prefill", right=True, spare=4),
        Column("a token", right=True, spare=2),
        Column("tokens/s", right=True),
        Column("of bound", right=True),
        Column("overall tokens/s", right=True, spare=3),
        Column("tokens"),
        Column("made again", right=True, spare=5),
    )
    rows = tuple(
        (
            Cell(name(run)),
            Cell(clean(g.way, 60), "dim"),
            Cell(f.ms(g.prefill_ms)),
            Cell(f.ms(g.ms_per_token)),
            Cell(f.rate(g.tokens_per_s), "strong"),
            Cell(f.percent(g.pct_of_bound), "strong", None if g.pct_of_bound is None else min(1.0, g.pct_of_bound / 100)),
            Cell(f.rate(g.tokens_per_s_overall)),
            _tokens(run, g),
            Cell(f.MISSING if g.recompiles is None else str(g.recompiles), "bad" if g.recompiles else ""),
        )
        for run, g in told
    )
    return Table(
        title="Generation", columns=columns, rows=rows, notes=tuple(dict.fromkeys(_notes(told, name))), beside=_asked(told)
    ).folded()


def _asked(told: Sequence[tuple[Run, Generated]]) -> str:
    """What holds for all of them."""
    g = told[0][1]
    if any((o.prompt_tokens, o.new_tokens, o.batch) != (g.prompt_tokens, g.new_tokens, g.batch) for _, o in told):
        return ""
    prompt = f"prompts of {g.prompt_tokens} tokens, " if g.prompt_tokens is not None else ""
    return f"{prompt}{f.plural(g.new_tokens, 'new token')}, batch {g.batch}, greedy"


def _tokens(run: Run, g: Generated) -> Cell:
    if g.equal is None:
        return Cell("not compared", "warn")
    if g.equal:
        return Cell("as eager's", "good")
    passed = run.accuracy is not None and run.accuracy.passed
    at = f" at {g.first_mismatch}" if g.first_mismatch is not None else ""
    return Cell(f"tie{at}", "good") if passed else Cell(f"other{at}", "bad")


def _notes(told: Sequence[tuple[Run, Generated]], name: Callable[[Run], str]) -> list[str]:
    notes = [
        "tokens/s: decoding alone, from the median step; overall: whole calls with their prompt. Every run makes all its tokens, whatever the end token says"
    ]
    bounded = next((g for _, g in told if g.bound_tokens_per_s is not None), None)
    if bounded is not None:
        notes.append(
            f"bound: {f.si(bounded.weight_bytes, 'B')} of weights and {f.si(bounded.kv_bytes, 'B')} of keys and values a step at {clean(bounded.ceiling, 120)}:"
            f" {f.rate(bounded.bound_tokens_per_s)} tokens/s"
        )
    for run, g in told:
        if g.reason:
            notes.append(f"{name(run)}: {clean(g.reason, 400)}")
        if g.recompiles is not None and g.lengths:
            tried = ", ".join(str(n) for n in g.lengths)
            notes.append(
                f"made again: graphs compiled or recorded anew for prompts of {tried} tokens, in the bucket of {g.bucket}; 0 is right"
            )
    return notes


def _together(told: Sequence[tuple[Run, Generated]]) -> Message | None:
    g = next((g for _, g in told if g.larger_batches), None)
    if g is None or g.bound_tokens_per_s is None:
        return None
    best = max((o.tokens_per_s or 0.0 for run, o in told if run.status is Status.OK and o.batch == g.batch), default=0.0)
    now = (
        f"{f.rate(best)} tokens/s measured and at most {f.rate(g.bound_tokens_per_s)}"
        if best
        else f"at most {f.rate(g.bound_tokens_per_s)} tokens/s"
    )
    steps = []
    for larger in g.larger_batches:
        why = "" if larger.limit == "memory" else ", where products take longer than reading"
        why += ", which does not fit this device's memory" if larger.fits is False else ""
        steps.append(f"{f.rate(larger.tokens_per_s)} at batch {larger.batch}{why}")
    return Message(
        "info",
        f"one step reads {f.si(g.weight_bytes, 'B')} of weights for {f.plural(g.batch, 'sequence')}, and could serve more with the same read:"
        f" against {now}, the same bytes allow {'; '.join(steps)} (bounds, not measurements)",
        f"where many requests arrive together, a dedicated server with continuous batching is the right answer ({SERVERS}): gpuopt schedules no requests. "
        "--batch measures how far a fixed batch goes",
    )
