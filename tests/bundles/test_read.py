"""A bundle opens where it is whole, fits and is trusted; each way to be none of these has its own error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuopt.bundles import fingerprint, read, write
from gpuopt.core.errors import BadInput, GpuoptError, Unavailable, Untrusted
from gpuopt.core.result import Device, Manifest
from gpuopt.core.spec import BackendSpec
from gpuopt.trust import consent


def change(bundle: Path, edit: Callable[[dict[str, Any]], None], *, sign: bool) -> None:
    """Edit the manifest as text, and sign it with this user's key or leave the old signature."""
    path = bundle / "manifest.json"
    plain = json.loads(path.read_text())
    edit(plain)
    data = json.dumps(plain).encode()
    path.write_bytes(data)
    if sign:
        (bundle / "manifest.mac").write_text(consent.sign(data) + "\n")


def test_a_bundle_opens_on_the_machine_that_built_it(bundle: Path, manifest: Manifest, device: Device) -> None:
    found = read.open_bundle(bundle, device=device)
    assert replace(found, files=()) == manifest
    assert [(f.name, f.role) for f in found.files] == [("cache/kernel.cubin", "extra"), ("model.pt2", "artifact")]
    assert read.is_built_here(bundle)


def test_a_link_to_a_bundle_opens(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(bundle)
    read.open_bundle(tmp_path / "latest")


FIELDS = sorted(Manifest.__dataclass_fields__)


def other(value: Any) -> Any:
    """A different value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return value[1:]
    if isinstance(value, dict):
        key = next(key for key, item in value.items() if item not in (None, [], {}))
        return {**value, key: other(value[key])}
    raise AssertionError(f"no other value for {value!r}")


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_of_a_manifest_can_be_changed_unnoticed(bundle: Path, device: Device, name: str) -> None:
    assert json.loads((bundle / "manifest.json").read_text())[name] not in (None, [], {}), "the fixture must fill every field"
    change(bundle, lambda plain: plain.update({name: other(plain[name])}), sign=False)
    with pytest.raises(GpuoptError) as caught:
        read.open_bundle(bundle, device=device)
    assert caught.value.exit_code in (3, 4)
    assert caught.value.fix


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_of_a_manifest_can_be_missing_or_of_another_type(bundle: Path, name: str) -> None:
    change(bundle, lambda plain: plain.update({name: [[object.__name__]]}), sign=True)
    with pytest.raises(BadInput):
        read.open_bundle(bundle)


def test_every_field_of_a_fingerprint_is_named_when_it_differs_even_if_signed(bundle: Path, manifest: Manifest, device: Device) -> None:
    original = (bundle / "manifest.json").read_bytes()
    for key in manifest.fingerprint:
        (bundle / "manifest.json").write_bytes(original)
        change(bundle, lambda plain, key=key: plain["fingerprint"].update({key: "another"}), sign=True)  # type: ignore[misc]
        with pytest.raises(Unavailable, match=f"built for {key} another, here it is"):
            read.open_bundle(bundle, device=device)


def test_all_differing_fields_are_listed(bundle: Path, device: Device) -> None:
    with pytest.raises(Unavailable, match=r"and 1 more: driver"):
        read.open_bundle(bundle, device=replace(device, capability="8.0", driver="1"))


@pytest.mark.parametrize("version", [2, 0, -1])
def test_another_schema_version_is_unavailable_and_named(bundle: Path, version: int) -> None:
    change(bundle, lambda plain: plain.update(schema_version=version, a_field_of_the_future=1), sign=True)
    with pytest.raises(Unavailable, match=f"schema_version {version}"):
        read.open_bundle(bundle)


def test_a_flipped_byte_is_found_by_hash(bundle: Path) -> None:
    data = bytearray((bundle / "model.pt2").read_bytes())
    data[1234] ^= 1
    (bundle / "model.pt2").write_bytes(data)
    with pytest.raises(BadInput, match=r"model\.pt2.*sha256"):
        read.open_bundle(bundle)


def swap(bundle: Path) -> None:
    (bundle / "model.pt2").write_bytes(b"another" * 6000)


def truncate(bundle: Path) -> None:
    os.truncate(bundle / "model.pt2", 100)


def lose(bundle: Path) -> None:
    (bundle / "model.pt2").unlink()


def add(bundle: Path) -> None:
    (bundle / "sitecustomize.py").write_text("import os")


def add_below(bundle: Path) -> None:
    (bundle / "cache" / "more.so").write_text("")


def link(bundle: Path) -> None:
    (bundle / "model.pt2").rename(bundle.parent / "elsewhere")
    (bundle / "model.pt2").symlink_to(bundle.parent / "elsewhere")


def link_folder(bundle: Path) -> None:
    (bundle / "cache").rename(bundle.parent / "elsewhere")
    (bundle / "cache").symlink_to(bundle.parent / "elsewhere")


def pipe(bundle: Path) -> None:
    (bundle / "model.pt2").unlink()
    os.mkfifo(bundle / "model.pt2")


def manifest_gone(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def manifest_link(bundle: Path) -> None:
    (bundle / "manifest.json").rename(bundle.parent / "m")
    (bundle / "manifest.json").symlink_to(bundle.parent / "m")


def manifest_pipe(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")


def manifest_folder(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").mkdir()


def manifest_torn(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", 200)


def manifest_deep(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("[" * 100_000)


def manifest_not_utf8(bundle: Path) -> None:
    (bundle / "manifest.json").write_bytes(b'{"schema_version": 1, "model": "\xff\xfe"}')


@pytest.mark.parametrize(
    "damage",
    [
        swap,
        truncate,
        lose,
        add,
        add_below,
        link,
        link_folder,
        pipe,
        manifest_gone,
        manifest_link,
        manifest_pipe,
        manifest_folder,
        manifest_torn,
        manifest_deep,
        manifest_not_utf8,
    ],
)
def test_a_damaged_bundle_is_bad_input_at_once(bundle: Path, damage: Callable[[Path], None]) -> None:
    damage(bundle)
    with pytest.raises(BadInput) as caught:
        read.open_bundle(bundle)
    assert not isinstance(caught.value, Untrusted)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "manifest.mac"])
def test_a_manifest_that_names_files_outside_is_refused_even_if_signed(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_bytes(b"")
    change(bundle, lambda plain: plain["files"][0].update(name=name), sign=True)
    with pytest.raises(BadInput, match="inside the bundle"):
        read.open_bundle(bundle)


def test_a_file_listed_twice_is_refused(bundle: Path) -> None:
    change(bundle, lambda plain: plain["files"].append(plain["files"][0]), sign=True)
    with pytest.raises(BadInput, match="twice"):
        read.open_bundle(bundle)


def test_something_that_is_no_bundle_is_bad_input(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        (tmp_path / "file").write_text("x")
        with pytest.raises(BadInput, match="not a bundle"):
            read.open_bundle(path)
    (tmp_path / "manifest.json").write_text('{"name": "a web app", "icons": []}')
    with pytest.raises(BadInput, match="schema_version"):
        read.open_bundle(tmp_path)


@pytest.fixture
def foreign(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundle as another user on another machine sees it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    return bundle


def test_native_code_built_elsewhere_wants_consent_once(foreign: Path, device: Device) -> None:
    with pytest.raises(Untrusted) as caught:
        read.open_bundle(foreign, device=device)
    sha256 = consent.sha256_of(foreign / "manifest.json")
    assert f"gpuopt trust {foreign}" in caught.value.fix and sha256 in caught.value.fix
    assert not read.is_built_here(foreign)
    read.open_bundle(foreign, (f"sha256:{sha256}",))
    with pytest.raises(Untrusted):
        read.open_bundle(foreign, ("sha256:" + "0" * 64,))
    consent.record(foreign)
    read.open_bundle(foreign, device=device)


def test_consent_ends_when_anything_changes(foreign: Path) -> None:
    consent.record(foreign)
    change(foreign, lambda plain: plain.update(seed=4), sign=False)
    with pytest.raises(Untrusted):
        read.open_bundle(foreign)


@pytest.mark.parametrize("mac", [None, "", "0" * 64, "x" * 64, "\xff" * 10])
def test_a_lost_or_forged_signature_is_no_signature(bundle: Path, mac: str | None) -> None:
    if mac is None:
        (bundle / "manifest.mac").unlink()
    else:
        (bundle / "manifest.mac").write_text(mac, encoding="latin-1")
    with pytest.raises(Untrusted):
        read.open_bundle(bundle)


def test_a_bundle_for_another_gpu_is_unavailable_before_it_is_untrusted(foreign: Path, device: Device) -> None:
    with pytest.raises(Unavailable, match="capability 9.0, here it is 8.0"):
        read.open_bundle(foreign, device=replace(device, capability="8.0"))


def test_a_bundle_of_data_alone_needs_no_consent(tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(folder: Path) -> dict[str, str]:
        (folder / "model.onnx").write_bytes(b"onnx")
        return {"artifact": "model.onnx"}

    portable = replace(
        manifest, backend=BackendSpec(name="ort"), fingerprint=fingerprint.current("ort", Device(id="cpu", name="c", kind="cpu"))
    )
    write.publish(build, tmp_path / "portable", portable)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    read.open_bundle(tmp_path / "portable", device=Device(id="cpu", name="another", kind="cpu"))
