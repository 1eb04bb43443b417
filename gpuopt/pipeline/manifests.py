"""Candidate + Run + what was saved -> Manifest of a bundle, without its file hashes: the writer adds those."""

from __future__ import annotations

from gpuopt._version import __version__
from gpuopt.core.result import SCHEMA_VERSION, Manifest, ManifestFile, Run
from gpuopt.core.spec import Candidate, Precision
from gpuopt.pipeline import facts


def assemble(candidate: Candidate, run: Run, saved: facts.Saved, *, verified: bool) -> Manifest:
    """`files` carry role and name; hashes and sizes are filled in when the folder is published."""
    loaded = saved.loaded
    return Manifest(
        schema_version=SCHEMA_VERSION,
        gpuopt=__version__,
        model=loaded.name,
        model_sha256=loaded.sha256,
        backend=candidate.backend,
        precision=Precision(loaded.precision),
        transforms=run.transforms,
        files=tuple(ManifestFile(name=name, sha256="", bytes=0, role=role) for role, name in sorted(saved.files.items())),
        fingerprint=saved.fingerprint,
        inputs=loaded.signature,
        dims=loaded.dims,
        dim_ranges=saved.dim_ranges,
        positional=saved.positional,
        device=saved.device,
        verified=verified,
        run=run,
        flops=run.flops,
        flops_by_dtype=run.flops_by_dtype,
        flop_coverage=run.flop_coverage,
        seed=candidate.inputs.seed,
        notes=run.notes,
    )
