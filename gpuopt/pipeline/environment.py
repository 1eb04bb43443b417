"""Versions and settings a figure depends on -> Environment. No paths, no host names."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from gpuopt._version import __version__
from gpuopt.core.result import Environment

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "numpy",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "torchvision",
    "torchaudio",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13-bindings",
    "torch-tensorrt",
    "torchao",
    "nvidia-ml-py",
)

FLAG_PREFIXES = (
    "TORCHINDUCTOR_",
    "TORCH_",
    "CUDA_",
    "CUBLAS",
    "CUDNN",
    "NVIDIA_TF32",
    "PYTORCH_",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "AOTI_",
)
OURS = ("AOTI_RUNTIME_CHECK_INPUTS",)
"""Set by gpuopt itself in every child: no news to anybody."""
PRIVATE = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "TORCH_HOME")
"""Variables whose value is a path of this machine."""


def describe() -> Environment:
    """Raises nothing: a package that is not installed is simply absent."""
    import torch

    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return Environment(
        gpuopt=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages=packages,
        cuda=torch.version.cuda,
        cudnn=str(cudnn) if cudnn else None,
        flags={
            k: v
            for k, v in sorted(os.environ.items())
            if k.startswith(FLAG_PREFIXES) and k not in PRIVATE and k not in OURS and "/" not in v
        },
    )
