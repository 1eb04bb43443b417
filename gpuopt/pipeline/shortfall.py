"""A half precision that was not kept everywhere -> was it plain eager that widened it already? Then whoever keeps as much has done what was asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision

HALVES = (Precision.FP16, Precision.BF16)
SLACK = 0.005
"""Of the FLOPs, below what eager keeps."""
LEAST = 0.75
"""Of eager's own FLOPs: with less, the name of the precision would be wrong for it too."""


def judged(audit: PrecisionAudit, eager: Callable[[], PrecisionAudit | None]) -> PrecisionAudit:
    """The audit, honoured where it misses its threshold by no more than eager does: PyTorch's own attention multiplies halves as fp32 where no fused kernel takes its mask.

    eager: the audit of the same module in the same precision, called as it is; asked for only where it can matter.
    """
    wanted = next((precision.dtype for precision in HALVES if precision.value == audit.requested), None)
    if audit.honoured or wanted is None or audit.shares.get(wanted, 0.0) < LEAST:
        return audit
    theirs = eager()
    kept = theirs.shares.get(wanted, 0.0) if theirs is not None else 1.0
    share = audit.shares[wanted]
    if kept < LEAST or share < kept - SLACK:
        return audit
    return replace(
        audit, honoured=True, reason=f"{share:.2%} of FLOPs run in {wanted}; plain eager, whose code widens the rest, keeps {kept:.2%}"
    )
