"""Names that may be written and read, and which bundles hold code."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.bundles import file_of, manifest, safe_name, stored_count
from gpuopt.core.errors import BadInput, UsageError
from gpuopt.core.result import Manifest, ManifestFile
from gpuopt.core.spec import BackendSpec


@given(st.text(max_size=400))
def test_any_text_becomes_a_safe_name(text: str) -> None:
    name = safe_name(text)
    assert 1 <= len(name) <= 100
    assert name.isascii() and "/" not in name and ".." not in name and not name.startswith((".", "-"))
    manifest.require_output_name(name.replace(".gpuopt-", ""))
    manifest.require_member_name(name)
    assert safe_name(name) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf:org/Model-1.5@main", "hf-org-Model-1.5-main"),
        ("../../etc/passwd", "etc-passwd"),
        ("modèle\n", "modele"),
        ("模型", "model"),
        ("", "model"),
    ],
)
def test_a_models_name_stays_readable(text: str, name: str) -> None:
    assert safe_name(text) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a\nb", "a\x00b", "a\x1b[31m", "x" * 300, "ü" * 120, "a\u202eb", "fast.gpuopt-tmp-x"])
def test_a_troublesome_output_name_is_a_usage_error_with_one_that_would_do(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        manifest.require_output_name(name)
    assert caught.value.fix.startswith("-o ")


@pytest.mark.parametrize("name", ["fast", "schnell-ü", "with space", "v1.2", ".hidden"])
def test_an_ordinary_output_name_is_fine(name: str) -> None:
    manifest.require_output_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "../x", "a/../b", "/etc/passwd", "a//b", "./a", "a/", "a\\b", "manifest.json", "manifest.mac", "a\nb", "\x00", "..", "x" * 300],
)
def test_a_member_name_never_leads_out_of_the_bundle(name: str) -> None:
    with pytest.raises(BadInput):
        manifest.require_member_name(name)


def test_every_file_is_described_and_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"two")
    (tmp_path / "a").write_bytes(b"")
    rows = manifest.describe_folder(tmp_path, {"weights": "sub/b"})
    assert [(row.name, row.bytes, row.role) for row in rows] == [("a", 0, "extra"), ("sub/b", 3, "weights")]
    assert rows[0].sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with pytest.raises(ValueError, match="did not"):
        manifest.describe_folder(tmp_path, {"weights": "absent"})
    os.symlink("a", tmp_path / "link")
    with pytest.raises(BadInput, match="link"):
        manifest.describe_folder(tmp_path, {})


def test_a_linked_folder_counts_as_a_member(tmp_path: Path) -> None:
    os.symlink("/etc", tmp_path / "etc")
    assert manifest.members(tmp_path) == ["etc"]


def files(*names: str) -> tuple[ManifestFile, ...]:
    return tuple(ManifestFile(name=name, sha256="0" * 64, bytes=0, role="artifact") for name in names)


@pytest.mark.parametrize(
    ("backend", "options", "names", "code"),
    [
        ("ort", {}, ("model.onnx", "model.onnx.data", "reference.safetensors"), False),
        ("ort", {"threads": 2}, ("model.onnx",), False),
        ("ort", {"custom_ops": "/tmp/evil.so"}, ("model.onnx",), True),
        ("ort", {}, ("model.onnx", "ops.so"), True),
        ("ort", {}, ("model.onnx", "noending"), True),
        ("eager", {}, ("model.safetensors",), True),
        ("aoti", {}, ("model.pt2",), True),
        ("trt", {}, ("model.plan",), True),
        ("someone-elses", {}, ("model.onnx",), True),
    ],
)
def test_only_runtimes_that_read_data_need_no_consent(
    manifest: Manifest, backend: str, options: dict[str, object], names: tuple[str, ...], code: bool
) -> None:
    from gpuopt.bundles.manifest import needs_consent

    found = replace(manifest, backend=BackendSpec(name=backend, options=options), files=files(*names))
    assert needs_consent(found) is code


def test_a_manifest_answers_for_roles_and_counts(manifest: Manifest) -> None:
    found = replace(manifest, files=files("model.pt2"))
    assert file_of(found, "artifact") == "model.pt2"
    assert file_of(found, "inputs") is None
    count = stored_count(found)
    assert count is not None and (count.flops, count.coverage) == (1e9, 0.99)
    assert stored_count(replace(found, flops=None)) is None
