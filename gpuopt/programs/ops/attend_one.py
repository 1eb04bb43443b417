"""`gpuopt::attend_one`: attention of one query a sequence over the keys of a cache, in one launch; on a GPU a Triton kernel.

Decoding attends to few keys many times: what counts is how many kernels wait for each other, not how fast one is. Everything between the loads is in fp32, and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
MOST_KEYS = 1024
"""Of one sequence. One program a head reads them one block after the other; longer caches want many programs a head."""
WIDEST = 256

torch.library.define(
    "gpuopt::attend_one",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """query [batch, heads, 1, width], keys and values [batch, heads that hold them, length, width] -> [batch, 1, heads, width of the values].

    mask: bool (True is seen) or added to the scores, [1 or batch, 1 or heads, 1, length]; None sees all.
    """
    found: Tensor = torch.ops.gpuopt.attend_one(query, key, value, mask, scale)
    return found


def takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Is this what the kernel is made for: one query of halves a sequence on a GPU, elements of a head next to each other, and not too many keys?"""
    batch, heads, length = query.shape[0], query.shape[1], key.shape[2]
    return (
        query.device.type == "cuda"
        and query.dtype in HALVES
        and all(t.dtype == query.dtype and t.device == query.device for t in (key, value))
        and query.shape[2] == 1
        and key.shape[0] == value.shape[0] == batch
        and key.shape[1] == value.shape[1]
        and heads % key.shape[1] == 0
        and 1 <= length == value.shape[2] <= MOST_KEYS
        and query.shape[3] == key.shape[3] <= WIDEST
        and value.shape[3] <= WIDEST
        and all(t.stride(3) == 1 for t in (query, key, value))
        and (mask is None or _is_mask(mask, batch, heads, length, query))
    )


def _is_mask(mask: Tensor, batch: int, heads: int, length: int, query: Tensor) -> bool:
    kinds = (torch.bool, torch.float32, *HALVES)
    shape = mask.shape
    fits = mask.dim() == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2] == 1 and shape[3] == length
    return fits and mask.dtype in kinds and mask.device == query.device


def composite(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The definition, in ATen's own ops: what a CPU runs, and a GPU for what the kernel does not take."""
    batch, heads, _, width = query.shape
    held, length = key.shape[1:3]
    rows = query.reshape(batch, held, heads // held, width).float() * scale
    scores = rows @ key.float().mT
    if mask is not None:
        seen = mask.expand(batch, heads, 1, length).reshape(batch, held, heads // held, length)
        scores = scores.masked_fill(~seen, float("-inf")) if mask.dtype == torch.bool else scores + seen.float()
    found = scores.softmax(-1) @ value.float()
    return found.to(query.dtype).reshape(batch, 1, heads, value.shape[3])


def _on_cuda(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if not takes(query, key, value, mask):
        return composite(query, key, value, mask, scale)
    from gpuopt.programs.ops import attend_one_triton  # Triton comes with torch for GPUs alone

    return attend_one_triton.run(query, key, value, mask, scale)


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty((query.shape[0], 1, query.shape[1], value.shape[3]))


torch.library.impl("gpuopt::attend_one", "CPU", composite)
torch.library.impl("gpuopt::attend_one", "CUDA", _on_cuda)
torch.library.register_fake("gpuopt::attend_one", _fake)
