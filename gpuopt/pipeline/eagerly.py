"""A prompt -> what eager generate() answers, with its logits: computed by the first child of a command that needs it, read by the others.

On a GPU it is the slowest part of looking at a fast way to generate, and every child would repeat it, beside somebody else's autotuning. What is kept lies in the command's own
folder (`commons`). Without one, or where something is missing or damaged, it is computed as if there were none.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpuopt.generation.subject import Prompt, Subject
from gpuopt.pipeline import commons, content

Answer = tuple[torch.Tensor, torch.Tensor]
"""Tokens int64 [batch, n], logits float32 [batch, n, vocabulary]."""

WAIT_S = 180.0
"""For a child that computes the same now; after it, both do."""
LOOKED_AT = 256
"""Values of each weight that tell two models apart: all of 16 GB would take longer to read than the answer takes to compute."""

_log = logging.getLogger(__name__)


def shared(subject: Subject, prompt: Prompt, new_tokens: int, *, stop_at_eos: bool, compute: Callable[[], Answer]) -> Answer:
    """What `compute` gives for this model, prompt and number of tokens."""
    folder = commons.folder()
    if folder is None:
        return compute()
    device = next(iter(prompt.values())).device
    try:
        key = "tokens-" + content.digest(
            type(subject.module).__qualname__,
            _sampled(subject),
            {name: tensor.cpu() for name, tensor in prompt.items()},
            str(device),
            new_tokens,
            stop_at_eos,
            _switches(),
            limit_bytes=1 << 30,
        )
        handle = commons.locked(folder / f"{key}.lock", wait_s=WAIT_S)
    except (OSError, content.Unreadable) as why:
        _log.debug("not shared: %s", why)
        return compute()
    path = folder / f"{key}.safetensors"
    try:
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            found = load_file(path, device=str(device))
            return found["tokens"], found["logits"]
        made = compute()
        with contextlib.suppress(OSError, SafetensorError):  # a full disk: the others compute it themselves
            unfinished = path.with_suffix(".part")
            save_file({"tokens": made[0].contiguous(), "logits": made[1].contiguous()}, unfinished)
            os.replace(unfinished, path)
        return made
    finally:
        os.close(handle)


def _sampled(subject: Subject) -> list[tuple[str, str, tuple[int, ...], torch.Tensor]]:
    """Name, dtype, shape and evenly spread values of every weight: other weights, other values."""
    found = []
    for name, tensor in (*subject.module.named_parameters(), *subject.module.named_buffers()):
        flat = tensor.detach().reshape(-1)
        found.append((name, str(tensor.dtype), tuple(tensor.shape), flat[:: max(1, flat.numel() // LOOKED_AT)].cpu()))
    return found


def _switches() -> tuple[bool, bool, str]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
