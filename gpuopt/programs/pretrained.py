"""A transformers folder's configuration -> checked, and the class it names: for whoever builds the class with its weights or without. Never reaches a network."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers

from gpuopt.core.errors import BadInput, GpuoptError, Unavailable, Untrusted
from gpuopt.trust import gate
from gpuopt.trust.policy import printable

_MAX_CONFIG_BYTES = 16 * 2**20
_ATTENTION = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
_HUB_KERNELS = ("fusion_config", "kernel_config", "use_kernels")


def configuration(path: Path) -> dict[str, Any]:
    """What config.json says. Raises BadInput where it is damaged or not transformers'."""
    file, name = path / "config.json", printable(path.name)
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise BadInput(f"{name}/config.json is larger than 16 MiB", fix="download the folder again")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{name}/config.json is damaged: {printable(str(error))}", fix="download the folder again") from error
    if not isinstance(content, dict):
        raise BadInput(f"{name}/config.json is no object", fix="download the folder again")
    if not (content.get("model_type") or content.get("architectures")):
        raise BadInput(f"{name}/config.json names no model_type: it is not transformers'", fix="name the model file inside the folder")
    return content


def refuse_kernels(path: Path, raw: dict[str, Any]) -> None:
    """Attention and other kernels that transformers would fetch from its hub and run, at any depth. Raises Untrusted."""
    where = f"{printable(path.name)}/config.json"
    for key, value in entries(raw):
        if key in _ATTENTION and (not isinstance(value, (str, type(None))) or value not in gate.SAFE_ATTENTION):
            raise Untrusted(f"{where} asks for the attention kernel {printable(str(value))!r}", fix="take that entry out")
        if key in _HUB_KERNELS and value:
            raise Untrusted(f"{where} asks for kernels from a hub ({key})", fix="take that entry out")


def entries(raw: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of a configuration and of all it holds."""
    queue: list[Any] = [raw]
    while queue:
        item = queue.pop()
        if isinstance(item, dict):
            yield from item.items()
            queue.extend(item.values())
        elif isinstance(item, list):
            queue.extend(item)


def class_of(config: Any) -> Any:
    """The class the configuration names, where transformers has it; else the one that AutoModel would choose. Raises BadInput where there is neither."""
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    if type(config) in transformers.AutoModel._model_mapping:
        found = transformers.AutoModel._model_mapping[type(config)]
        return found[0] if isinstance(found, (tuple, list)) else found
    raise BadInput(
        f"transformers {transformers.__version__} has no model class for {printable(str(getattr(config, 'architectures', None)))}",
        fix="pip install -U transformers",
    )


@contextlib.contextmanager
def loading(path: Path) -> Iterator[None]:
    """While transformers works on this folder: no request leaves, nothing is printed, and what it raises for a folder it cannot use is BadInput or Unavailable."""
    with _offline(), _quiet():
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
            # What it raises for a configuration or weights it cannot use. torch.OutOfMemoryError is a RuntimeError, but nothing is on a GPU yet.
            raise BadInput(
                f"transformers {transformers.__version__} cannot load {printable(path.name)}: {printable(str(error).strip(), limit=300)}",
                fix="check config.json, or update transformers",
            ) from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Whatever a configuration names. The libraries read this constant at each request."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice on stderr: what matters becomes a note or an error."""
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
