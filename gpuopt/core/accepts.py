"""What a compiled artifact was built for -> a check of every call, because compiled code reads past its inputs instead of refusing them.

AOTInductor and CUDA graphs bake shapes, dtypes, strides and devices in: fed anything else they return wrong rows or garbage without an error.
Tensors are read by their attributes alone, so this file needs no torch and its value travels in a bundle as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpuopt.core.errors import UsageError
from gpuopt.core.live import Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedTensor:
    """One input of an artifact."""

    name: str
    dtype: str
    """Torch's name without the `torch.` prefix."""
    device: str
    shape: tuple[int | str, ...]
    """A letter is a dynamic dimension, with its range in `Accepts.ranges`; every other dimension is fixed."""
    order: tuple[int, ...] | None
    """Dimensions from the outermost in memory to the innermost, for a tensor without gaps; None where `strides` must match exactly."""
    strides: tuple[int, ...]
    """As built."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepts:
    """Every input an artifact takes, in call order: positional ones, then keywords."""

    inputs: tuple[AcceptedTensor, ...]
    positional: int
    """How many of `inputs` are positional."""
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Both ends included."""
    align_bytes: int = 1
    """Data pointers must be multiples of this: vectorised loads fault or misread otherwise."""
    any_layout: bool = False
    """Strides and alignment do not matter: inputs are copied into buffers of the artifact's own."""

    @classmethod
    def of(
        cls, inputs: Inputs, ranges: Mapping[str, Sequence[int]] | None = None, *, align_bytes: int = 1, any_layout: bool = False
    ) -> Accepts:
        """What an artifact built from these inputs may be called with. `ranges`: dynamic dimension -> (low, high).

        Raises UsageError for an input that is not a tensor, for a dynamic dimension no input has, and for one outside its own range.
        """
        dynamic = {name: (int(pair[0]), int(pair[1])) for name, pair in (ranges or {}).items()}
        bound = [*inputs.args, *inputs.kwargs.values()]
        names = input_names(inputs)
        found = []
        used: set[str] = set()
        for index, (name, tensor) in enumerate(zip(names, bound, strict=True)):
            if not _is_tensor(tensor):
                raise UsageError(f"input {name!r} is a {type(tensor).__name__}, not a tensor", fix="compiled artifacts take tensors alone")
            shape: list[int | str] = [int(d) for d in tensor.shape]
            spec = inputs.specs[index] if index < len(inputs.specs) else None
            if spec is not None and len(spec.shape) == len(shape):
                for axis, letter in enumerate(spec.shape):
                    if isinstance(letter, str) and letter in dynamic:
                        shape[axis] = letter
                        used.add(letter)
            strides = tuple(int(s) for s in tensor.stride())
            found.append(
                AcceptedTensor(
                    name=name,
                    dtype=dtype_name(tensor.dtype),
                    device=str(tensor.device),
                    shape=tuple(shape),
                    order=_dense_order(tuple(int(d) for d in tensor.shape), strides),
                    strides=strides,
                )
            )
        for letter in dynamic:
            if letter not in used:
                raise UsageError(f"no input has the dynamic dimension {letter}", fix="name it in a shape: --input 'x:float32[N,3,224,224]'")
        accepts = cls(inputs=tuple(found), positional=len(inputs.args), ranges=dynamic, align_bytes=align_bytes, any_layout=any_layout)
        accepts.check(inputs.args, inputs.kwargs)
        return accepts

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises UsageError naming the first input that differs from what was built, and how."""
        given = self._bind(args, kwargs)
        dims: dict[str, int] = {}
        for want, tensor in zip(self.inputs, given, strict=True):
            if not _is_tensor(tensor):
                raise UsageError(f"input {want.name!r} is a {type(tensor).__name__}, not a tensor", fix=f"pass {_text(want)}")
            if dtype_name(tensor.dtype) != want.dtype:
                raise UsageError(
                    f"input {want.name!r} is {dtype_name(tensor.dtype)}, this artifact was built for {want.dtype}",
                    fix=f"cast it to {want.dtype}, or build for {dtype_name(tensor.dtype)}",
                )
            if str(tensor.device) != want.device:
                raise UsageError(
                    f"input {want.name!r} is on {tensor.device}, this artifact runs on {want.device}", fix=f"move it to {want.device}"
                )
            self._check_shape(want, tensor.shape, dims)
            if not self.any_layout:
                self._check_layout(want, tensor)

    def strides(self, index: int, shape: Sequence[int]) -> tuple[int, ...]:
        """Strides that input `index` must have at this shape."""
        want = self.inputs[index]
        return want.strides if want.order is None else _strides(shape, want.order)

    def shape(self, index: int, dims: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """A shape of input `index`: `dims` for the dynamic dimensions, their highest value where not given."""
        return tuple((dims or {}).get(d, self.ranges[d][1]) if isinstance(d, str) else d for d in self.inputs[index].shape)

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        if len(args) != self.positional:
            names = ", ".join(t.name for t in self.inputs[: self.positional]) or "none"
            raise UsageError(
                f"{len(args)} positional inputs were given, this artifact takes {self.positional}: {names}", fix=f"call it with {self}"
            )
        keywords = self.inputs[self.positional :]
        for want in keywords:
            if want.name not in kwargs:
                raise UsageError(f"input {want.name!r} is missing", fix=f"call it with {self}")
        if len(kwargs) != len(keywords):
            known = {t.name for t in keywords}
            extra = next(k for k in kwargs if k not in known)
            raise UsageError(f"there is no input {extra!r}", fix=f"call it with {self}")
        return [*args, *(kwargs[want.name] for want in keywords)]

    def _check_shape(self, want: AcceptedTensor, shape: Sequence[int], dims: dict[str, int]) -> None:
        if len(shape) != len(want.shape):
            raise UsageError(
                f"input {want.name!r} has {len(shape)} dimensions, this artifact takes {_text(want)}", fix=f"pass {_text(want)}"
            )
        for axis, (built, size) in enumerate(zip(want.shape, shape, strict=True)):
            if isinstance(built, int):
                if size != built:
                    raise UsageError(
                        f"input {want.name!r} has shape {_shape(shape)}: dimension {axis} was built for {built} alone",
                        fix=f"pass {_text(want)}, or build with a range: --dim NAME=MIN:USUAL:MAX",
                    )
                continue
            low, high = self.ranges[built]
            if not low <= size <= high:
                raise UsageError(
                    f"input {want.name!r} has shape {_shape(shape)}: dimension {built} is {size}, built for {low} to {high}",
                    fix=f"stay inside the range, or build with --dim {built}={min(low, size)}:{size}:{max(high, size)}",
                )
            if dims.setdefault(built, size) != size:
                raise UsageError(
                    f"input {want.name!r} has {built}={size}, an input before it has {built}={dims[built]}",
                    fix=f"give every input the same {built}",
                )

    def _check_layout(self, want: AcceptedTensor, tensor: Any) -> None:
        strides = tensor.stride()
        wanted = want.strides if want.order is None else _strides(tensor.shape, want.order)
        for size, got, need in zip(tensor.shape, strides, wanted, strict=True):
            if size > 1 and got != need:
                raise UsageError(
                    f"input {want.name!r} has strides {_shape(strides)}, this artifact was built for {_shape(wanted)}",
                    fix=f"bring it into the layout it was built in ({_layout(want)}) before the call",
                )
        if self.align_bytes > 1 and tensor.data_ptr() % self.align_bytes:
            raise UsageError(
                f"input {want.name!r} starts at an address that is not a multiple of {self.align_bytes} bytes",
                fix="clone() it: a slice of a larger tensor cannot be read with wide loads",
            )

    def __str__(self) -> str:
        parts = [f"{'' if i < self.positional else t.name + '='}{_text(t)}" for i, t in enumerate(self.inputs)]
        return "(" + ", ".join(parts) + ")"


def input_names(inputs: Inputs) -> list[str]:
    """One name for each tensor, args then kwargs: the specs' own, `input_0`, … where there is none."""
    names = []
    for index in range(len(inputs.args)):
        spec = inputs.specs[index] if index < len(inputs.specs) else None
        names.append(spec.name if spec is not None and spec.name else f"input_{index}")
    return [*names, *inputs.kwargs]


def device_of(inputs: Inputs) -> str:
    """Where the first tensor lives, `cpu` where there is none."""
    found = (str(value.device) for value in (*inputs.args, *inputs.kwargs.values()) if _is_tensor(value))
    return next(found, "cpu")


def dtype_name(dtype: Any) -> str:
    """`torch.float16` -> `float16`."""
    return str(dtype).removeprefix("torch.")


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "stride") and hasattr(value, "device")


def _dense_order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """The memory order of a tensor that covers its storage without gaps or overlaps; None for an expanded or sliced one."""
    order = tuple(sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis)))
    expected = _strides(shape, order)
    dense = all(size <= 1 or got == need for size, got, need in zip(shape, strides, expected, strict=True))
    return order if dense else None


def _strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    found = [1] * len(shape)
    step = 1
    for axis in reversed(order):
        found[axis] = step
        step *= max(int(shape[axis]), 1)
    return tuple(found)


def _layout(want: AcceptedTensor) -> str:
    if want.order is None:
        return f"strides {_shape(want.strides)}"
    if want.order == tuple(range(len(want.shape))):
        return "contiguous"
    return "channels_last" if want.order == (0, 2, 3, 1) else f"dimension order {_shape(want.order)}"


def _shape(shape: Sequence[Any]) -> str:
    return "[" + ",".join(str(d) for d in shape) + "]"


def _text(want: AcceptedTensor) -> str:
    return f"{want.dtype}{_shape(want.shape)}"
