"""A Candidate and its Model -> what is asked for, in the words of backends, bundles and reports: precision, dynamic ranges, transforms. Pure."""

from __future__ import annotations

from pathlib import Path

from gpuopt.core.live import Model
from gpuopt.core.spec import Candidate, Precision, Transforms


def layer_flops(path: Path | None, candidate: Candidate) -> dict[str, tuple[float | None, str]]:
    """FLOPs and dtype of each node of an ONNX file, for a backend's audit."""
    from gpuopt.profiling import count_onnx

    assert path is not None
    return dict(count_onnx.layer_flops(path, dict(candidate.dims)))


def own_precision(model: Model) -> Precision:
    """The precision a model has as it was loaded. fp32 means TF32 off: the flag that says otherwise is --precision tf32."""
    for precision in (Precision.FP32, Precision.FP16, Precision.BF16, Precision.FP64):
        if model.dtype == precision.dtype:
            return precision
    return Precision.FP32


def dynamic_ranges(candidate: Candidate) -> dict[str, tuple[int, int]]:
    """Dimensions a build must accept a range of: those written `NAME=MIN:USUAL:MAX`."""
    found: dict[str, tuple[int, int]] = {}
    for dim in candidate.inputs.dims:
        if dim.low is not None and dim.high is not None:
            found[dim.name] = (dim.low, dim.high)
    return found


def describe_transforms(transforms: Transforms) -> tuple[str, ...]:
    """Transforms in the words of the report."""
    names = []
    if transforms.channels_last:
        names.append("channels_last")
    if transforms.fold_batch_norm:
        names.append("fold_batch_norm")
    names += transforms.rewrites
    names += [f"keep_fp32:{name}" for name in transforms.keep_fp32]
    return tuple(names)
