"""Name -> the module that turns a Model into a Runner. Light: nothing is imported before it is asked for."""

from __future__ import annotations

from types import ModuleType

from gpuopt.core.registry import resolve

BACKENDS = {
    "eager": "gpuopt.backends.eager",
    "inductor": "gpuopt.backends.inductor",
    "cudagraphs": "gpuopt.backends.cudagraphs",
    "aoti": "gpuopt.backends.aoti",
    "ort": "gpuopt.backends.ort",
    "trt": "gpuopt.backends.trt",
    "torch-trt": "gpuopt.backends.torch_trt",
    "null": "gpuopt.backends.null",
}

EXTRAS = {"ort": "onnx", "trt": "trt", "torch-trt": "torch-trt"}
"""Pip extra that brings the library of a backend, where torch alone is not enough."""

INTERNAL = frozenset({"null"})
"""For tests: they work when asked for by name, and no list shows them."""

SUMMARY = {
    "eager": "PyTorch as it is: what every other backend is measured against",
    "inductor": "torch.compile; presets graphed, reduce-overhead, max-autotune, freezing and their combinations",
    "cudagraphs": "eager captured once into a CUDA graph and replayed",
    "aoti": "AOTInductor: compiled ahead of time into a package that loads without the model's code",
    "ort": "ONNX Runtime, CPU or CUDA provider, inputs and outputs bound on the device",
    "trt": "TensorRT engine built from ONNX",
    "torch-trt": "TensorRT through torch_tensorrt's own compiler",
    "null": "a fake that sleeps, fails, crashes or lies when told to; for tests",
}


def listed() -> tuple[str, ...]:
    """Names for users to choose from."""
    return tuple(name for name in BACKENDS if name not in INTERNAL)


def load_backend(name: str) -> ModuleType:
    """The backend's module. Raises UsageError for an unknown name, Unavailable when its library is missing."""
    table = BACKENDS if name in BACKENDS else {known: BACKENDS[known] for known in listed()}
    module: ModuleType = resolve(table, name, kind="backend", extra=EXTRAS.get(name))
    return module
