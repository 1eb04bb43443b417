"""gpuopt::attend_one against attention in fp64, and what its kernel is given."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gpuopt.programs.ops import attend_one as op


def drawn(*, batch=2, heads=8, held=2, length=37, width=16, values=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = ((batch, heads, 1, width), (batch, held, length, width), (batch, held, length, values))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def masks(batch=2, heads=8, length=37):
    seen = torch.arange(length)[None, None, None] <= torch.tensor([20, 5])[:batch, None, None, None]
    return {
        "none": None,
        "seen": seen,
        "seen by all": seen[:1],
        "added": torch.zeros(batch, 1, 1, length).masked_fill(~seen, float("-inf")),
        "a bias a head": torch.randn(1, heads, 1, length, generator=torch.Generator().manual_seed(1)),
    }


def exact(query, key, value, mask, scale):
    spread = [t.double().repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value)]
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return F.scaled_dot_product_attention(query.double(), *spread, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("held", [8, 2, 1])
@pytest.mark.parametrize("kind", masks())
def test_it_is_attention(held, kind):
    call = (*drawn(held=held, values=24), masks()[kind], 0.3)
    found = op.attend_one(*call)
    assert found.shape == (2, 1, 8, 24)
    torch.testing.assert_close(found.double(), exact(*call), rtol=1e-5, atol=1e-5)


def test_halves_are_rounded_once():
    call = (*drawn(dtype=torch.bfloat16), None, 0.25)
    found, wanted = op.attend_one(*call), exact(*call)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - wanted).norm() / wanted.norm()) < 2.0**-8


def test_a_tracer_is_told_the_shape():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        call = [mode.from_tensor(t) for t in drawn(values=24)]
        assert op.attend_one(*call, None, 1.0).shape == (2, 1, 8, 24)


@pytest.mark.parametrize("kind", ["cpu", *masks()])
def test_what_the_kernel_takes(kind, monkeypatch):
    """On fakes of a GPU's tensors, with which a step is traced."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    where = "cpu" if kind == "cpu" else "cuda"

    def like(t, *shape, dtype=torch.float16, strides=None):
        made = (
            torch.empty(shape or t.shape, dtype=dtype) if strides is None else torch.empty_strided(shape or t.shape, strides, dtype=dtype)
        )
        return torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device=where)

    with FakeTensorMode():
        query, key, value = (like(t) for t in drawn())
        mask = masks().get(kind)
        if mask is not None:
            mask = like(mask, dtype=mask.dtype)
        assert op.takes(query, key, value, mask) == (where == "cuda")
        assert not op.takes(*(like(t, dtype=torch.float32) for t in (query, key, value)), mask)
        assert not op.takes(like(query, 2, 8, 4, 16), key, value, mask)
        assert not op.takes(query, like(key, strides=(2368, 1184, 32, 2)), value, mask), "gaps between elements"
        assert not op.takes(like(query, strides=(256, 32, 32, 2)), key, value, mask)
        assert not op.takes(query, like(key, 2, 3, 37, 16), value, mask)
        if mask is not None:
            assert not op.takes(query, key, value, like(mask, *mask.shape[:3], 36, dtype=mask.dtype))
        monkeypatch.setattr(op, "MOST_KEYS", 36)
        assert not op.takes(query, key, value, mask)
