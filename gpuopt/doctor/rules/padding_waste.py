"""GPU313: a good part of the batch is padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpuopt.core.result import Finding
from gpuopt.doctor import modules, recast, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

WORTH = 0.10
"""Share of padding from which it is worth a word: bucketing seldom leaves less than a few percent."""
_MASKS = (
    "attention_mask",
    "padding_mask",
    "input_mask",
    "encoder_attention_mask",
    "src_mask_1d",
    "src_key_padding_mask",
    "key_padding_mask",
)
_LENGTHS = ("lengths", "length", "input_lengths", "seq_lens", "seq_lengths", "src_lengths")


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for the mask with the most padding. Masks that are no plain padding (holes, causal, 4-D) are not judged."""
    tensors = list(modules.inputs(evidence))
    found = [(name, *shares) for name, t in tensors if (shares := _shares(name, t, tensors)) is not None]
    if not found:
        return
    name, total, trailing, longest, width = max(found, key=lambda f: f[1])
    if total <= WORTH:
        return
    rows = [r for r in evidence.records if r.time_ns and not recast.is_attention(r)]
    linear = recast.total_ms(rows)
    cut = f"; the longest row has {longest} of {width}, cutting there alone takes {words.share(trailing)} away" if longest < width else ""
    finding = Finding(
        code="",
        severity="warning",
        message=f"{words.share(total)} of the tokens are padding, by {name} ({width} wide){cut}"
        + (f"; {words.ms(linear)} of the call scale with the tokens" if rows else ""),
        fix="sort requests by length and pad each batch to its own longest (bucketing), or pack them: nested tensors, variable-length attention",
        count=width,
        time_ms=linear if rows else None,
    )
    # Attention falls with the square of the length, which about makes up for the padding that uneven rows of a batch keep.
    yield priced(finding, recast.shown_ms(evidence, total * linear), low=0.75, high=1.2, wall_ms=evidence.wall_ms)


def _shares(name: str, tensor: Any, tensors: list[tuple[str, Any]]) -> tuple[float, float, int, int] | None:
    """(share of padding, share beyond the longest row, longest row, width) or None where it is no padding."""
    import torch

    short = name.rpartition(".")[2]
    if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
        return None
    if short in _MASKS and tensor.dim() == 2 and tensor.numel():
        real = tensor == 0 if "key_padding" in short and tensor.dtype == torch.bool else tensor > 0
        lengths = real.sum(dim=1)
        # Ones first or ones last, in every row; anything else is a mask for another purpose, or random data.
        index = torch.arange(tensor.shape[1], device=tensor.device)
        left, right = index < lengths[:, None], index >= tensor.shape[1] - lengths[:, None]
        if not bool((real == left).all() | (real == right).all()):
            return None
        width = int(tensor.shape[1])
    elif short in _LENGTHS and tensor.dim() == 1 and tensor.numel() and not tensor.is_floating_point():
        widths = {int(t.shape[1]) for _, t in tensors if t.dim() >= 2 and t.shape[0] == tensor.shape[0]}
        if len(widths) != 1 or int(tensor.max()) > max(widths) or int(tensor.min()) < 0:
            return None
        lengths, width = tensor, widths.pop()
    else:
        return None
    longest = int(lengths.max())
    if width == 0 or longest == 0:
        return None
    return 1.0 - float(lengths.sum()) / (len(lengths) * width), 1.0 - longest / width, longest, width


RULE = Rule(
    code="GPU313",
    name="padding-waste",
    what="More than a tenth of the batch is padding.",
    why="Padded tokens go through every layer like real ones and are thrown away at the end: their share of the time is lost, and throughput counted in samples hides it.",
    before="batch = tokenizer(texts, padding='max_length', max_length=512)",
    after="texts.sort(key=len)\nbatch = tokenizer(texts_of_similar_length, padding='longest', pad_to_multiple_of=8)",
    safe=False,
    needs=frozenset({"inputs"}),
    find=find,
    source="share of padding from the mask itself, times the time of all ops but attention",
)
