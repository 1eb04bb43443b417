"""Named tensors (.pt, .safetensors, sharded) + the module of --arch -> Model, with nothing cast, dropped or left random in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpuopt.core.errors import BadInput, UsageError
from gpuopt.core.live import Model
from gpuopt.core.spec import ModelRef
from gpuopt.loaders import describe, factory
from gpuopt.trust import consent, gate
from gpuopt.trust.policy import Format, classify, printable

INDEX = "model.safetensors.index.json"
_CONTAINERS = ("state_dict", "model_state_dict", "model", "weights", "params", "module")
"""Keys under which training scripts keep the state dict, likeliest first."""
_SHOWN = 5


def load(ref: ModelRef, path: Path) -> Model:
    """A .safetensors file, or a sharded index or its folder. Raises BadInput, GateFailed; UsageError without --arch."""
    _require_arch(ref, path)  # before gigabytes are read
    if classify(path) is Format.SHARDED_SAFETENSORS:
        index = path / INDEX if path.is_dir() else path
        return of_tensors(ref, index, read_shards(index))
    return of_tensors(ref, path, gate.load_safetensors(path))


def of_tensors(ref: ModelRef, path: Path, loaded: Any) -> Model:
    """Build the module of --arch and fill it. `loaded` is a mapping of names to tensors, or a checkpoint that holds one."""
    notes: list[str] = []
    tensors = _tensors_in(path, loaded, notes)
    arch = _require_arch(ref, path)
    if not ref.allow_nonfinite:
        describe.refuse_nonfinite(tensors.items(), path.name)
    built = factory.build(arch)
    fill(built.module, tensors, where=path.name, cast=ref.cast, notes=notes)
    signature = describe.declared_signature(built.function)
    return describe.of_module(
        built.module,
        name=describe.name_of(path),
        signature=signature,
        sha256=consent.sha256_of(path),
        notes=[*notes, *built.notes],
    )


def fill(module: nn.Module, tensors: Mapping[str, torch.Tensor], *, where: str, cast: bool, notes: list[str]) -> None:
    """Copy tensors into a module: every name, shape and dtype must fit. Raises BadInput naming the first five that do not.

    A parameter tied to one that is there may be missing; two names of one tied parameter must agree.
    """
    own = module.state_dict(keep_vars=True)
    wanted = {name: value for name, value in own.items() if isinstance(value, torch.Tensor)}
    given = _without_prefix(tensors, wanted, notes)
    tied = _tied(wanted)
    missing = [n for n in wanted if n not in given and not any(other in given for other in tied[n])]
    unexpected = [n for n in given if n not in own]
    if missing or unexpected:
        parts = [f"lacks {_list(missing)}"] * bool(missing) + [f"has {_list(unexpected)}, which the model has not"] * bool(unexpected)
        raise BadInput(f"{where} does not fit --arch: it {' and '.join(parts)}", fix="give the --arch that these weights were saved from")
    pairs = [(name, given[name], wanted[name]) for name in given if name in wanted]
    shapes = [f"{n} is {list(a.shape)} in the file, {list(b.shape)} in the model" for n, a, b in pairs if a.shape != b.shape]
    if shapes:
        raise BadInput(f"{where} does not fit --arch: {_list(shapes)}", fix="give the --arch that these weights were saved from")
    dtypes = [f"{n} is {_short(a)} in the file, {_short(b)} in the model" for n, a, b in pairs if a.dtype != b.dtype]
    if dtypes and not cast:
        raise BadInput(
            f"{where} has other dtypes than --arch builds: {_list(dtypes)}",
            fix="--cast converts them to the model's, and --precision says what it computes in; or let the factory build that dtype",
        )
    if dtypes:
        notes.append(f"cast {len(dtypes)} tensors: {dtypes[0]}" + (", …" if len(dtypes) > 1 else ""))
    for name in given:
        for other in tied.get(name, ()):
            if other > name and other in given and not torch.equal(given[name], given[other]):
                raise BadInput(f"{where}: {name} and {other} differ, but the model ties them", fix="give an --arch without tied weights")
    if any(value.is_meta for value in wanted.values()):
        module.load_state_dict(dict(given), strict=False, assign=True)
    else:
        module.load_state_dict(dict(given), strict=False)  # names were checked above; strict would not know ties


def read_shards(index: Path) -> dict[str, torch.Tensor]:
    """All tensors of a sharded safetensors index. Raises BadInput for a shard that is missing, outside the folder, or lacks a tensor."""
    by_shard: dict[str, list[str]] = {}
    for name, shard in weight_map(index).items():
        by_shard.setdefault(shard, []).append(name)
    tensors: dict[str, torch.Tensor] = {}
    for shard, names in sorted(by_shard.items()):
        found = gate.load_safetensors(index.parent / shard)
        lacking = [name for name in names if name not in found]
        if lacking:
            raise BadInput(f"{index.name}: the shard {shard} lacks {_list(lacking)}", fix="download the folder again")
        tensors.update({name: found[name] for name in names})
    return tensors


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard file, each a plain name that is there. Raises BadInput."""
    try:
        content = json.loads(index.read_bytes())
        entries = content["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{index.name} is a damaged index ({type(error).__name__})", fix="download the folder again") from error
    found: dict[str, str] = {}
    for name, shard in entries:
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard or "\0" in shard:
            raise BadInput(f"{index.name} names the shard {printable(str(shard))!r}, outside its folder", fix="do not use this folder")
        if shard not in found.values() and not (index.parent / shard).is_file():
            raise BadInput(f"{index.name} names the shard {printable(shard)!r}, which is not there", fix="download the folder again, whole")
        found[str(name)] = shard
    if not found:
        raise BadInput(f"{index.name} names no tensors", fix="download the folder again")
    return found


def _require_arch(ref: ModelRef, path: Path) -> str:
    if not ref.arch:
        raise UsageError(
            f"{path.name} holds bare tensors",
            fix="say what they belong to: --arch package.module:factory or --arch file.py:factory; for a transformers model, name a folder "
            "that holds them as model.safetensors beside its config.json",
        )
    return ref.arch


def _tensors_in(path: Path, loaded: Any, notes: list[str]) -> dict[str, torch.Tensor]:
    found = loaded
    for _ in range(2):  # {"model": {"state_dict": {…}}} is as deep as training scripts go
        if not isinstance(found, Mapping):
            break
        inner = next((key for key in _CONTAINERS if isinstance(found.get(key), Mapping)), None)
        if inner is None or any(isinstance(v, torch.Tensor) for v in found.values()):
            break
        ignored = [str(k) for k in found if k != inner]
        notes.append(f"took the tensors under {inner!r}" + (f"; ignored {', '.join(map(printable, ignored[:5]))}" if ignored else ""))
        found = found[inner]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, torch.Tensor) for v in found.values()):
        kinds = sorted({type(v).__name__ for v in found.values()}) if isinstance(found, Mapping) else [type(found).__name__]
        raise BadInput(
            f"{path.name} holds neither a module nor a dictionary of tensors, but {', '.join(kinds[:4]) or 'nothing'}",
            fix="save model.state_dict()",
        )
    return {str(name): tensor for name, tensor in found.items()}


def _without_prefix(tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, Any], notes: list[str]) -> dict[str, torch.Tensor]:
    """Names as the model has them: `module.` of DataParallel and `_orig_mod.` of torch.compile are taken off when every name has it."""
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors) and not any(name.startswith(prefix) for name in wanted):
            notes.append(f"took {prefix!r} off every name")
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _tied(wanted: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """Name -> the other names of the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: tuple(n for n in group if n != name) for group in groups.values() for name in group}


def _list(items: list[str]) -> str:
    return ", ".join(_shown(items)) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def _shown(items: list[str]) -> Iterator[str]:
    return (printable(item) for item in items[:_SHOWN])


def _short(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
