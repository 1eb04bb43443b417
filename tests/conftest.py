"""State and caches of a test run never touch the user's."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two workers on two cores: a second thread each would spin while the other waits, and time would be noise


@pytest.fixture(autouse=True)
def private_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Consent and keys of their own for every test; the cache is shared by a run, as compiled kernels are slow to make."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # one for all workers
    cache = base / "cache"
    cache.mkdir(exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    monkeypatch.delenv("GPUOPT_TRUST", raising=False)


_frozen = 0
"""Modules that were imported when gc.freeze was last called."""


@pytest.fixture(autouse=True)
def imported_once() -> Iterator[None]:
    """What is measured is measured after a full collection; one that goes through torch's compilers takes a quarter of a second, and finds nothing there."""
    yield
    global _frozen
    if len(sys.modules) > _frozen + 100:
        gc.collect()  # what this test left is garbage still
        gc.freeze()
        _frozen = len(sys.modules)
