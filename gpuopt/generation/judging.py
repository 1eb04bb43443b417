"""Tokens x eager's tokens and logits -> are they the same, and if not, is it a tie that rounding decides.

Two right ways to compute the same logits differ by rounding, and where two tokens lie closer together than that, either may win; from there on everything differs.
So tokens alone prove a difference, never an error. What is allowed is measured on the model itself: eager computes its logits twice, step by step with a cache and all
at once without one, and the spread of the two is its own rounding. A candidate that lost the way is given eager's tokens, and must choose as eager does at each step,
but where eager's own token leads by less than `SPREADS` of those spreads (a difference of two logits, each wrong by its spread, 4 sigma), or by `STEPS` steps of the dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpuopt.generation.subject import Prompt, Subject

SPREADS = 6.0
STEPS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Passed or not, with what it rests on; the fields of `core.generation.Generated` of the same names."""

    passed: bool
    equal: bool
    first_mismatch: int | None = None
    steps_checked: int | None = None
    steps_agreeing: int | None = None
    gap: float | None = None
    gap_allowed: float | None = None
    reason: str = ""


def judge(
    tokens: torch.Tensor,
    reference: torch.Tensor,
    logits: torch.Tensor,
    *,
    forced: Callable[[], torch.Tensor],
    again: Callable[[], torch.Tensor],
    dtype: torch.dtype,
) -> Verdict:
    """`tokens`, `reference` [batch, n]; `logits` eager's own [batch, n, vocabulary], float32.

    `forced()` gives the candidate's choices after eager's tokens, `again()` eager's logits computed the other way; neither is called where the tokens are equal.
    """
    is_same = tokens.shape == reference.shape and torch.equal(tokens, reference)
    first = None if is_same else _first(tokens, reference)
    if not bool(torch.isfinite(logits).all()):  # the largest of NaNs is a token like any other
        reason = "eager's own logits are not finite: no token of it means anything"
        return Verdict(passed=False, equal=is_same, first_mismatch=first, reason=reason)
    if is_same:
        return Verdict(passed=True, equal=True)
    spread = float((again() - logits).square().mean().sqrt())
    chosen = forced()[:, : reference.shape[1]]
    leads = logits.gather(2, reference[..., None]) - logits.gather(2, chosen[..., None])
    lead = leads[..., 0]
    differs = chosen != reference
    allowed = torch.maximum(
        torch.full_like(lead, SPREADS * spread), STEPS * torch.finfo(dtype).eps * logits.gather(2, reference[..., None])[..., 0].abs()
    )
    wrong = differs & (lead > allowed)
    checked, agreeing = differs.numel(), int((~differs).sum())
    gap = float(lead[differs].max()) if agreeing < checked else 0.0
    limit = float(allowed[differs].max()) if agreeing < checked else float(allowed.max())
    passed = not bool(wrong.any()) and agreeing > 0
    if passed:
        at = f"step {first}" if first is not None else "the end"
        reason = (
            f"other tokens from {at} on: a tie within rounding. Given eager's tokens, it chooses the same at {agreeing} of {checked} steps; "
            f"elsewhere eager's token leads by {gap:.2g} at most, and eager's own rounding is worth {limit:.2g}"
        )
    else:
        bad = int(wrong.sum()) or checked - agreeing
        reason = (
            f"other tokens at step {first}, and not by rounding: given eager's tokens, {bad} of {checked} choices differ although eager's token leads by up to {gap:.2g}, "
            f"where its own rounding is worth {limit:.2g}"
        )
    return Verdict(
        passed=passed,
        equal=False,
        first_mismatch=first,
        steps_checked=checked,
        steps_agreeing=agreeing,
        gap=gap,
        gap_allowed=limit,
        reason=reason,
    )


def at_once(subject: Subject, prompt: Prompt, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of all steps in one forward without a cache: float32 [batch, n, vocabulary]."""
    module = subject.module
    with torch.no_grad():
        if subject.is_crossed:
            assert subject.start is not None
            start = torch.full_like(tokens[:, :1], subject.start)
            given = {name: tensor for name, tensor in prompt.items() if name != "decoder_input_ids"}
            found = module(**given, decoder_input_ids=torch.cat([start, tokens[:, :-1]], 1), use_cache=False).logits
            return found.float()  # type: ignore[no-any-return]
        ids = prompt[subject.main_input]
        whole = torch.cat([ids, tokens[:, :-1]], 1)
        more = {}
        mask = prompt.get("attention_mask")
        if mask is not None:
            more["attention_mask"] = torch.cat([mask, torch.ones_like(tokens[:, :-1])], 1)
            if "position_ids" in subject.accepts:
                more["position_ids"] = (more["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        found = module(input_ids=whole, use_cache=False, **more).logits
        return found[:, ids.shape[1] - 1 :].float()  # type: ignore[no-any-return]


def _first(tokens: torch.Tensor, reference: torch.Tensor) -> int | None:
    """First step at which any sequence differs; None where one is only longer."""
    num = min(tokens.shape[1], reference.shape[1])
    differs = (tokens[:, :num] != reference[:, :num]).any(0)
    return int(differs.long().argmax()) if bool(differs.any()) else None
