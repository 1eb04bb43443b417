"""A transformers folder -> its module with parameters on the meta device, and the safetensors files each is filled from. Never reaches a network, never runs code beside the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from gpuopt.core.errors import BadInput, Unsupported, Untrusted, UsageError
from gpuopt.programs import pretrained
from gpuopt.streaming import meta, shards
from gpuopt.streaming.meta import Weights
from gpuopt.streaming.owned import Owned
from gpuopt.trust.policy import printable


def of_folder(path: Path, *, cast: bool = False) -> Weights:
    """The class that config.json names, in the dtype it names (or the files' first), as `from_pretrained(path, dtype="auto")` gives it, without its weights.

    A checkpoint whose tensors are laid out otherwise than the class's (experts merged on loading, old names) is loaded by transformers into memory, with a
    note. Raises BadInput, Untrusted, Unavailable, Unsupported, UsageError.
    """
    if not path.is_dir() or not (path / "config.json").is_file():
        raise UsageError(
            f"{printable(str(path))} is no transformers folder: it holds no config.json",
            fix="name a folder, or give a factory and its files",
        )
    raw = pretrained.configuration(path)
    _refuse_code(path, raw)
    if raw.get("quantization_config"):
        raise Unsupported(
            f"{printable(path.name)} holds quantised weights, whose layout is their library's", fix="stream the weights as they were before"
        )
    files = shards.opened(path)
    try:
        with pretrained.loading(path):
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            cls = pretrained.class_of(config)
            dtype = _dtype(config, files)
            module = meta.built(lambda: cls._from_config(config, dtype=dtype))
            prefix = f"{cls.base_model_prefix}." if cls.base_model_prefix else ""
            prefixes = [prefix] if prefix else []
            missing, extra = meta.missing_and_extra(module, files, prefixes)
            if missing and extra:
                files.close()
                return _by_transformers(path, cls, config, len(missing))
            empty = meta.of_shards(
                lambda: module,
                files,
                where=path.name,
                cast=cast,
                prefixes=prefixes,
                allow_extra=True,
                wanted_dtypes=lambda built: _kept(built, dtype),
            )
            _finish(path, empty.module)
            return empty
    except BaseException:  # the files are ours until they are handed over
        files.close()
        raise


def _by_transformers(path: Path, cls: Any, config: Any, num_missing: int) -> Owned:
    module, report = cls.from_pretrained(
        path, config=config, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    missing, mismatched = sorted(report.get("missing_keys", ())), [str(item) for item in report.get("mismatched_keys", ())]
    for what, names in (("lacks weights of its own class", missing), ("has weights of other shapes", mismatched)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise BadInput(
                f"{printable(path.name)} {what}: {', '.join(printable(name) for name in names[:5])}{more}",
                fix="config.json and the weights must belong together",
            )
    owned = Owned(module.eval())
    owned.notes.append(
        f"{num_missing} tensors are laid out otherwise in the files than in {cls.__name__}: transformers loaded them into memory first"
    )
    return owned


def _finish(path: Path, module: Any) -> None:
    """What from_pretrained does beyond weights."""
    module.eval()
    if module.can_generate() and (path / "generation_config.json").is_file():
        module.generation_config = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)


def _dtype(config: Any, files: shards.Shards) -> torch.dtype:
    """The configuration's; else that of the first floating tensor in the files, as from_pretrained(dtype="auto") has it."""
    named = getattr(config, "dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named, None)
    if isinstance(named, torch.dtype):
        return named
    found = (getattr(torch, entry.dtype) for entry in files.entries.values())
    return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)


def _kept(module: nn.Module, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
    """Parameters that the class keeps in float32 though the rest is not (T5's `wo` under float16)."""
    plan = getattr(module, "_get_dtype_plan", None)
    if plan is None:
        return {}
    rules = [(re.compile(re.escape(key).replace(r"\*", r".*")), kept) for key, kept in plan(dtype).items()]
    return {name: kept for name, _ in module.named_parameters(remove_duplicate=False) for rule, kept in rules if rule.search(name)}


def _refuse_code(path: Path, raw: dict[str, Any]) -> None:
    """Code beside the weights, and kernels from a hub. Raises Untrusted."""
    if any(key == "auto_map" and value for key, value in pretrained.entries(raw)):
        raise Untrusted(
            f"{printable(path.name)}/config.json names Python code of its own (auto_map)",
            fix="take auto_map out to use transformers' own class",
        )
    pretrained.refuse_kernels(path, raw)
