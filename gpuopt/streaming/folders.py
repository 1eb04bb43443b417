"""A transformers folder -> its module with parameters on the meta device, and the safetensors files each is filled from. Never reaches a network, never runs code beside the weights."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn

from gpuopt.core.errors import BadInput, GpuoptError, Unavailable, Unsupported, Untrusted, UsageError
from gpuopt.streaming import meta, shards
from gpuopt.streaming.meta import Weights
from gpuopt.streaming.owned import Owned
from gpuopt.trust import gate
from gpuopt.trust.policy import printable

_MAX_CONFIG_BYTES = 16 * 2**20
_ATTENTION = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
_HUB_KERNELS = ("fusion_config", "kernel_config", "use_kernels")


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
    raw = _config(path)
    _refuse_code(path, raw)
    if raw.get("quantization_config"):
        raise Unsupported(
            f"{printable(path.name)} holds quantised weights, whose layout is their library's", fix="stream the weights as they were before"
        )
    files = shards.opened(path)
    try:
        with _offline(), _quiet(), _translated(path):
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            cls = _class(config)
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


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise BadInput(f"{printable(path.name)}/config.json is larger than 16 MiB", fix="download the folder again")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"{printable(path.name)}/config.json is damaged: {printable(str(error))}", fix="download the folder again"
        ) from error
    if not isinstance(content, dict):
        raise BadInput(f"{printable(path.name)}/config.json is no object", fix="download the folder again")
    return content


def _refuse_code(path: Path, raw: dict[str, Any]) -> None:
    """Code beside the weights, and kernels that transformers would fetch from its hub and run. Raises Untrusted."""
    where = f"{printable(path.name)}/config.json"
    queue: list[Any] = [raw]
    while queue:
        item = queue.pop()
        if isinstance(item, list):
            queue.extend(item)
        if not isinstance(item, dict):
            continue
        queue.extend(item.values())
        for key, value in item.items():
            if key == "auto_map" and value:
                raise Untrusted(f"{where} names Python code of its own (auto_map)", fix="take auto_map out to use transformers' own class")
            if key in _ATTENTION and (not isinstance(value, (str, type(None))) or value not in gate.SAFE_ATTENTION):
                raise Untrusted(f"{where} asks for the attention kernel {printable(str(value))!r}", fix="take that entry out")
            if key in _HUB_KERNELS and value:
                raise Untrusted(f"{where} asks for kernels from a hub ({key})", fix="take that entry out")


def _class(config: Any) -> Any:
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    if type(config) in transformers.AutoModel._model_mapping:
        return transformers.AutoModel._model_mapping[type(config)]
    raise BadInput(
        f"transformers {transformers.__version__} has no model class for {printable(str(getattr(config, 'architectures', None)))}",
        fix="pip install -U transformers",
    )


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """The libraries read this constant at each request."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except GpuoptError:
        raise
    except ImportError as error:
        raise Unavailable(
            f"{printable(path.name)} needs a package that is missing: {printable(str(error), limit=200)}",
            fix=f"pip install {error.name or '…'}",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
        # What transformers raises for a configuration or weights it cannot use.
        raise BadInput(
            f"transformers {transformers.__version__} cannot build {printable(path.name)}: {printable(str(error).strip(), limit=300)}",
            fix="check config.json, or update transformers",
        ) from error
