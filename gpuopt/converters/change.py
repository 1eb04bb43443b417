"""Model + Precision + Transforms -> changed Model, in the one order that is right: eval, fold, rewrite, cast, layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gpuopt.converters import exported, folding, layout, precision, quantised, rewrites
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Precision, TensorSpec, Transforms
from gpuopt.programs import packing

_NONE = Transforms()


ROOM = 6
"""Times its weights that a device must have free before a copy is made there: full weights, cast ones, and a reference of eight bytes a number beside them."""


def apply(model: Model, to: Precision | None, transforms: Transforms, inputs: Inputs | None = None, *, device: str = "cpu") -> Model:
    """A changed copy; `model` itself, uncopied, where nothing has to change (a copy of 16 GB is not free). What was done is in `notes`.

    `to`: None keeps the model's dtype; fp32 and tf32 are both a cast to float32 (see `precision.flags`). `inputs`, of any floating dtype, let folding see which
    layer feeds which batch norm, and are needed to cast an exported program. Folding and rewrites come before the cast: they are computed from the full weights.
    `keep_fp32` names modules as they are after the rewrites. `device`: where the changed module will be run; it is copied and changed there, where there is ample room, and
    on the module's own device otherwise, without the host's memory growing by a copy.
    Raises Unsupported where this form cannot be changed so, UsageError for a `keep_fp32` that names nothing and a rewrite that there is none of.
    """
    if to is not None and to.is_quantised and model.form != "module":
        raise Unsupported(f"{to} replaces layers, and {_named(model.form)} has none to replace", fix="convert the source model")
    if model.form == "module":
        return _module(model, to, transforms, inputs, device)
    casts = to is not None and to.dtype != model.dtype
    if not casts and transforms == _NONE:
        return model
    if model.form == "torchscript":
        return _torchscript(model, to if casts else None, transforms, inputs)
    if model.form == "exported":
        return _exported(model, to, transforms, inputs)
    raise Unsupported(
        f"{_named(model.form)} stays as it was written ({model.name} computes in {model.dtype or 'a dtype it does not name'})",
        fix="convert the source model",
    )


def _named(form: str) -> str:
    return {"onnx": "an ONNX file", "exported": "an exported program", "torchscript": "a TorchScript program"}.get(form, f"a {form}")


def _module(model: Model, to: Precision | None, transforms: Transforms, inputs: Inputs | None, device: str) -> Model:
    training = sum(part.training for part in model.module.modules())
    casts = to is not None and precision.needs_cast(model.module, to)
    reshapes = transforms.fold_batch_norm or bool(transforms.rewrites)
    if not training and not casts and not transforms.channels_last and not reshapes:
        return model
    module = _copied(model, device)
    notes = []
    if training:
        module.eval()
        notes.append(f"eval mode: {training} modules were in training mode")
    if transforms.fold_batch_norm:
        notes.append(folding.fold(module, inputs))
    for text in rewrites.in_turn(transforms.rewrites):
        notes.append(_rewritten(module, text, inputs, model.name))
    if casts:
        assert to is not None
        notes += (quantised.quantise if to.is_quantised else precision.cast)(module, to, transforms.keep_fp32)
    if transforms.channels_last:
        notes.append(layout.channels_last(module))
    parameters = packing.num_weights(module) if reshapes else model.num_parameters
    return replace(_retyped(model, to if casts else None, notes), module=module, num_parameters=parameters)


def _rewritten(module: Any, text: str, inputs: Inputs | None, name: str) -> str:
    """What was done, or raises why it cannot be: either begins with the rewrite as it was asked for, so that a search knows which of several it was."""
    rewrite, setting = rewrites.resolve(text)
    why_not = rewrite.applies(module)
    if why_not is not None:
        raise Unsupported(f"{text}: nothing to change in {name}: {why_not}", fix=f"leave --rewrite {text} out")
    given = precision.cast_inputs(inputs, module) if inputs is not None else None
    try:
        return f"{text}: {rewrite.apply(module, setting, given)}"
    except Unsupported as error:
        raise Unsupported(f"{text}: {error.message}", fix=error.fix) from error


def _torchscript(model: Model, to: Precision | None, transforms: Transforms, inputs: Inputs | None) -> Model:
    if transforms.fold_batch_norm or transforms.rewrites or transforms.keep_fp32:
        wanted = "single modules cannot be kept in fp32"
        wanted = f"{transforms.rewrites[0]} cannot be made" if transforms.rewrites else wanted
        wanted = "batch norms cannot be folded" if transforms.fold_batch_norm else wanted
        raise Unsupported(f"{wanted} in a TorchScript program", fix="convert the source model")
    module = _copied(model).eval()
    notes = []
    if to is not None:
        if not any(p.is_floating_point() for p in module.parameters()):
            raise Unsupported(
                f"{model.name} is a frozen TorchScript program: its weights are constants of its code", fix="convert the source model"
            )
        notes += precision.cast(module, to, ())
    if transforms.channels_last:
        notes.append(layout.channels_last(module))
    if inputs is not None:
        _try(module, inputs, f"the TorchScript program {model.name} does not run in {to or model.dtype}")
    return replace(_retyped(model, to, notes), module=module)


def _exported(model: Model, to: Precision | None, transforms: Transforms, inputs: Inputs | None) -> Model:
    if transforms.fold_batch_norm or transforms.channels_last or transforms.rewrites or transforms.keep_fp32:
        raise Unsupported(
            "the graph of an exported program is fixed: layers cannot be folded, rewritten, laid out or kept apart in it",
            fix="transform, then export",
        )
    assert to is not None
    program = exported.recast(model.exported, to)
    module = program.module()
    if inputs is not None:
        _try(module, inputs, f"the exported program {model.name} does not run in {to}")
    notes = [f"cast to {to.dtype} and exported again"]
    return replace(_retyped(model, to, notes), module=module, exported=program)


def _try(module: Any, inputs: Inputs, what: str) -> None:
    given = precision.cast_inputs(inputs, module)
    try:
        with torch.no_grad():
            module(*given.args, **given.kwargs)
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise Unsupported(f"{what}: {lines[-1] if lines else error}", fix="convert the source model") from error


def _copied(model: Model, device: str = "cpu") -> Any:
    try:
        return precision.copied(model.module, device if _has_room(device, model.module) else None)
    except (RuntimeError, TypeError) as error:  # tensors that are results of other tensors (weight norm), locks, open files
        raise Unsupported(
            f"{model.name} cannot be copied, and the original is never changed: {error}", fix="pass a factory: package.module:function"
        ) from error


def _has_room(device: str, module: Any) -> bool:
    if not device.startswith("cuda"):
        return False
    free_bytes, _ = torch.cuda.mem_get_info(device)
    num_bytes: int = sum(p.numel() * p.element_size() for p in module.parameters())
    return ROOM * num_bytes <= free_bytes


def _retyped(model: Model, to: Precision | None, notes: list[str]) -> Model:
    """The same facts with the new dtype, in the signature too."""
    if to is None:
        return replace(model, notes=[*model.notes, *notes])

    def spec(old: TensorSpec) -> TensorSpec:
        return replace(old, dtype=to.carrier.dtype) if old.dtype in precision.CAST_DTYPES else old

    return replace(model, dtype=to.carrier.dtype, signature=tuple(spec(s) for s in model.signature), notes=[*model.notes, *notes])
