"""Job -> nothing, or the error it would end with, found before anything is measured: a misspelt path is told at once, not after half a minute of ceilings.

The parent's part looks at names alone; `Session.require` does the rest in a child, which has torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gpuopt import generation, loaders
from gpuopt.backends import BACKENDS, listed
from gpuopt.core import registry
from gpuopt.core.errors import GpuoptError, UsageError
from gpuopt.core.spec import BackendSpec, Candidate, EvalSpec, Job
from gpuopt.loaders import named
from gpuopt.trust.policy import printable

ONLY_TO_GENERATE = frozenset({"static", "tuned", "gemv"})
"""Presets that no backend has."""


def require(job: Job) -> None:
    """Raises what all candidates would end with for one and the same reason. One of several that cannot be is a result among others, as it always was."""
    errors = [_error(candidate, generates=job.generate is not None) for candidate in job.candidates]
    told = {(type(error), error.message) for error in errors if error is not None}
    if errors and errors[0] is not None and None not in errors and len(told) == 1:
        raise errors[0]


def presets(job: Job) -> Iterator[BackendSpec]:
    """Backends whose preset a child has to look up: where all candidates name the same, and those of a search."""
    of_candidates = {str(candidate.backend): candidate.backend for candidate in job.candidates}
    if len(of_candidates) == 1:
        yield from (spec for spec in of_candidates.values() if spec.preset is not None)
    searched = (BackendSpec.parse(text) for text in job.search.backends)
    yield from (spec for spec in searched if spec.preset is not None and str(spec) not in of_candidates)


def _error(candidate: Candidate, *, generates: bool) -> GpuoptError | None:
    try:
        _require(candidate)
        if not generates:
            _require_no_way(candidate.backend)
    except GpuoptError as error:
        return error
    return None


def _require(candidate: Candidate) -> None:
    if candidate.model.text:  # a live module has none
        loaders.require(candidate.model.text)
    name = candidate.backend.name
    if name and name not in BACKENDS:
        registry.resolve({known: BACKENDS[known] for known in listed()}, name, kind="backend")
    if candidate.inputs.file is not None:
        _require_file(candidate.inputs.file, "--inputs")
    _require_data(candidate.evaluation)


def _require_no_way(backend: BackendSpec) -> None:
    """Some presets are ways to generate, which a backend knows nothing of."""
    if backend.preset in ONLY_TO_GENERATE and (backend.name, backend.preset) in generation.WAYS:
        raise UsageError(f"{backend} is a way to generate tokens", fix="--generate N, or another preset")


def _require_data(spec: EvalSpec) -> None:
    for path, option in ((spec.data, "--eval-data"), (spec.calib, "--calib")):
        if path is not None:
            _require_file(path, option)
    if spec.metric is not None:
        named.require(spec.metric, "my_metric.py:accuracy", what="metric")


def _require_file(text: str, option: str) -> None:
    if not Path(text).is_file():
        raise UsageError(f"there is no file {printable(text)}", fix=f"{option} takes an .npz or .safetensors file")
