"""`name[:setting]` -> the file that changes a model's own code before a backend sees it. Light: nothing is imported before it is asked for.

A rewrite is a file and a row. The file offers

    WHAT: str                      one line for help and reports
    APPROXIMATE: bool              declares an approximation: the structure stage of verification is wider then
    SETTINGS: tuple[str, ...]      words allowed after the colon, () where there are none
    NEEDS_SETTING: bool            optional: without a word after the colon it means nothing
    HALF_ONLY: tuple[str, ...]     optional: settings that exist in fp16 and bf16 alone on a GPU
    GPU_ONLY: tuple[str, ...] = () optional: settings that a CPU has no kernel for
    applies(module) -> str | None                  None where it would change something, else why not; static, on meta tensors too
    apply(module, setting, inputs) -> str          in place, on gpuopt's own copy; what was done. Raises Unsupported where there is nothing to change

and what it makes of a module can be copied, cast, exported and compiled as one graph.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import ModuleType

from gpuopt.core.errors import UsageError

REWRITES = {
    "no_mask": "gpuopt.converters.rewrites.no_mask",
    "attention": "gpuopt.converters.rewrites.attention",
    "fuse_linears": "gpuopt.converters.rewrites.fuse_linears",
    "fuse_conv": "gpuopt.converters.rewrites.fuse_conv",
    "gelu_epilogue": "gpuopt.converters.rewrites.gelu_epilogue",
}


def resolve(text: str) -> tuple[ModuleType, str | None]:
    """`attention:cudnn` -> (its module, "cudnn"). Raises UsageError for a name or a setting that there is none of, Unavailable where its library is missing."""
    name, colon, setting = text.partition(":")
    module = loaded(name)
    allowed: tuple[str, ...] = module.SETTINGS
    if not colon:
        if getattr(module, "NEEDS_SETTING", False):
            raise UsageError(f"rewrite {name} needs a word after a colon", fix=" or ".join(f"{name}:{word}" for word in allowed))
        return module, None
    if not allowed:
        raise UsageError(f"rewrite {name} takes no setting, and {setting!r} is one", fix=name)
    if setting not in allowed:
        close = difflib.get_close_matches(setting, allowed, n=1)
        hint = f"did you mean {name}:{close[0]}? " if close else ""
        raise UsageError(f"rewrite {name} has no setting {setting!r}", fix=f"{hint}one of: {', '.join(allowed)}")
    return module, setting


def checked(texts: Iterable[str]) -> tuple[str, ...]:
    """The same texts, each of which names a rewrite that is there, and none twice. Raises UsageError."""
    seen: dict[str, str] = {}
    for text in texts:
        resolve(text)
        name = text.partition(":")[0]
        if name in seen:
            raise UsageError(f"rewrite {name} is given twice: {seen[name]} and {text}", fix="give each rewrite once")
        seen[name] = text
    return tuple(seen.values())


def in_fp32(texts: Iterable[str], device: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those with an fp32 form on this device, which the structure stage of verification runs, and those without: a file names their settings in `HALF_ONLY`."""
    kept: list[str] = []
    left: list[str] = []
    for text in texts:
        module, setting = resolve(text)
        is_half_only = device.startswith("cuda") and setting is not None and setting in getattr(module, "HALF_ONLY", ())
        (left if is_half_only else kept).append(text)
    return tuple(kept), tuple(left)


def in_turn(texts: Iterable[str]) -> tuple[str, ...]:
    """The same, those that name a kernel of GPUs or of half precision last: the others call the module in fp32, maybe on a CPU, to see what they change."""

    def is_named_kernel(text: str) -> bool:
        module, setting = resolve(text)
        return setting in (*getattr(module, "HALF_ONLY", ()), *getattr(module, "GPU_ONLY", ()))

    return tuple(sorted(texts, key=is_named_kernel))


def lacks_kernel(text: str, device: str) -> str:
    """Why `name[:setting]` cannot run on this kind of device; "" where it can: a file names such settings in `GPU_ONLY`."""
    name, _, setting = text.partition(":")
    is_gpu_only = device == "cpu" and setting in getattr(loaded(name), "GPU_ONLY", ())
    return f"the {setting} kernel of {name} exists on GPUs alone" if is_gpu_only else ""


def is_approximate(texts: Iterable[str]) -> bool:
    """Whether any of these declares an approximation. Texts that name no rewrite (other transforms of a bundle) are none."""
    names = {text.partition(":")[0] for text in texts}
    return any(loaded(name).APPROXIMATE for name in sorted(names & REWRITES.keys()))


def loaded(name: str) -> ModuleType:
    """The file of a rewrite, whatever settings it has. Raises UsageError for a name that there is none of."""
    from gpuopt.core import registry  # --help reads the table, and does without importlib.metadata

    found: ModuleType = registry.resolve(REWRITES, name, kind="rewrite")
    return found
