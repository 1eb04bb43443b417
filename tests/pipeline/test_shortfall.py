"""A precision that eager itself does not keep everywhere is nobody's fault; one that only the backend lost still is."""

from __future__ import annotations

from typing import Any

import pytest

from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision
from gpuopt.pipeline import facts, shortfall
from gpuopt.pipeline.session import Session


def audit(half: float, *, honoured: bool = False, requested: str = "fp16") -> PrecisionAudit:
    return PrecisionAudit(shares={"float16": half, "float32": 1 - half}, method="test", honoured=honoured, requested=requested)


@pytest.mark.parametrize(
    ("mine", "eagers", "honoured"),
    [
        (0.98, 0.98, True),
        (0.98, 1.0, False),  # a compiler sent attention through fp32
        (0.92, 0.98, False),
        (0.985, 0.98, True),
        (0.3, 0.3, False),  # the name would be wrong for eager too
        (0.0, 0.0, False),
    ],
)
def test_who_keeps_as_much_as_eager_has_kept_what_was_asked(mine: float, eagers: float, honoured: bool) -> None:
    found = shortfall.judged(audit(mine), lambda: audit(eagers))
    assert found.honoured is honoured
    assert ("eager" in found.reason) is honoured


def test_eager_is_asked_only_where_it_can_matter() -> None:
    def never() -> Any:
        raise AssertionError("eager was asked")

    for one in (audit(1.0, honoured=True), audit(0.98, requested="fp8"), audit(0.98, requested="fp32"), audit(0.1)):
        assert shortfall.judged(one, never) is one


def test_without_an_audit_of_eager_the_threshold_stands() -> None:
    assert not shortfall.judged(audit(0.98), lambda: None).honoured


def test_a_model_whose_own_code_widens_products_runs_in_half_precision(tools: Any, tmp_path: Any) -> None:
    path = tmp_path / "widens.py"
    path.write_text(
        "import torch\nfrom torch import nn\n\n\nclass Widens(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.large, self.small = nn.Linear(64, 64 * 19), nn.Linear(64, 64)\n\n"
        "    def forward(self, x):\n        wide = nn.functional.linear(x.float(), self.small.weight.float())\n"
        "        return self.large(x).sum(-1, keepdim=True) + wide.to(x.dtype)\n\n\n"
        "def build():\n    return Widens().eval()\n\n\nbuild.input_specs = ('x:float32[N,64]',)\n"
    )
    session = Session()
    session.load(tools.candidate(f"{path}:build", precision=Precision.BF16.value, N=4))
    built: facts.Built = session.build()
    session.close()
    assert built.audit is not None and built.audit.honoured and "plain eager" in built.audit.reason
    assert built.audit.shares["bfloat16"] == pytest.approx(0.95, abs=0.01)
