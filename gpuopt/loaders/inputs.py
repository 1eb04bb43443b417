"""Model + InputSpec -> Inputs: from a file, from --input, from the model's own signature or configuration, or from an announced guess."""

from __future__ import annotations

import inspect
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gpuopt.core.errors import BadInput, ResourceError, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import DTYPE_BYTES, InputSpec, TensorSpec
from gpuopt.loaders import exported
from gpuopt.trust import gate
from gpuopt.trust.policy import printable

MAX_ELEMENTS = 2**31
"""Kernels index with 32-bit integers in many places; from here on results are wrong or launches fail."""
DEFAULT_SEQUENCE = 128
DEFAULT_IMAGE = 224
DEFAULT_AUDIO = 16_000
"""One second at 16 kHz."""

_INTEGERS = frozenset({"int64", "int32", "int16", "int8", "uint8"})
_INTEGER_MAX = {"int64": 2**63 - 1, "int32": 2**31 - 1, "int16": 2**15 - 1, "int8": 127, "uint8": 255}


def signature(model: Model, spec: InputSpec) -> tuple[tuple[TensorSpec, ...], str]:
    """(one TensorSpec an input, free dimensions as letters; where they come from).

    Raises UsageError when nothing says what the model takes, or when --input does not fit what does; BadInput for a damaged --inputs file.
    """
    if spec.file is not None:
        return tuple(specs_of(read(Path(spec.file)))), f"--inputs {spec.file}"
    if spec.tensors:
        specs = tuple(_named(model, spec.tensors))
        _check_against(model, specs)
        return tuple(_with_values(model, specs)), "--input"
    if model.signature:
        source = "the factory's input_specs" if model.form == "module" else "the file's signature"
        return tuple(_with_values(model, model.signature)), source
    if model.config is not None:
        specs = _from_configuration(model)
        if specs:
            return tuple(_with_values(model, specs)), "configuration"
    if model.module is None:
        raise UsageError(f"nothing says which inputs {model.name} takes", fix="--input 'x:float32[N,3,224,224]'")
    specs, layer = _guess(model)
    flags = " ".join(f"--input '{s}'" for s in specs)
    return tuple(_with_values(model, specs)), f"guess: first layer is {layer}: use {flags} to replace it"


def make(model: Model, spec: InputSpec, dims: Mapping[str, int], device: str, dtype: str | None) -> Inputs:
    """Tensors for one call. `dims` gives values to free dimensions; the rest get defaults (N=1, S=128…), which `Inputs.dims` tells.

    Floating inputs are made in float32 and take `dtype` where it is given, so that every precision sees the same numbers; integers stay integers.
    The same seed gives the same tensors on every device. Raises UsageError naming the input or dimension that does not fit, ResourceError before
    anything too large is allocated.
    """
    specs, source = signature(model, spec)
    stored = read(Path(spec.file)) if spec.file is not None else None
    if stored is not None:
        specs = tuple(_with_values(model, _named(model, specs)))
        _check_against(model, specs)
    free = _free(specs)
    _refuse_unknown(model, specs, dims, free, source)
    known = _stored_dims(specs, list(stored.values()), dims, source) if stored is not None else {**_defaults(model, specs, free), **dims}
    bound = [s.bind(known) for s in specs]
    _refuse_positions(model, bound, specs)
    _refuse_ranges(model, known)
    for want in bound:
        _refuse_size(want, dtype)
    _refuse_total(bound, dtype, device)
    if stored is not None:
        tensors = [_cast(tensor, dtype) for tensor in stored.values()]
    else:
        generator = torch.Generator().manual_seed(spec.seed)
        tensors = [_draw(want, generator, dtype) for want in bound]
    return _bind(model, specs, tensors, known, source, device)


def to_device(inputs: Inputs, device: str) -> Inputs:
    """The same inputs on another device."""
    return inputs.map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t)


def shared_dims(inputs: Inputs) -> tuple[str, ...]:
    """Free dimensions that a file of these tensors will be found to have."""
    names = [spec.name or str(i) for i, spec in enumerate(inputs.specs)]
    specs = specs_of(dict(zip(names, [*inputs.args, *inputs.kwargs.values()], strict=True)))
    return tuple(dict.fromkeys(letter for spec in specs for letter in spec.free_dims))


def specs_of(tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    """What stored tensors are; their common first dimension is N."""
    firsts = {t.shape[0] if t.dim() else None for t in tensors.values()}
    is_batched = len(firsts) == 1 and None not in firsts
    found = []
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPE_BYTES:
            raise UsageError(f"input {name!r} has the dtype {dtype}, which is not supported", fix="one of " + ", ".join(DTYPE_BYTES))
        shape: tuple[int | str, ...] = ("N", *tensor.shape[1:]) if is_batched else tuple(tensor.shape)
        found.append(TensorSpec(name=name, dtype=dtype, shape=shape))
    return found


# --- files -------------------------------------------------------------------------------------------------------------------------------------


def read(path: Path, option: str = "--inputs") -> dict[str, torch.Tensor]:
    """Arrays of an .npz or .safetensors file by name. `option` is what named it. Raises UsageError, BadInput, ResourceError."""
    if not path.is_file():
        raise UsageError(f"there is no file {printable(str(path))}", fix=f"{option} takes an .npz or .safetensors file")
    if path.suffix == ".safetensors":
        tensors = gate.load_safetensors(path)
    elif path.suffix == ".npz":
        tensors = _read_npz(path)
    else:
        raise UsageError(f"{option} {printable(path.name)} is neither .npz nor .safetensors", fix="numpy.savez(FILE, **arrays)")
    if not tensors:
        raise BadInput(f"{path.name} holds no arrays", fix="numpy.savez(FILE, name=array)")
    return tensors


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            need = sum(info.file_size for info in archive.infolist())
            if need > _available("cpu"):
                raise ResourceError(f"{path.name} holds {need} bytes of arrays, more than there is memory", fix="give fewer samples")
            for info in archive.infolist():
                _check_npy(archive, info)
        with np.load(path, allow_pickle=False) as arrays:  # pickled arrays run code
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape)) for name in arrays.files}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, KeyError, SyntaxError, TypeError, NotImplementedError) as error:
        raise BadInput(
            f"{path.name} cannot be read: {printable(str(error), limit=200)}", fix="write it with numpy.savez, from arrays of numbers"
        ) from error


def _check_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """numpy allocates what a header claims before it reads: compare the claim with what is there. Raises ValueError."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} is no plain array")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
            raise ValueError(f"{info.filename} is no plain array of shape {list(shape)}")


def _stored_dims(specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor], dims: Mapping[str, int], source: str) -> dict[str, int]:
    known: dict[str, int] = {}
    for spec, tensor in zip(specs, tensors, strict=True):
        for letter, size in zip(spec.shape, tensor.shape, strict=True):
            if isinstance(letter, str):
                known[letter] = int(size)
    for name, value in dims.items():
        if known[name] != value:
            raise UsageError(f"{source} holds {name}={known[name]}, not {value}", fix=f"--dim {name}={known[name]}, or no --inputs")
    return known


# --- dimensions --------------------------------------------------------------------------------------------------------------------------------


def _free(specs: Iterable[TensorSpec]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(letter for s in specs for letter in s.free_dims))


_IN_A_FILE = {
    "onnx": "torch.onnx.export(…, dynamic_shapes=…), or gpuopt convert SOURCE_MODEL --dim {name}=1:8:64 -o free.onnx",
    "exported": "torch.export.export(…, dynamic_shapes=…), or gpuopt convert SOURCE_MODEL --dim {name}=1:8:64 -o free.pt2",
}
"""Form whose file says itself which sizes are free -> how to write one where this one is."""


def _refuse_unknown(model: Model, specs: Sequence[TensorSpec], dims: Mapping[str, int], free: Sequence[str], source: str) -> None:
    for name, value in dims.items():
        if name not in free and model.form in _IN_A_FILE and not free:
            own = ", ".join(printable(str(s)) for s in specs)
            raise UsageError(
                f"{model.name} was exported with fixed sizes, {own}: it has no dimension {name} that could be {value}",
                fix=f"leave {'--batch' if name == 'N' else f'--dim {name}'} away, or export it again with a free one: {_IN_A_FILE[model.form].format(name=name)}",
            )
        if name not in free:
            there = f"it has {', '.join(free)}" if free else "every size is fixed"
            raise UsageError(
                f"no input has the dimension {name}: {there} (from {source})", fix="--input 'x:float32[N,3,224,224]' names free dimensions"
            )
        if value < 0:
            raise UsageError(f"dimension {name} is {value}", fix=f"--dim {name}=1")


def _defaults(model: Model, specs: Sequence[TensorSpec], free: Sequence[str]) -> dict[str, int]:
    """A size for every free dimension: by its letter, else by where it stands."""
    longest = _max_positions(model)
    sequence = min(DEFAULT_SEQUENCE, longest) if longest else DEFAULT_SEQUENCE
    named = {"N": 1, "S": sequence, "T": sequence, "H": DEFAULT_IMAGE, "W": DEFAULT_IMAGE, "L": DEFAULT_AUDIO}
    found: dict[str, int] = {}
    for letter in free:
        if letter in named:
            found[letter] = named[letter]
            continue
        spec = next(s for s in specs if letter in s.shape)
        index, rank = spec.shape.index(letter), len(spec.shape)
        if rank == 4 and index >= 2 and spec.dtype not in _INTEGERS:
            found[letter] = DEFAULT_IMAGE
        elif index == 1 and rank in (2, 3):
            found[letter] = sequence
        elif index == 0:
            found[letter] = 1
        else:
            raise UsageError(f"input {spec.name or spec.dtype!r} has the free dimension {letter}", fix=f"--dim {letter}=8")
    if model.exported is not None:
        for letter, (low, high) in exported.ranges(model.exported).items():
            if letter in found:
                found[letter] = min(max(found[letter], low), high)
    return found


def _refuse_ranges(model: Model, known: Mapping[str, int]) -> None:
    if model.exported is None:
        return
    for letter, (low, high) in exported.ranges(model.exported).items():
        if letter in known and not low <= known[letter] <= high:
            raise UsageError(
                f"dimension {letter} is {known[letter]}; the program was exported for {low} to {high}", fix=f"--dim {letter}={low}"
            )


def _max_positions(model: Model) -> int | None:
    """The longest text an embedding table of positions allows; None where there is no such table. Those of an image's patches are none of a text's."""
    if model.module is None:
        return None
    limits = []
    for name, part in model.module.named_modules():
        leaf = name.rpartition(".")[2]
        if (
            isinstance(part, nn.Embedding)
            and (leaf in ("wpe", "pos_emb", "embed_positions") or "position_embedding" in leaf)
            and not any(word in name for word in ("patch", "vision", "visual"))
        ):
            offset = 2 if part.padding_idx is not None or type(part).__name__.startswith(("OPT", "Bart")) else 0
            limits.append(part.num_embeddings - offset)
    return min(limits) if limits else None


def _refuse_positions(model: Model, bound: Sequence[TensorSpec], specs: Sequence[TensorSpec]) -> None:
    longest = _max_positions(model)
    if longest is None:
        return
    for want, spec in zip(bound, specs, strict=True):
        if want.name in ("input_ids", "decoder_input_ids") and len(want.shape) == 2 and int(want.shape[1]) > longest:
            letter = spec.shape[1] if isinstance(spec.shape[1], str) else "S"
            raise UsageError(
                f"dimension {letter} of {want.name} is {want.shape[1]}; the model has {longest} positions", fix=f"--dim {letter}={longest}"
            )


# --- sizes -------------------------------------------------------------------------------------------------------------------------------------


def _bytes(spec: TensorSpec, dtype: str | None) -> int:
    count = math.prod(int(d) for d in spec.shape)
    width = DTYPE_BYTES[dtype] if dtype and _is_float(spec.dtype) else DTYPE_BYTES[spec.dtype]
    return count * (width + (4 if _is_float(spec.dtype) and width < 4 else 0))  # drawn in float32, then cast


def _refuse_size(spec: TensorSpec, dtype: str | None) -> None:
    count = math.prod(int(d) for d in spec.shape)
    if count >= MAX_ELEMENTS:
        raise ResourceError(
            f"input {spec} has {count} elements, at most {MAX_ELEMENTS - 1} fit one tensor", fix="a smaller --batch or --dim"
        )


def _refuse_total(bound: Sequence[TensorSpec], dtype: str | None, device: str) -> None:
    need = sum(_bytes(s, dtype) for s in bound)
    for place in dict.fromkeys(("cpu", device)):
        have = _available(place)
        if need > have:
            raise ResourceError(
                f"the inputs need {need / 2**30:.1f} GiB, {place} has {have / 2**30:.1f} GiB free", fix="a smaller --batch or --dim"
            )


def _available(device: str) -> int:
    """Free bytes on a device; unlimited where the system does not say."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 2**62


# --- values ------------------------------------------------------------------------------------------------------------------------------------


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def _with_values(model: Model, specs: Iterable[TensorSpec]) -> Iterable[TensorSpec]:
    """What integers may be: ids lie below the vocabulary, masks are ones, types and positions zeros."""
    vocabulary = _vocabulary(model)
    for spec in specs:
        if spec.dtype not in _INTEGERS | {"bool"} or spec.high is not None or spec.fill is not None:
            yield spec
        elif "mask" in spec.name:
            yield replace(spec, fill=1.0)
        elif spec.dtype in _INTEGERS and any(word in spec.name for word in ("type_id", "position", "segment", "bbox")):
            yield replace(spec, fill=0.0)
        elif spec.dtype in _INTEGERS and vocabulary is not None:
            yield replace(spec, high=vocabulary)
        else:
            yield spec


def _vocabulary(model: Model) -> int | None:
    """Tokens the model knows: what the configuration says, no more than its first embedding holds."""
    sizes = []
    config = model.config
    if config is not None:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        sizes += [
            size for size in (getattr(config, "vocab_size", None), getattr(text, "vocab_size", None)) if isinstance(size, int) and size > 0
        ]
    if model.module is not None:
        first = next((p for p in model.module.modules() if _kind(p) in ("Embedding", "EmbeddingBag") and hasattr(p, "weight")), None)
        if first is not None:
            sizes.append(int(first.weight.shape[0]))
    return min(sizes) if sizes else None


def _draw(spec: TensorSpec, generator: torch.Generator, dtype: str | None) -> torch.Tensor:
    shape = [int(d) for d in spec.shape]
    own: torch.dtype = getattr(torch, spec.dtype)
    if _is_float(spec.dtype):
        wanted: torch.dtype = getattr(torch, dtype) if dtype else own
        if spec.fill is not None:
            return torch.full(shape, spec.fill, dtype=torch.float32).to(wanted)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(wanted)
    if own.is_complex:
        return torch.randn(shape, generator=generator, dtype=own)
    if spec.fill is not None:
        return torch.full(shape, spec.fill, dtype=torch.float64).to(own)
    high = 2 if spec.high is None else max(1, spec.high)
    if spec.dtype == "bool":
        return torch.randint(0, 2, shape, generator=generator).bool()
    return torch.randint(0, min(high, _INTEGER_MAX[spec.dtype]), shape, generator=generator, dtype=torch.int64).to(own)


def _cast(tensor: torch.Tensor, dtype: str | None) -> torch.Tensor:
    return tensor.to(getattr(torch, dtype)) if dtype and tensor.is_floating_point() else tensor


# --- names -------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """How a model may be called."""

    names: tuple[str, ...]
    """What can be given by position or name, in order; then what can be given by name alone."""
    keyword_only: frozenset[str] = frozenset()
    positional_only: frozenset[str] = frozenset()
    required: tuple[str, ...] = ()
    takes_more: bool = False
    """*args."""
    takes_any_name: bool = False
    """**kwargs."""


def _call(model: Model) -> _Call:
    if model.form == "onnx":
        names = tuple(s.name for s in model.signature)
        return _Call(names=names, keyword_only=frozenset(names), required=names)
    if model.form == "exported":
        structure = exported.call_structure(model.exported)
        names = tuple(s.name for s in model.signature)
        if structure is None or len(names) != structure[0] + len(structure[1]):
            raise UsageError(
                f"{model.name} takes nested inputs, which cannot be made from --input", fix="export a module whose forward takes tensors"
            )
        count, keywords = structure
        every = (*names[:count], *keywords)
        return _Call(names=every, keyword_only=frozenset(keywords), positional_only=frozenset(every[:count]), required=every)
    if model.form == "torchscript":
        arguments = model.module.forward.schema.arguments[1:]
        names = tuple(a.name for a in arguments)
        return _Call(names=names, required=tuple(a.name for a in arguments if not a.has_default_value()))
    module = model.module
    if isinstance(module, nn.DataParallel):
        module = module.module
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return _Call(names=(), takes_more=True, takes_any_name=True)
    kinds = inspect.Parameter
    named = [p for p in parameters if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    return _Call(
        names=tuple(p.name for p in named),
        keyword_only=frozenset(p.name for p in named if p.kind is kinds.KEYWORD_ONLY),
        positional_only=frozenset(p.name for p in named if p.kind is kinds.POSITIONAL_ONLY),
        required=tuple(p.name for p in named if p.default is kinds.empty),
        takes_more=any(p.kind is kinds.VAR_POSITIONAL for p in parameters),
        takes_any_name=any(p.kind is kinds.VAR_KEYWORD for p in parameters),
    )


def _named(model: Model, specs: Iterable[TensorSpec]) -> Iterable[TensorSpec]:
    """Unnamed specs get the names of the parameters they will be bound to. Raises UsageError for a name given twice."""
    specs = list(specs)
    given = [s.name for s in specs if s.name]
    repeated = next((n for n in given if given.count(n) > 1), None)
    if repeated is not None:
        raise UsageError(f"the input {repeated!r} is given twice", fix="one --input a name")
    if model.form == "bundle":
        return specs
    names = iter([n for n in _call(model).names if n not in given])
    return [s if s.name else replace(s, name=next(names, "")) for s in specs]


def _check_against(model: Model, specs: Sequence[TensorSpec]) -> None:
    """--input against what the model says of itself. A file's graph is binding; a factory's or configuration's sizes are only its usual ones."""
    is_binding = model.form in ("onnx", "exported")
    says = {s.name: s for s in (model.signature or (_from_configuration(model) if model.config is not None else ()))}
    if is_binding:
        extra = [s.name for s in specs if s.name not in says]
        if extra:
            raise UsageError(f"{model.name} has no input {printable(extra[0])!r}", fix=f"it has {', '.join(says)}")
        missing = [name for name in says if name not in {s.name for s in specs}]
        if missing:
            raise UsageError(f"the input {missing[0]!r} is not given", fix=f"--input '{says[missing[0]]}'")
    for spec in specs:
        own = says.get(spec.name)
        if own is None:
            continue
        fix = f"--input '{own}'"
        if len(spec.shape) != len(own.shape):
            raise UsageError(f"input {spec.name!r} has {len(spec.shape)} dimensions, {model.name} takes {len(own.shape)}: {own}", fix=fix)
        if _is_float(spec.dtype) != _is_float(own.dtype) or (is_binding and spec.dtype != own.dtype):
            raise UsageError(f"input {spec.name!r} is {spec.dtype}, {model.name} takes {own.dtype}", fix=fix)
        if is_binding:
            for mine, theirs in zip(spec.shape, own.shape, strict=True):
                if isinstance(theirs, int) and isinstance(mine, int) and mine != theirs:
                    raise UsageError(f"input {spec.name!r} has the size {mine} where {model.name} is fixed at {theirs}: {own}", fix=fix)


def _bind(
    model: Model, specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor], known: Mapping[str, int], source: str, device: str
) -> Inputs:
    """Names that are parameters of forward become keywords; the others fill the free parameters in order."""
    moved = [t.to(device) for t in tensors]
    if model.form == "bundle":
        call = _Call(names=tuple(s.name for s in specs))
    else:
        call = _call(model)
    taken = {s.name for s in specs if s.name in call.names}
    free = [n for n in call.names if n not in taken and n not in call.keyword_only]
    slots: dict[str, tuple[TensorSpec, torch.Tensor]] = {}
    more: list[tuple[TensorSpec, torch.Tensor]] = []
    for spec, tensor in zip(specs, moved, strict=True):
        if spec.name in taken:
            slots[spec.name] = (spec, tensor)
        elif spec.name and call.takes_any_name and not free and not call.takes_more:
            slots[spec.name] = (spec, tensor)
        elif free and not (call.takes_any_name and spec.name and _is_transformers(model)):
            slots[free.pop(0)] = (spec, tensor)
        elif call.takes_more:
            more.append((spec, tensor))
        elif call.takes_any_name and spec.name:
            slots[spec.name] = (spec, tensor)
        else:
            raise UsageError(
                f"{model.name} takes no further input {spec.name or str(spec)!r}", fix=f"it takes {', '.join(call.names) or 'none'}"
            )
    missing = [n for n in call.required if n not in slots]
    if missing:
        raise UsageError(
            f"{model.name} also wants the input {missing[0]!r}; given: {', '.join(slots) or 'none'} (from {source})",
            fix=f"--input '{missing[0]}:float32[N,…]' beside the others",
        )
    # By position: what has to be, and what was bound by order and starts the parameter list. *args only follow if all parameters are positional.
    args: list[tuple[TensorSpec, torch.Tensor]] = []
    # In forward's own order, whatever the file's: a bundle is called by position, too.
    rest = {**{name: slots[name] for name in call.names if name in slots}, **slots}
    for name in call.names:
        if name not in rest or name in call.keyword_only:
            break
        if name in call.positional_only or more or rest[name][0].name != name:
            args.append(rest.pop(name))
        else:
            break
    ordered = [*args, *more]
    return Inputs(
        args=tuple(t for _, t in ordered),
        kwargs={name: tensor for name, (_, tensor) in rest.items()},
        specs=(*(s for s, _ in ordered), *(replace(s, name=name) for name, (s, _) in rest.items())),
        dims={letter: known[letter] for letter in _free(specs)},
        source=source,
    )


def _is_transformers(model: Model) -> bool:
    return model.config is not None


# --- what a configuration says -----------------------------------------------------------------------------------------------------------------


def _from_configuration(model: Model) -> tuple[TensorSpec, ...]:
    """Inputs of a transformers model by its main input; empty where the configuration does not tell.

    No attention mask is among them: without one the class makes its own, and a mask changes which attention kernel runs. Give one with --input.
    """
    config, module = model.config, model.module
    names = set(_call(model).names)
    main = getattr(type(module), "main_input_name", "input_ids")
    dtype = model.dtype or "float32"
    is_two_part = bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" in names
    decoder = (TensorSpec(name="decoder_input_ids", dtype="int64", shape=("N", "T")),) if is_two_part else ()
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("N", "S"))
    if {"pixel_values", "input_ids"} <= names and hasattr(module, "get_text_features") and hasattr(config, "vision_config"):
        return (ids, *_pixels(config.vision_config, dtype))
    if main == "pixel_values" and "pixel_values" in names:
        return (*_pixels(getattr(config, "vision_config", config), dtype), *decoder)
    if main == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        # Whisper: two frames a position, by the stride of its second convolution.
        return (TensorSpec(name=main, dtype=dtype, shape=("N", config.num_mel_bins, 2 * config.max_source_positions)), *decoder)
    if main == "input_values":
        if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
            return (TensorSpec(name=main, dtype=dtype, shape=("N", config.max_length, config.num_mel_bins)),)
        return (TensorSpec(name=main, dtype=dtype, shape=("N", "L")), *decoder)
    if main == "input_ids" and "input_ids" in names:
        return (ids, *decoder)
    return ()


def _pixels(config: Any, dtype: str) -> tuple[TensorSpec, ...]:
    channels = getattr(config, "num_channels", 3)
    size = getattr(config, "image_size", None) or DEFAULT_IMAGE
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
    frames = getattr(config, "num_frames", None)
    shape: tuple[int | str, ...] = ("N", frames, channels, height, width) if isinstance(frames, int) else ("N", channels, height, width)
    return (TensorSpec(name="pixel_values", dtype=dtype, shape=shape),)


# --- the guess ---------------------------------------------------------------------------------------------------------------------------------


def _guess(model: Model) -> tuple[tuple[TensorSpec, ...], str]:
    """Inputs that the first layer, in order of registration, can take. Raises UsageError where no layer tells."""
    call = _call(model)
    wanted = call.required or call.names[:1]
    name = wanted[0] if wanted else "x"
    dtype = model.dtype or "float32"
    for part in model.module.modules():
        shapes = _shapes_for(part)
        if shapes is None:
            continue
        kind = _kind(part)
        of = "int64" if kind in ("Embedding", "EmbeddingBag") else dtype
        names = [name] if len(shapes) == 1 else list(wanted[: len(shapes)]) or ["src", "tgt"]
        specs = tuple(TensorSpec(name=n, dtype=of, shape=shape) for n, shape in zip(names, shapes, strict=False))
        return specs, f"{kind}({_arguments(part)})"
    raise UsageError(f"no layer of {model.name} tells what it takes", fix=f"--input '{name}:float32[N,3,224,224]'")


def _kind(part: Any) -> str:
    return str(getattr(part, "original_name", type(part).__name__))


def _shapes_for(part: Any) -> tuple[tuple[int | str, ...], ...] | None:
    kind = _kind(part)
    weight = getattr(part, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) and not isinstance(weight, nn.UninitializedParameter) else ()
    if kind in ("Conv1d", "Conv2d", "Conv3d") and len(shape) > 2:
        channels = shape[1] * int(getattr(part, "groups", 1))
        sizes = {"Conv1d": (1024,), "Conv2d": (DEFAULT_IMAGE, DEFAULT_IMAGE), "Conv3d": (16, 112, 112)}[kind]
        return (("N", channels, *sizes),)
    if kind in ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d") and len(shape) > 2:
        return (("N", shape[0], *({"1": (256,), "2": (28, 28), "3": (8, 28, 28)}[kind[-2]])),)
    if kind in ("Linear", "NonDynamicallyQuantizableLinear", "LazyLinear") and len(shape) == 2:
        return (("N", shape[1]),)
    if kind in ("Embedding", "EmbeddingBag") and len(shape) == 2:
        return (("N", "S"),)
    if kind == "BatchNorm2d" and shape:
        return (("N", shape[0], DEFAULT_IMAGE, DEFAULT_IMAGE),)
    if kind == "BatchNorm1d" and shape:
        return (("N", shape[0]),)
    if kind == "LayerNorm" and shape:
        return (("N", *shape) if len(shape) > 1 else ("N", "S", *shape),)
    if kind in ("LSTM", "GRU", "RNN") and hasattr(part, "input_size"):
        return (_sequence(part, part.input_size),)
    if kind == "Transformer" and hasattr(part, "d_model"):
        both = _sequence(part, part.d_model)
        return (both, tuple("T" if d == "S" else d for d in both))
    if kind in ("TransformerEncoderLayer", "TransformerDecoderLayer") and hasattr(part, "self_attn"):
        one = _sequence(part.self_attn, part.self_attn.embed_dim)
        return (one,) if kind == "TransformerEncoderLayer" else (tuple("T" if d == "S" else d for d in one), one)
    if kind == "MultiheadAttention" and hasattr(part, "embed_dim"):
        one = _sequence(part, part.embed_dim)
        return (one, one, one)
    return None


def _sequence(part: Any, width: int) -> tuple[int | str, ...]:
    return ("N", "S", width) if getattr(part, "batch_first", False) else ("S", "N", width)


def _arguments(part: Any) -> str:
    """The numbers of a layer's own repr, without its options."""
    text = part.extra_repr() if hasattr(part, "extra_repr") and not isinstance(part, torch.jit.ScriptModule) else ""
    if not text:
        weight = getattr(part, "weight", None)
        return "×".join(str(d) for d in weight.shape) if isinstance(weight, torch.Tensor) else "…"
    words = text.split(", ")
    plain = [word for word in words if "=" not in word][:2] or words[:2]
    return ", ".join(plain) + (", …" if len(words) > len(plain) else "")
