"""A tape on which host and device share one clock, so that waits, gaps and overlaps come out as they would on a machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from builders import US, Tape

GEMM = "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT"
COPY = (
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)"
    "::{lambda()#3}::operator()() const::{lambda()#10}::operator()() const::{lambda(c10::Half)#1}>(at::TensorIteratorBase&)"
)
ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>, std::array<char*, 3ul> >(int)"


class Played(Tape):
    """Kernels start once they are launched and the stream is free; a wait ends when the stream is."""

    def op(self, name: str, *, dur_ns: int = 10 * US, module: str | None = None, parent: int | None = None, **more: Any) -> int:
        """As a tape's, inside another op where `parent` says so."""
        index = super().op(name, dur_ns=dur_ns, module=module, **more)
        self.ops[index] = replace(self.ops[index], parent=parent)
        return index

    def run(self, op: str, kernel: str, dur_ns: int, *, host_ns: int = 5 * US, module: str | None = None, **more: Any) -> None:
        """An op that takes `host_ns` on the host and launches one kernel at its end."""
        grid = {name: more.pop(name) for name in ("grid", "block", "registers", "shared_bytes") if name in more}
        index = self.op(op, dur_ns=host_ns, module=module, **more)
        self.kernel(kernel, dur_ns, gap_ns=max(0, self.host_ns - self.device_ns), op=index, **grid)

    def move(self, kind: str, num_bytes: int, dur_ns: int, *, op: int | None = None, memory: str = "pinned") -> None:
        """A transfer on the same stream."""
        self.device_ns = max(self.device_ns, self.host_ns)
        self.copy(kind, num_bytes, dur_ns, memory=memory, op=op)

    def wait(self, name: str = "cudaStreamSynchronize", *, op: int | None = None) -> None:
        """The host waits until the device has done all."""
        self.call(name, "sync", max(US, self.device_ns - self.host_ns), op=op)

    def read(self, name: str = "aten::item", *, module: str | None = None) -> None:
        """`.item()`: a copy of four bytes and a wait, inside an op."""
        outer = self.op(name, dur_ns=0, module=module)
        index = self.op("aten::_local_scalar_dense", dur_ns=0, module=module, parent=outer)
        self.move("d2h", 4, 2 * US, op=index)
        self.wait(op=index)

    @property
    def ms(self) -> float:
        """Its length."""
        return max(self.host_ns, self.device_ns) / 1e6
