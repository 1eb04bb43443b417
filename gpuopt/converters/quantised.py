"""nn.Module + fp8, int8, w8 or w4 -> the same module with quantised linear layers, in place: the weights are quantised here, once, from the values they came with.

Plain modules over plain ATen ops: they export, compile, copy and save like any other, and whoever counts FLOPs or audits dtypes sees `_scaled_mm` and `_int_mm`.
A value is `q * scale` (of w4: see int4.py): `q` in [-448, 448] for float8_e4m3fn, in [-127, 127] for int8, `scale` the row's largest magnitude over that limit, in fp32.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpuopt.converters import int4, precision
from gpuopt.core.errors import Unsupported
from gpuopt.core.spec import Precision

FP8_MAX = 448.0
"""Largest float8_e4m3fn; torch's conversion does not saturate, beyond it lies NaN."""
INT8_MAX = 127.0
"""Symmetric: -128 stays unused, so that a row and its negative quantise alike."""
SMALLEST = 2.0**-100
"""The least magnitude a scale is made of: a row of zeros gets a scale that is no zero, and 1/scale stays finite in fp32."""
MIN_FEATURES = 32
"""Narrower layers stay: quantising their input costs more than the product."""
MIN_SHARE = 0.5
"""Of the weights that products use, as many must be quantised, or the model is not what its name says."""
LARGEST_INT8_SUM = (2**31 - 1) // (127 * 127)
"""Products of that many int8 pairs may leave int32."""
STEP = {Precision.FP8: (16, 16), Precision.INT8: (8, 8), Precision.W8: (1, 1), Precision.W4: (int4.OUT_STEP, int4.IN_STEP)}
"""[out, in] of a weight must be multiples: what `_scaled_mm`, `_int_mm` and `_weight_int4pack_mm` ask for on a GPU (ScaledBlas.cpp, Blas.cpp, int4mm.cu). Kept to on a CPU,
so that what was verified there is what runs here."""
SMALLEST_INT_MM = {"cuda": 17}
"""Rows that `_int_mm` needs at least, by device; fewer are padded with zeros, which costs nothing where a compiler fuses them into the quantisation."""
SHOWN = 3

_DTYPE = {Precision.FP8: torch.float8_e4m3fn, Precision.INT8: torch.int8, Precision.W8: torch.int8}
_COUNTED = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
"""Modules whose weights products use, whether those can be quantised or not."""


def scales(x: Tensor, limit: float, *, by_row: bool = True) -> Tensor:
    """[..., K] -> fp32 scales [..., 1], or one [] of the whole. NaN in a row makes its scale NaN, infinity makes it infinite: neither ends in a finite number."""
    magnitude = x.abs().amax(-1, keepdim=True) if by_row else x.abs().amax()
    return magnitude.to(torch.float32).clamp(min=SMALLEST) / limit


def quantised(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in `dtype`, rounded to nearest even and saturated."""
    # One division a row instead of one an element: a GPU divides in ten times the instructions of a product, and the difference is a unit in the last place of fp32.
    scaled = x.to(torch.float32) * (1.0 / scale)
    if dtype == torch.int8:
        return scaled.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    # The product may round the row's own maximum past the limit, where the conversion would give NaN.
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(dtype)


class EightBitLinear(nn.Module):
    """y = x Wᵀ + b with W [out, in] stored as `weight_q` (float8_e4m3fn or int8) times `scale`, fp32 [out, 1] or [1, 1]; x and y [..., features] in the carrier.

    `weight` answers code that reads it past the layer, as T5 asks `wo` for its dtype: dequantised anew each time, and dropped by a compiler where nothing uses it.
    """

    limit = INT8_MAX
    dtype = torch.int8
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, carrier: torch.dtype, *, by_row: bool = True) -> None:
        """`weight`: [out, in], any floating dtype; `bias` [out] or None."""
        super().__init__()
        self.out_features, self.in_features = (int(n) for n in weight.shape)
        self.carrier = carrier
        self.by_row = by_row
        with torch.no_grad():
            scale = scales(weight, self.limit, by_row=by_row)
            # A parameter, as weights are, though an integer: buffers of integers count as state, not as bytes that every call reads.
            self.weight_q = nn.Parameter(quantised(weight, scale, self.dtype).contiguous(), requires_grad=False)
            self.register_buffer("scale", scale.reshape(-1, 1).contiguous())
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """W again, in the carrier."""
        return (self.weight_q.to(torch.float32) * self.scale).to(self.carrier)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.reshape(-1, self.in_features)
        return self.product(rows).reshape(*x.shape[:-1], self.out_features)

    def product(self, rows: Tensor) -> Tensor:
        """[M, in] -> [M, out]."""
        raise NotImplementedError

    def finish(self, sums: Tensor, scale: Tensor | None) -> Tensor:
        """Sums of quantised products [M, out] -> the carrier, with both scales and the bias in fp32. The weight's scale first: with the input's a product
        of ordinary size could leave fp32 on the way."""
        wide = sums.to(torch.float32) * self.scale.reshape(1, -1)
        if scale is not None:
            wide = wide * scale
        bias = self.bias
        return (wide if bias is None else wide + bias.to(torch.float32)).to(self.carrier)

    def extra_repr(self) -> str:
        """As nn.Linear shows itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, by {'row' if self.by_row else 'tensor'}"


class Fp8Linear(EightBitLinear):
    """Inputs quantised by row (or whole) in every call, products in float8_e4m3fn, sums in fp32 (with fast accumulation), bias and scales inside the kernel.

    On anything but a GPU the same product by unit scales, and the scales after it: a CPU's `_scaled_mm` knows no scales by row before torch 2.12.
    """

    limit = FP8_MAX
    dtype = torch.float8_e4m3fn

    def product(self, rows: Tensor) -> Tensor:
        """[M, in] -> [M, out]."""
        scale = scales(rows, self.limit, by_row=self.by_row)
        q = quantised(rows, scale, self.dtype)
        if rows.device.type == "cuda":
            own = self.scale.t() if self.by_row else self.scale.reshape(())
            return torch._scaled_mm(q, self.weight_q.t(), scale, own, bias=self.bias, out_dtype=self.carrier, use_fast_accum=True)
        one = torch.ones((), dtype=torch.float32, device=rows.device)
        return self.finish(torch._scaled_mm(q, self.weight_q.t(), one, one, out_dtype=torch.float32), scale)


class Int8Linear(EightBitLinear):
    """Inputs quantised by row (or whole) in every call, products in int8, sums in int32."""

    def product(self, rows: Tensor) -> Tensor:
        """[M, in] -> [M, out]."""
        scale = scales(rows, self.limit, by_row=self.by_row)
        q = quantised(rows, scale, self.dtype)
        size = rows.shape[0]
        missing = _missing(size, SMALLEST_INT_MM.get(rows.device.type, 0))
        if isinstance(missing, int) and not missing:
            return self.finish(torch._int_mm(q, self.weight_q.t()), scale)
        padded = functional.pad(q, (0, 0, 0, missing))
        return self.finish(torch._int_mm(padded, self.weight_q.t())[:size], scale)


class Int8WeightLinear(EightBitLinear):
    """Weights alone in int8: they are widened where they are read and multiply in the carrier.

    Worth it only where a compiler reads the int8 values inside the product (Inductor: `max-autotune` presets): eager and `default` write the wide weight out first.
    """

    def product(self, rows: Tensor) -> Tensor:
        """[M, in] -> [M, out]."""
        # No bias in the product: Inductor makes a mat-vec that reads int8 out of `mm`, and not out of `addmm` (torch/_inductor/decomposition.py).
        return self.finish(functional.linear(rows.to(self.carrier), self.weight_q.to(self.carrier)), None)


Quantised = EightBitLinear | int4.Int4WeightLinear
LAYERS: Mapping[Precision, type[EightBitLinear] | type[int4.Int4WeightLinear]] = {
    Precision.FP8: Fp8Linear,
    Precision.INT8: Int8Linear,
    Precision.W8: Int8WeightLinear,
    Precision.W4: int4.Int4WeightLinear,
}


def quantise(module: nn.Module, to: Precision, keep_fp32: Sequence[str] = (), *, by_row: bool = True, refuses: bool = True) -> list[str]:
    """Replace the linear layers of `module` and cast the rest to the carrier, in place; returns what a user should know.

    What stays in the carrier: layers narrower than 32 or of a size the kernels do not take, those whose weight an embedding or another kind of layer also holds (a tied head:
    two copies would be two truths), subclasses and layers with hooks of their own (what they do with the weight is theirs), convolutions, and everything inside
    `keep_fp32`, which stays in fp32 as in any cast. `by_row=False` takes one scale a tensor (of w4 still one a group).
    Raises Unsupported where too little of the model could be quantised, unless `refuses` is off (one layer alone says how sensitive it is), and what
    `precision.cast` raises.
    """
    carrier = to.carrier
    was_half = any(p.dtype == torch.float16 for p in module.parameters())
    places = list(_linears(module, keep_fp32))
    shared = _owners(module, {id(layer) for _, layer in places})
    left: dict[str, list[str]] = defaultdict(list)
    made: dict[int, Quantised] = {}
    by_weight: dict[Any, Quantised] = {}
    changed: list[str] = []
    num_quantised = 0
    for name, layer in places:
        weight = _weight(layer)
        key = _memory(layer.weight)
        reason = _unfit(layer, weight, to) or (f"tied to {shared[key]}" if key in shared else None)
        if reason is not None:
            left[reason].append(name)
            continue
        if id(layer) not in made:
            new = LAYERS[to](weight.detach(), layer.bias, getattr(torch, carrier.dtype), by_row=by_row)
            same = by_weight.setdefault((key, _is_conv1d(layer)), new)
            if same is new:
                num_quantised += weight.numel()
            else:  # two linear layers of one weight stay so
                new.weight_q, new.scale = same.weight_q, same.scale
            made[id(layer)] = new
        changed.append(name)
        _put(module, name, made[id(layer)])
    for name, part in module.named_modules():
        if _multiplies_otherwise(part):
            left[f"a {type(part).__name__}, not a plain linear layer"].append(name)
    if refuses:
        _refuse_too_little(module, to, num_quantised, left)
    _leave_fast_paths(module)
    exact = {part: part.scale for part in made.values()}
    notes = precision.cast(module, carrier, keep_fp32)
    for part, scale in exact.items():
        part.scale = scale
    groups = Counter(part.group for part in made.values() if isinstance(part, int4.Int4WeightLinear))
    return [*notes, *_notes(to, changed, left, groups=groups, was_half=was_half, by_row=by_row)]


def _linears(module: nn.Module, keep_fp32: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Linear layers under every name they have, but those inside a kept module. transformers' Conv1D is one, its weight transposed."""
    for name, part in module.named_modules(remove_duplicate=False):
        if not name or not (isinstance(part, nn.Linear) or _is_conv1d(part)) or not isinstance(getattr(part, "weight", None), Tensor):
            continue
        steps = name.split(".")
        around = (".".join(steps[: i + 1]) for i in range(len(steps)))
        if not any(fnmatchcase(outer, pattern) for outer in around for pattern in keep_fp32):
            yield name, part


def _is_conv1d(part: nn.Module) -> bool:
    return type(part).__name__ == "Conv1D" and type(part).__module__ == "transformers.pytorch_utils"


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight.t() if _is_conv1d(layer) else weight


def _unfit(layer: Any, weight: Tensor, to: Precision) -> str | None:
    """Why this layer stays, or None."""
    if type(layer) is not nn.Linear and not _is_conv1d(layer):
        return f"a {type(layer).__name__}, not a plain linear layer"
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return "with hooks of its own"
    if not isinstance(layer.weight, nn.Parameter) or str(weight.dtype).removeprefix("torch.") not in precision.CAST_DTYPES:
        return f"weights of {str(weight.dtype).removeprefix('torch.')} already"
    if min(weight.shape) < MIN_FEATURES:
        return f"narrower than {MIN_FEATURES}"
    if any(size % step for size, step in zip(weight.shape, STEP[to], strict=True)):
        rows, columns = STEP[to]
        return (
            f"sizes that are no multiples of {rows}" if rows == columns else f"sizes that are no multiples of {rows} out and {columns} in"
        )
    if to is Precision.INT8 and weight.shape[1] > LARGEST_INT8_SUM:
        return f"rows longer than {LARGEST_INT8_SUM}, whose sums may leave int32"
    return None


def _memory(tensor: Tensor) -> Any:
    return id(tensor) if tensor.is_meta else (tensor.data_ptr(), tensor.shape, tensor.stride())


def _owners(module: nn.Module, linear: set[int]) -> dict[Any, str]:
    """Memory of a weight -> the name of another kind of module (or of a linear layer that stays) that holds it, too."""
    found: dict[Any, str] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if id(part) in linear and (type(part) is nn.Linear or _is_conv1d(part)):
            continue
        for own, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(_memory(parameter), f"{name}.{own}".removeprefix(".").removesuffix(".weight"))
    return found


def _put(module: nn.Module, name: str, new: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, new)


def _multiplies_otherwise(part: nn.Module) -> bool:
    """A layer of a kind of its own whose `weight` looks like a product's: what it does with it is not known here."""
    weight = part._parameters.get("weight")
    known = (*_COUNTED, nn.Embedding, nn.EmbeddingBag, EightBitLinear, int4.Int4WeightLinear)
    return (
        weight is not None
        and weight.dim() == 2
        and min(weight.shape) >= MIN_FEATURES
        and not isinstance(part, known)
        and not _is_conv1d(part)
    )


def _refuse_too_little(module: nn.Module, to: Precision, num_quantised: int, left: Mapping[str, Sequence[str]]) -> None:
    kinds: Counter[str] = Counter()
    num_left = 0
    for part in module.modules():
        if isinstance(part, _COUNTED) or _is_conv1d(part) or _multiplies_otherwise(part):
            kinds[type(part).__name__] += 1
            num_left += sum(p.numel() for p in part.parameters(recurse=False) if p.dim() > 1)
    if num_quantised and num_quantised >= MIN_SHARE * (num_quantised + num_left):
        return
    stay = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(SHOWN)) or "nothing"
    why = "; ".join(f"{_some(names)}: {reason}" for reason, names in left.items())
    share = num_quantised / (num_quantised + num_left) if num_quantised else 0.0
    raise Unsupported(
        f"{to} is made for linear layers, and {share:.1%} of this model's weights are in such that can be quantised; {stay} would stay in {to.carrier}"
        + (f" ({why})" if why else ""),
        fix=f"--precision {to.carrier}",
    )


def _leave_fast_paths(module: nn.Module) -> None:
    """torch's fused encoder layer reads `linear1.weight` past the layer: it would multiply dequantised weights. Its own switch turns it off."""
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False


def _notes(
    to: Precision, changed: Sequence[str], left: Mapping[str, Sequence[str]], *, groups: Mapping[int, int], was_half: bool, by_row: bool
) -> list[str]:
    weights_alone = {Precision.W8: "with weights alone in int8", Precision.W4: "with weights alone in int4"}
    how = weights_alone.get(to, f"in {to}, inputs quantised in every call")
    scaled = f"one scale and zero a group of {_groups(groups)}" if groups else f"one scale a {'row' if by_row else 'tensor'}"
    notes = [f"{len(changed)} linear layers {how}, {scaled}; {to.carrier.dtype} between them"]
    notes += [f"left in {to.carrier.dtype}: {_some(names)} ({reason})" for reason, names in left.items()]
    if was_half:
        notes.append(f"the model came in float16; {to} computes between its products in {to.carrier.dtype}")
    return notes


def _groups(counted: Mapping[int, int]) -> str:
    """`128`, or `128 (in 3 of 64)`."""
    first, *others = sorted(counted, reverse=True)
    return f"{first}" + (f" (in {', '.join(f'{counted[size]} of {size}' for size in others)})" if others else "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _missing(size: Any, least: int) -> Any:
    """Rows to add: a number, or for a free dimension an expression, so that an exported graph holds on both sides of the limit."""
    if least and isinstance(size, torch.SymInt):
        return torch.sym_max(least - size, 0)
    return max(least - size, 0) if least else 0
