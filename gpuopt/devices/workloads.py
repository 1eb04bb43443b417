"""What ceilings are measured with: matrix products of random numbers, passes over buffers larger than the caches, copies between host and device.

Always random data: products of zeros toggle fewer wires and run measurably faster than anything a model will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Shape = tuple[int, int, int]
"""M, N, K of C[M,N] = A[M,K] B[K,N]."""

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One call and how much it does: FLOPs, or bytes read and written."""

    call: Callable[[], object]
    amount: float


def gemm(quantity: str, shape: Shape, device_id: str) -> Work:
    """A product as `nn.Linear` asks for it (B transposed in memory). `fp8` is scaled per tensor, `fp8_row` per row; both accumulate fast and give bf16."""
    m, n, k = shape
    generator = torch.Generator(device_id).manual_seed(0)

    def draw(rows: int) -> torch.Tensor:
        return torch.randn(rows, k, dtype=torch.float32, device=device_id, generator=generator)

    amount = 2.0 * m * n * k
    if quantity in DTYPES:
        a, b = draw(m).to(DTYPES[quantity]), draw(n).to(DTYPES[quantity]).t()
        out = torch.empty(m, n, dtype=a.dtype, device=device_id)
        return Work(call=lambda: torch.mm(a, b, out=out), amount=amount)
    if quantity == "int8":
        ints = [(draw(rows) * 40).clamp(-127, 127).to(torch.int8) for rows in (m, n)]
        return Work(call=lambda: torch._int_mm(ints[0], ints[1].t()), amount=amount)
    small = [draw(rows).to(torch.float8_e4m3fn) for rows in (m, n)]
    scales = [torch.ones(s, device=device_id) for s in (((m, 1), (1, n)) if quantity == "fp8_row" else ((), ()))]
    return Work(
        call=lambda: torch._scaled_mm(
            small[0], small[1].t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        amount=amount,
    )


def gemm_bytes(quantity: str, shape: Shape) -> int:
    """Device memory that `gemm` needs at its peak, the fp32 draw among it."""
    m, n, k = shape
    return 4 * (m * k + n * k) + 8 * (m * k + n * k + m * n)


def passes(num_bytes: int, device_id: str) -> dict[str, Work]:
    """`read` (a sum), `copy` and `inplace` over fp32 buffers of `num_bytes` each."""
    numel = num_bytes // 4
    x = torch.rand(numel, dtype=torch.float32, device=device_id)
    y = torch.empty_like(x)
    return {
        "read": Work(call=lambda: torch.sum(x), amount=4.0 * numel),
        "copy": Work(call=lambda: y.copy_(x), amount=8.0 * numel),
        "inplace": Work(call=lambda: y.neg_(), amount=8.0 * numel),
    }


def transfers(num_bytes: int, device_id: str) -> dict[str, Work]:
    """`h2d` and `d2h` from pinned memory, and the same from pageable memory, which hold the host up."""
    on_device = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device_id)
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    pageable = torch.empty(num_bytes, dtype=torch.uint8)
    pinned.copy_(on_device)
    pageable.copy_(pinned)
    amount = float(num_bytes)
    return {
        "h2d": Work(call=lambda: on_device.copy_(pinned, non_blocking=True), amount=amount),
        "d2h": Work(call=lambda: pinned.copy_(on_device, non_blocking=True), amount=amount),
        "h2d_pageable": Work(call=lambda: on_device.copy_(pageable), amount=amount),
        "d2h_pageable": Work(call=lambda: pageable.copy_(on_device), amount=amount),
    }


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether fp32 products may go through tensor cores in TF32, put back afterwards.

    By the old switch, which sets the new one (`fp32_precision`) with it; the other way round, reading the old one raises (torch 2.9 to 2.13).
    """
    before = torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
