"""GPU307: nn.TransformerEncoderLayer takes its fast path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpuopt.core.result import Finding
from gpuopt.doctor import modules, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all layers that take it: what that changes for whoever counts, exports or compares."""
    if evidence.flags.get("autocast") or not _is_enabled():
        return
    parts = modules.parts(evidence.module)
    layers = [name for name, part in parts.items() if modules.is_a(part, "TransformerEncoderLayer") and _takes_it(evidence, part)]
    if not layers:
        return
    nested = any(modules.is_a(part, "TransformerEncoder") and getattr(part, "use_nested_tensor", False) for part in parts.values())
    padded = "; a src_key_padding_mask makes nested tensors of its inputs, and padded outputs come back as zeros" if nested else ""
    yield Finding(
        code="",
        severity="info",
        message=f"{words.number(len(layers), 'nn.TransformerEncoderLayer')} on the fast path, one fused op each in eval mode ({words.listed(layers, 2)}): most FLOP counters see 0 there, a hook or "
        f"an export switches it off, and results differ from the slow path by rounding{padded}",
        fix="torch.backends.mha.set_fastpath_enabled(False) compares like with like; torch.compile and exports go without it anyway",
        module=layers[0],
        op="aten._transformer_encoder_layer_fwd",
        count=len(layers),
    )


def _is_enabled() -> bool:
    import torch

    return bool(torch.backends.mha.get_fastpath_enabled())


def _takes_it(evidence: Evidence, part: Any) -> bool:
    """The conditions of TransformerEncoderLayer.forward that do not depend on the input."""
    attention = getattr(part, "self_attn", None)
    if part.training or attention is None or evidence.backend not in modules.EAGER:
        return False
    if evidence.flags.get("grad_enabled") is True and any(p.requires_grad for p in part.parameters()):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in part.modules()):
        return False
    return bool(
        getattr(attention, "batch_first", False)
        and getattr(attention, "in_proj_bias", None) is not None
        and getattr(attention, "_qkv_same_embed_dim", False)
        and getattr(part, "activation_relu_or_gelu", 0)
        and part.norm1.eps == part.norm2.eps
        and attention.num_heads % 2 == 0
    )


RULE = Rule(
    code="GPU307",
    name="mha-fastpath",
    what="nn.TransformerEncoderLayer runs as one fused op in eval mode.",
    why="The fast path hides its products from FLOP counters and profiles, is off as soon as a hook, training mode or autocast appears, and zeroes padded positions: two "
    "measurements of one model may be of two programs.",
    before="encoder.eval()\ny = encoder(x, src_key_padding_mask=mask)",
    after="torch.backends.mha.set_fastpath_enabled(False)  # for a comparison with compiled or exported code\ny = encoder(x, src_key_padding_mask=mask)",
    safe=False,
    needs=frozenset({"module", "inputs"}),
    find=find,
    source="torch/nn/modules/transformer.py, TransformerEncoderLayer.forward",
)
