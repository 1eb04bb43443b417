"""State and caches of a test run never touch the user's."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two workers on two cores: a second thread each would spin while the other waits, and time would be noise


@pytest.fixture(autouse=True)
def private_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Consent and keys of their own for every test; the cache is shared by a run, as compiled kernels are slow to make."""
    base = tmp_path_factory.getbasetemp()
    cache = base / "cache"
    cache.mkdir(exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    monkeypatch.delenv("GPUOPT_TRUST", raising=False)
