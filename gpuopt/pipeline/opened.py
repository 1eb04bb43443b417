"""A bundle + what was typed beside it -> what is run: its own backend, precision and inputs, at dimensions inside the ranges it was built for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gpuopt.bundles import fingerprint
from gpuopt.bundles import manifest as bundle_manifest
from gpuopt.bundles import read as bundle_files
from gpuopt.core.errors import UsageError
from gpuopt.core.live import Model
from gpuopt.core.result import Manifest
from gpuopt.core.spec import BackendSpec, Candidate, InputSpec, Precision, TensorSpec
from gpuopt.devices import info
from gpuopt.pipeline import packs
from gpuopt.pipeline.asked import describe_transforms


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A bundle that fits this machine."""

    manifest: Manifest
    path: Path
    candidate: Candidate
    """With the bundle's inputs, dimensions, backend and precision in the place of what was typed."""
    precision: Precision
    pack: packs.Pack | None
    """Its reference outputs; None where it was never verified."""
    notes: tuple[str, ...] = ()
    """What was typed and changes nothing."""


def opened(candidate: Candidate, model: Model) -> Opened:
    """Open the bundle at `model.path`; `model` gets the name, digest and signature of what was built. Raises UsageError, BadInput, Untrusted, Unavailable."""
    assert model.path is not None
    manifest = bundle_files.open_bundle(model.path, candidate.model.trust)
    found = fingerprint.current(manifest.backend.name, info.describe(candidate.device))
    bundle_files.require_match(manifest, found)
    precision = manifest.precision or Precision.FP32
    notes: tuple[str, ...] = ()
    model.name = manifest.model
    model.sha256 = manifest.model_sha256
    dims = dict(manifest.dims)
    for name, value in candidate.dims.items():
        low, high = manifest.dim_ranges.get(name, (dims.get(name, value), dims.get(name, value)))
        if name not in dims or not low <= value <= high:
            allowed = f"{low}" if low == high else f"{low} to {high}"
            raise UsageError(
                f"dimension {name}={value} does not fit the bundle",
                fix=f"it was built for {name} = {allowed}" if name in dims else f"it has {', '.join(dims)}",
            )
        dims[name] = value
    stored = bundle_manifest.file_of(manifest, "inputs")
    specs = tuple(TensorSpec.parse(text) for text in manifest.inputs)
    model.signature = specs
    spec = InputSpec(file=str(model.path / stored), seed=manifest.seed) if stored else InputSpec(tensors=specs, seed=manifest.seed)
    asked = [str(candidate.backend)] if candidate.backend not in (BackendSpec(), manifest.backend) else []
    asked += [candidate.precision.value] if candidate.precision not in (None, manifest.precision) else []
    asked += describe_transforms(candidate.transforms)
    if asked:
        own = f"{manifest.backend} {precision}"
        notes = (f"a bundle is what it was built as, {own}: {', '.join(asked)} changes nothing",)
    return Opened(
        manifest=manifest,
        path=model.path,
        candidate=replace(candidate, inputs=spec, dims=dims, backend=manifest.backend, precision=manifest.precision),
        precision=precision,
        pack=packs.read(model.path, bundle_manifest.file_of(manifest, "reference")),
        notes=notes,
    )
