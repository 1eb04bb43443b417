"""Verifying a candidate whose attention kernel exists in fp16 and bf16 alone, as on a GPU: its structure is that of the same changes without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpuopt.converters import rewrites
from gpuopt.converters.rewrites import implementations
from gpuopt.core.errors import Unsupported
from gpuopt.core.spec import BackendSpec, Candidate, DimSpec, InputSpec, ModelRef, Precision, Tolerance, Transforms
from gpuopt.pipeline.session import Session

TEXTS = ("no_mask", "attention:flash", "fuse_linears")


def test_what_has_an_fp32_form_is_a_matter_of_the_device() -> None:
    assert rewrites.in_fp32(TEXTS, "cpu") == (TEXTS, ())
    assert rewrites.in_fp32(TEXTS, "cuda:0") == (("no_mask", "fuse_linears"), ("attention:flash",))
    assert rewrites.in_turn(TEXTS) == ("no_mask", "fuse_linears", "attention:flash")
    assert rewrites.in_turn(("attention:math", "no_mask")) == ("attention:math", "no_mask")
    assert rewrites.in_fp32(("attention:efficient", "attention:cudnn"), "cuda") == (("attention:efficient",), ("attention:cudnn",))


@pytest.mark.parametrize("texts", [TEXTS, ("attention:flash",)])
def test_the_structure_is_run_without_a_kernel_that_has_no_fp32_form_and_this_is_said(
    monkeypatch: pytest.MonkeyPatch, texts: tuple[str, ...]
) -> None:
    """Where nothing is left to run, there is no stage that passed."""
    known, allowed, computed = rewrites.in_fp32, implementations._refuse, []

    def refuse(kernel: str, device: str, query: torch.Tensor, value: torch.Tensor, mask: Any) -> None:
        """As on a GPU."""
        if query.dtype == torch.float32:
            raise Unsupported(f"the {kernel} attention kernel computes in fp16 and bf16, not float32", fix="another kernel")
        computed.append(query.dtype)
        allowed(kernel, device, query, value, mask)

    monkeypatch.setattr(implementations, "_refuse", refuse)
    monkeypatch.setattr(rewrites, "in_fp32", lambda texts, device: known(texts, "cuda"))
    candidate = Candidate(
        model=ModelRef(text="gpuopt.models:bert_large_tiny"),
        inputs=InputSpec(dims=(DimSpec(name="N", values=(2,)), DimSpec(name="S", values=(8,)))),
        dims={"N": 2, "S": 8},
        precision=Precision.BF16,
        backend=BackendSpec(name="eager"),
        transforms=Transforms(rewrites=texts),
        device="cpu",
    )
    session = Session()
    session.load(candidate)
    session.build()
    accuracy = session.verify(Tolerance(), "full").accuracy
    session.close()
    assert accuracy.passed, accuracy.reason
    assert ("structure" in [stage.name for stage in accuracy.stages]) == (texts is TEXTS)
    said = "run without attention:flash, which has no fp32 form" if texts is TEXTS else "not run, attention:flash has no fp32 form"
    assert any(note.startswith(f"structure: {said}") for note in accuracy.notes)
    assert set(computed) == {torch.bfloat16}
