"""`gpuopt::gated_matvec`: a gated layer's first half, act(row · gateᵀ) · (row · upᵀ), in one launch; on a GPU a Triton kernel.

Both matrices are read in the launch that `gpuopt::matvecs` would read them in, and what follows costs no kernel of its own. It rounds where the unfused operators do: each product,
the activation of the first, and what they make together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from gpuopt.programs.ops import matvec

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""Name -> activation, elementwise."""

torch.library.define(
    "gpuopt::gated_matvec", "(Tensor input, Tensor gate, Tensor up, str act) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def gated_matvec(input: Tensor, gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(input · gateᵀ) * (input · upᵀ), [..., N]; input [..., K] of one row, gate and up [N, K], act a name of ACTS."""
    result: Tensor = torch.ops.gpuopt.gated_matvec(input, gate, up, act)
    return result


def composite(input: Tensor, gate: Tensor, up: Tensor, act: str) -> Tensor:
    """The definition, in ATen's own ops: what a CPU runs, and a GPU for what the kernel does not take."""
    return ACTS[act](F.linear(input, gate)) * F.linear(input, up)


def _on_cuda(input: Tensor, gate: Tensor, up: Tensor, act: str) -> Tensor:
    is_aligned = all(t.data_ptr() % matvec._ALIGNED == 0 for t in (input, gate, up))
    if not (is_aligned and act in ACTS and gate.shape == up.shape and matvec.takes(input, gate) and matvec.takes(input, up)):
        return composite(input, gate, up, act)
    from gpuopt.programs.ops import gated_matvec_triton  # Triton comes with torch for GPUs alone

    return gated_matvec_triton.run(input, gate, up, act)


def _fake(input: Tensor, gate: Tensor, up: Tensor, act: str) -> Tensor:
    return input.new_empty((*input.shape[:-1], gate.shape[0]))


torch.library.impl("gpuopt::gated_matvec", "CPU", composite)
torch.library.impl("gpuopt::gated_matvec", "CUDA", _on_cuda)
torch.library.register_fake("gpuopt::gated_matvec", _fake)
