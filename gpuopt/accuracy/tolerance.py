"""A precision -> how much error a correct candidate may show, and why.

The yardstick is never a fixed rtol: a correct bf16 transformer is inside `assert_close` for a quarter to a half of its elements, and cosine > 0.99
passes every seeded bug (measuring.md D.2). It is the error plain eager makes at the same dtype against the same fp64 reference.
"""

from __future__ import annotations

from dataclasses import fields, replace

from gpuopt.core.spec import Precision, Tolerance

_UNIT_ROUNDOFF = {
    Precision.TF32: 2.0**-11,
    Precision.FP16: 2.0**-11,
    Precision.BF16: 2.0**-8,
}
"""Half a unit in the last place: what rounding one result costs at most. A candidate that computed exactly would still have this error, and an
eager twin may be lucky on an output it hardly touched, so it is the floor of stage 2."""

APPROXIMATION_FLOOR = 1e-3
"""Structure floor of a declared approximation; tanh GELU for erf GELU is 2.7e-4 of RMS over six layers, 871 times eager fp32's ratio limit aside."""

SNR_DB = {Precision.W8: 23.0, Precision.INT8: 20.0, Precision.FP8: 17.0, Precision.W4: 8.0}
"""Quantised candidates have no eager twin. int8 weights reach 26 dB, dynamic fp8 by row on a random BERT-large 18 dB; 20 dB is 10% relative error.
w8 rounds one operand of each product where int8 rounds both: half the noise power, 3 dB more are asked of it.
w4 leaves 20 dB of normal weights in groups of 128 (a step is a fifteenth of a group's range). Beside fp8 in one random model it is 5 dB lower after a few layers and 9 dB lower after
24 layers of a BERT (17 dB and 26 dB at its pooler), so 9 dB less are asked of it. That guards against broken scales; what an answer is worth is for `--metric` to say."""


def default(precision: Precision | None, *, approximate: bool = False) -> Tolerance:
    """Limits for a candidate of this precision; None is fp32. `approximate` when its transform declares an approximation."""
    precision = precision or Precision.FP32
    # Eager fp32 and a correct fp32 rewrite differ by summation order alone: 2. Lower precisions also differ in where they round: 3
    # (torch._dynamo.utils.same uses the same two).
    ratio = 2.0 if precision in (Precision.FP32, Precision.FP64) else 3.0
    floor = _UNIT_ROUNDOFF.get(precision, 1e-6)
    return Tolerance(
        structure_ratio=3.0,
        structure_floor=APPROXIMATION_FLOOR if approximate else 1e-4,
        precision_ratio=ratio,
        # In fp32 both stages look at the same outputs: what the one allows, the other cannot refuse.
        precision_floor=max(floor, APPROXIMATION_FLOOR) if approximate and floor == 1e-6 else floor,
        min_snr_db=SNR_DB.get(precision),
    )


def merged(precision: Precision | None, asked: Tolerance, *, approximate: bool = False) -> Tolerance:
    """Defaults for the precision, with every field of `asked` that differs from a plain Tolerance() put over them."""
    plain = Tolerance()
    changed = {f.name: getattr(asked, f.name) for f in fields(Tolerance) if getattr(asked, f.name) != getattr(plain, f.name)}
    return replace(default(precision, approximate=approximate), **changed)
