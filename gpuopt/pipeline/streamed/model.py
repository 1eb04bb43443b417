"""A candidate -> its module for streaming, and where the weights come from: from their files into slabs, wherever they lie in files, and else loaded whole. Imports torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpuopt import loaders
from gpuopt.core.errors import GpuoptError, ResourceError
from gpuopt.core.live import Model
from gpuopt.core.registry import resolve
from gpuopt.core.spec import Candidate, ModelRef
from gpuopt.loaders import describe, factory
from gpuopt.pipeline.streamed import laid
from gpuopt.streaming import meta, shards
from gpuopt.trust import consent
from gpuopt.trust.policy import Format, classify, printable

_BARE = (Format.SAFETENSORS, Format.SHARDED_SAFETENSORS)


class Nowhere:
    """The weights of a module that is only planned: there are none."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.notes: list[str] = []

    def close(self) -> None:
        """Nothing is open."""


def opened(candidate: Candidate, *, hollow: bool = False) -> tuple[Model, Any]:
    """The model, and where its weights come from (`meta.Weights`, or Nowhere). Raises what loaders raise.

    A transformers folder, `hf:ID@REVISION` and safetensors with `--arch` are built without their weights, which are read straight into slabs; so are those of
    our largest models (`laid`). Any other factory makes its weights itself: with `hollow` (nothing will be computed) it is built on the meta device, and where it reads what it made, for real, which a note says.
    """
    ref = candidate.model
    notes: list[str] = []
    path = Path(ref.text)
    if not ref.trust_remote_code:
        if ref.text.startswith("hf:"):
            found = loaders.fetched(ref)
            if (found.folder / "config.json").is_file() and any(found.folder.glob("*.safetensors")):
                return _of_folder(ref, found.folder, name=found.name, notes=found.notes)
        elif path.exists() and (form := classify(ref.text)) is Format.TRANSFORMERS and any(path.glob("*.safetensors")):
            return _of_folder(ref, path, name=describe.name_of(path))
        elif path.exists() and form in _BARE and ref.arch:
            try:
                return _of_shards(ref, path)
            except _CannotBeEmpty as why:
                notes.append(str(why))
        elif not path.exists() and (ours := laid.opened(ref)) is not None:
            return ours
        elif hollow and not path.exists():
            try:
                model = factory.load(ref, on_meta=True)
                return model, Nowhere(model.module)
            except GpuoptError as error:  # what is wrong with the factory itself comes up again below
                notes.append(f"built with all its weights, since it cannot be built without them: {printable(error.message, limit=200)}")
    model = loaders.load(ref)
    model = replace(model, notes=[*model.notes, *notes])
    if model.form != "module":
        return model, None
    if model.module is None or not isinstance(model.module, torch.nn.Module):
        raise ResourceError(f"{model.name} holds no module", fix="name the source model")
    return model, meta.empty(model.module)


def _of_folder(ref: ModelRef, path: Path, *, name: str, notes: tuple[str, ...] = ()) -> tuple[Model, Any]:
    weights = resolve({"transformers": "gpuopt.streaming.folders:of_folder"}, "transformers", kind="loader", extra="hf")(
        path, cast=ref.cast
    )
    _refuse_nonfinite(weights, ref, name)
    unused = [f"--arch {ref.arch} is not used: the folder's configuration names its class"] if ref.arch else []
    return describe.of_module(weights.module, name=name, sha256=None, notes=[*notes, *unused]), weights


def _refuse_nonfinite(weights: meta.Empty, ref: ModelRef, where: str) -> None:
    """As a loader that reads them whole: NaN and Inf are refused, but when each tensor is read, for nothing is before."""
    if not ref.allow_nonfinite:
        describe.refuse_nonfinite(weights.module.named_buffers(), where)
        weights.check = lambda name, tensor: describe.refuse_nonfinite(((name, tensor),), where)


class _CannotBeEmpty(Exception):
    """Why a factory makes its weights all the same."""


def _of_shards(ref: ModelRef, path: Path) -> tuple[Model, Any]:
    """Bare tensors and the factory that they belong to."""
    assert ref.arch is not None
    built: list[factory.Built] = []

    def build() -> torch.nn.Module:
        built.append(factory.build(ref.arch or ""))
        return built[-1].module

    files = shards.opened(path)
    try:
        try:
            module = meta.built(build)
        except GpuoptError as error:
            raise _CannotBeEmpty(f"loaded whole: {printable(error.message, limit=200)}") from error
        weights = meta.of_shards(lambda: module, files, where=path.name, cast=ref.cast)
    except BaseException:  # the files are ours until they are handed over
        files.close()
        raise
    _refuse_nonfinite(weights, ref, path.name)
    signature = describe.declared_signature(built[-1].function)
    model = describe.of_module(
        weights.module, name=describe.name_of(path), signature=signature, sha256=consent.sha256_of(path), notes=built[-1].notes
    )
    return model, weights
