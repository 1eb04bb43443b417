"""Two tokens decoded with a cache that grows by torch.cat, and with one written in place."""

from __future__ import annotations

from builders import US, evidence
from playing import GEMM, Played

from gpuopt.doctor.evidence import Evidence

CODE = "GPU109"
CAT = (
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<at::native::(anonymous namespace)::OpaqueType<2u>, unsigned int, 4, 128, 1>"
    "(at::native::(anonymous namespace)::OpaqueType<2u>*)"
)
PUT = "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<at::native::index_copy_kernel_impl<at::native::OpaqueType<2> >()>"
LAYERS, LENGTH, CAT_US = 8, 4096, 40


def step(*, grows: bool) -> Played:
    tape = Played()
    for token in range(2):
        for layer in range(LAYERS):
            module = f"model.layers.{layer}.self_attn"
            tape.run("aten::mm", GEMM, 60 * US, module=f"{module}.q_proj")
            for _ in ("key", "value"):
                new, cache = (8, 32, 1, 128), (8, 32, LENGTH + token, 128)
                if grows:
                    tape.run("aten::cat", CAT, CAT_US * US, module=module, shapes=(cache, new))
                else:
                    tape.run("aten::index_copy_", PUT, 3 * US, module=module, shapes=(cache, (1,), new))
    tape.wait("cudaDeviceSynchronize")
    return tape


def bad() -> Evidence:
    return evidence(step(grows=True))


def clean() -> Evidence:
    return evidence(step(grows=False))


GAIN_MS = step(grows=True).ms - step(grows=False).ms
