"""Consent is to bytes, recorded once, and never blanket."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuopt.core.errors import ResourceError, UsageError
from gpuopt.trust import consent

OTHER = "ab" * 32


def test_nothing_is_trusted_before_it_is_recorded(tmp_path: Path) -> None:
    file = tmp_path / "m.pt"
    file.write_bytes(b"x")
    sha256 = consent.sha256_of(file)
    assert not consent.is_trusted(sha256)
    assert consent.record(file) == sha256
    assert consent.record(f"sha256:{sha256.upper()}") == sha256
    assert consent.is_trusted(sha256)
    assert [e.sha256 for e in consent.entries()] == [sha256]
    assert consent.entries()[0].path == str(file)


def test_consent_can_be_taken_back(tmp_path: Path) -> None:
    consent.record(f"sha256:{OTHER}")
    assert consent.forget(OTHER)
    assert not consent.forget(OTHER)
    assert not consent.is_trusted(OTHER)


def test_a_path_given_as_trust_is_hashed_now(tmp_path: Path) -> None:
    file = tmp_path / "m.pt"
    file.write_bytes(b"x")
    sha256 = consent.sha256_of(file)
    assert consent.is_trusted(sha256, (str(file),))
    file.write_bytes(b"y")
    assert not consent.is_trusted(sha256, (str(file),))
    assert consent.entries() == ()


def test_trust_that_is_neither_hash_nor_file_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="neither a file nor a sha256"):
        consent.is_trusted(OTHER, ("yes",))
    with pytest.raises(UsageError):
        consent.record("no/such/file")


@pytest.mark.parametrize("value", ["1", "true", "all", "*", f"{OTHER},1", "/etc/passwd"])
def test_the_environment_takes_hashes_only(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUOPT_TRUST", value)
    with pytest.raises(UsageError, match="not a sha256"):
        consent.is_trusted("cd" * 32)


def test_the_environment_trusts_the_hashes_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUOPT_TRUST", f"sha256:{'ef' * 32}, {OTHER}")
    assert consent.is_trusted(OTHER)
    assert not consent.is_trusted("cd" * 32)


def test_the_state_is_private(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = consent.state_dir()
    consent.sign(b"x")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    folder.chmod(0o777)
    consent.state_dir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_damaged_record_is_an_error_and_not_an_empty_list() -> None:
    (consent.state_dir() / "trusted.jsonl").write_text("{broken\n")
    with pytest.raises(ResourceError, match="line 1 is damaged"):
        consent.is_trusted(OTHER)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=200), other=st.binary(max_size=200))
def test_only_what_was_signed_is_ours(data: bytes, other: bytes) -> None:
    mac = consent.sign(data)
    assert consent.is_ours(data, mac)
    assert consent.is_ours(other, mac) == (data == other)
    assert not consent.is_ours(data, mac[:-1] + ("0" if mac[-1] != "0" else "1"))
    assert not consent.is_ours(data, "")
    assert not consent.is_ours(data, "é" * 64)


def test_without_a_key_nothing_is_ours_and_none_is_made() -> None:
    assert not consent.is_ours(b"x", "0" * 64)
    assert not (consent.state_dir() / "key").exists()


def test_another_users_key_signs_nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mac = consent.sign(b"x")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    consent.sign(b"y")
    assert not consent.is_ours(b"x", mac)


def test_a_key_that_others_can_read_is_refused() -> None:
    consent.sign(b"x")
    (consent.state_dir() / "key").chmod(0o644)
    with pytest.raises(ResourceError, match="others"):
        consent.is_ours(b"x", "0" * 64)


def test_a_bundle_is_its_manifest_and_any_other_folder_is_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1")
    before = consent.sha256_of(tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert consent.sha256_of(tmp_path) != before
    (tmp_path / "manifest.json").write_text("{}")
    assert consent.sha256_of(tmp_path) == consent.sha256_of(tmp_path / "manifest.json")


def test_processes_that_start_together_agree_on_one_key_and_lose_no_record(tmp_path: Path) -> None:
    program = "import sys; from gpuopt.trust import consent; consent.record(sys.argv[1]); print(consent.sign(b'x'))"
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": str(Path(consent.__file__).parents[2])}
    hashes = [f"{i:02x}" * 32 for i in range(4)]
    children = [subprocess.Popen([sys.executable, "-c", program, h], env=environment, stdout=subprocess.PIPE, text=True) for h in hashes]
    macs = {child.communicate()[0] for child in children}
    assert len(macs) == 1
    assert len((tmp_path / "gpuopt" / "trusted.jsonl").read_text().splitlines()) == 4
    assert not [p for p in (tmp_path / "gpuopt").iterdir() if p.name.startswith(".")]
