"""A transformers folder, or `hf:ID@REVISION` -> Model, by the class its configuration names. A folder never reaches the network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

from gpuopt.core.errors import BadInput, Unavailable, Untrusted, UsageError
from gpuopt.core.live import Model
from gpuopt.core.spec import ModelRef
from gpuopt.loaders import describe, weights
from gpuopt.programs import pretrained
from gpuopt.trust import consent, gate
from gpuopt.trust.policy import printable

_PATTERNS = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
"""What is fetched: configuration and safetensors; tokenizers are no part of the model, and .bin and .py are not wanted."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?")


def load(ref: ModelRef, path: Path) -> Model:
    """A folder with config.json and safetensors (or, by the restricted loader, .bin). Raises BadInput, Untrusted, Unavailable, GateFailed."""
    return _load_folder(ref, path, name=describe.name_of(path), is_pinned=False)


def load_hub(ref: ModelRef) -> Model:
    """`hf:ID` or `hf:ID@REVISION`; fetched to the hub's cache, then loaded offline. Raises Unavailable without a network."""
    found = fetched(ref)
    model = _load_folder(ref, found.folder, name=found.name, is_pinned=found.is_pinned)
    model.notes += found.notes
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A snapshot in the hub's cache."""

    folder: Path
    name: str
    is_pinned: bool
    """By a commit, so that the same words name the same files for ever."""
    notes: tuple[str, ...]


def fetched(ref: ModelRef) -> Fetched:
    """What `hf:ID@REVISION` names, fetched where it is not there yet; nothing of it is opened. Raises UsageError, Unavailable without a network."""
    hub_id, _, revision = ref.text.removeprefix("hf:").partition("@")
    if not _HUB_ID.fullmatch(hub_id):
        raise UsageError(
            f"{printable(ref.text)!r} is not of the form hf:OWNER/NAME@REVISION", fix="hf:google-bert/bert-base-uncased@COMMIT"
        )
    is_pinned = _COMMIT.fullmatch(revision) is not None
    patterns = [*_PATTERNS, "*.py"] if ref.trust_remote_code and is_pinned else _PATTERNS
    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, revision=revision or None, allow_patterns=patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise Unavailable(
            f"{hub_id} cannot be fetched: {printable(str(error), limit=200)}",
            fix="check the name, the revision and the network, or name a local folder",
        ) from error
    notes = () if is_pinned else (f"not pinned: hf:{hub_id}@{folder.name} names these very files",)
    return Fetched(folder=folder, name=hub_id.rpartition("/")[2], is_pinned=is_pinned, notes=notes)


def _load_folder(ref: ModelRef, path: Path, *, name: str, is_pinned: bool) -> Model:
    raw = pretrained.configuration(path)
    _refuse_code(ref, path, raw, is_pinned)
    has_code = bool(raw.get("auto_map"))
    notes = [f"--arch {ref.arch} is not used: the folder's configuration names its class"] if ref.arch else []
    with pretrained.loading(path):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=has_code)
        cls = transformers.AutoModel if has_code else pretrained.class_of(config)
        module = _build(ref, path, cls, config, notes, has_code)
    if not ref.allow_nonfinite:
        describe.refuse_nonfinite(module.named_parameters(), path.name)
    return describe.of_module(module, name=name, sha256=consent.sha256_of(path), notes=notes)


def _build(ref: ModelRef, path: Path, cls: Any, config: Any, notes: list[str], has_code: bool) -> Any:
    index = path / weights.INDEX
    if index.is_file():
        weights.weight_map(index)
        shards = sorted(set(weights.weight_map(index).values()))
    else:
        shards = ["model.safetensors"] if (path / "model.safetensors").is_file() else []
    if shards:
        for shard in shards:
            gate.check_safetensors(path / shard)
        module, report = cls.from_pretrained(
            path,
            config=config,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=has_code,
            output_loading_info=True,
        )
        _refuse_gaps(path, report, notes)
        return module
    binary = path / "pytorch_model.bin"
    if binary.is_file():
        tensors = gate.load_tensors(binary)
        dtype = describe.commonest_dtype(t for t in tensors.values() if isinstance(t, torch.Tensor))
        module = cls._from_config(config, **({"dtype": getattr(torch, dtype)} if dtype else {}))
        weights.fill(module, tensors, where=binary.name, cast=ref.cast, notes=notes)
        return module
    raise BadInput(
        f"the folder {path.name} holds no model.safetensors, index or pytorch_model.bin",
        fix="download the weights, or name package.module:factory",
    )


def _refuse_gaps(path: Path, report: Any, notes: list[str]) -> None:
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        shown = ", ".join(printable(k) for k in missing[:5])
        raise BadInput(
            f"{path.name} lacks weights of its own class: {shown}" + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
            fix="the class in config.json (architectures) must be the one that was saved",
        )
    mismatched = [str(m) for m in report.get("mismatched_keys", ())]
    if mismatched:
        raise BadInput(
            f"{path.name} has weights of other shapes: {printable(mismatched[0])}", fix="config.json and the weights must belong together"
        )
    unexpected = sorted(report.get("unexpected_keys", ()))
    if unexpected:
        notes.append(
            f"{len(unexpected)} tensors of the file belong to no part of the class: {', '.join(printable(k) for k in unexpected[:3])}"
        )


def _refuse_code(ref: ModelRef, path: Path, raw: dict[str, Any], is_pinned: bool) -> None:
    """Code beside the weights that nobody trusted, and kernels that transformers would fetch from its hub. Raises Untrusted."""
    if raw.get("auto_map"):
        if not ref.trust_remote_code:
            raise Untrusted(
                f"{path.name}/config.json names Python code of its own (auto_map)",
                fix="--trust-remote-code with hf:ID@COMMIT; or take auto_map out of config.json to use transformers' own class",
            )
        if not is_pinned:
            sha256 = consent.sha256_of(path)
            if not consent.is_trusted(sha256, ref.trust):
                raise Untrusted(
                    f"{path.name} names Python code of its own (auto_map), and nothing pins which code that is",
                    fix=f"hf:ID@COMMIT with the full commit hash, or gpuopt trust {path} (sha256:{sha256})",
                )
    pretrained.refuse_kernels(path, raw)
