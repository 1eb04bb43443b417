"""Parts with a defect, and the same parts without it: what people write, put into BERT-large, ResNet-101 and a small decoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

BANK = 1_000_003
"""Random values laid out again and again over large weights: a prime, so that no two rows are alike, and drawing them takes no time."""


def fill(*tensors: torch.Tensor, scale: float) -> None:
    """Deterministic values of about a normal distribution with this deviation."""
    bank = torch.randn(BANK, generator=torch.Generator().manual_seed(0)) * scale
    for tensor in tensors:
        flat = tensor.data.view(-1)
        flat.copy_(bank.repeat(math.ceil(flat.numel() / BANK))[: flat.numel()])


def linear(width_in: int, width_out: int) -> nn.Linear:
    """A linear layer filled so that activations keep their size."""
    made = nn.Linear(width_in, width_out, device="meta").to_empty(device="cpu")
    fill(made.weight, scale=width_in**-0.5)
    nn.init.zeros_(made.bias)
    return made


def head(width: int, size: int, *, aligned: bool) -> nn.Linear:
    """Scores over `size` words; aligned: over the next multiple of 8, the words beyond it zero."""
    made = linear(width, size)
    if aligned:
        wide = linear(width, -(-size // 8) * 8)
        wide.weight.data[:size], wide.weight.data[size:] = made.weight.data, 0
        made = wide
    return made


class Around(nn.Module):
    """A layer and what is done with its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.after(self.layer(hidden, *args, **kwargs))

    def after(self, out: torch.Tensor) -> torch.Tensor:
        """Nothing: subclasses say."""
        return out


class ReadsPeak(Around):
    """Looks at a value on the host after every layer."""

    def after(self, out: torch.Tensor) -> torch.Tensor:
        return out * 0.5 if out.amax().item() > 6e4 else out


class KeepsPeak(Around):
    """The same value, kept on the device for whoever reads it after the call."""

    def after(self, out: torch.Tensor) -> torch.Tensor:
        self.peak = out.amax()
        return out


class Waits(Around):
    """Waits for the device after every layer, as timing code left behind does."""

    def after(self, out: torch.Tensor) -> torch.Tensor:
        if out.is_cuda:
            torch.cuda.synchronize()
        return out


class RoundTrip(Around):
    """Takes the hidden states to the host and back."""

    def after(self, out: torch.Tensor) -> torch.Tensor:
        return out.cpu().to(out.device)


class Contiguous(Around):
    """Makes the transposed view contiguous, and contiguous again after turning it back."""

    def after(self, out: torch.Tensor) -> torch.Tensor:
        return out.transpose(1, 2).contiguous().transpose(1, 2).contiguous()


class Picked(Around):
    """Scales the rows of real tokens and clears the others, through lists of indices."""

    real: torch.Tensor
    padding: torch.Tensor

    def __init__(self, layer: nn.Module, keep: torch.Tensor) -> None:
        super().__init__(layer)
        self.register_buffer("real", keep.flatten().nonzero().flatten())
        self.register_buffer("padding", (~keep).flatten().nonzero().flatten())

    def after(self, out: torch.Tensor) -> torch.Tensor:
        rows = out.reshape(-1, out.shape[-1])
        real = rows[self.real]
        rows[self.real] = real * 0.5
        rows[self.padding] = torch.zeros((), dtype=rows.dtype, device=rows.device)
        return rows.view_as(out)


class Selected(Around):
    """The same under a mask."""

    keep: torch.Tensor

    def __init__(self, layer: nn.Module, keep: torch.Tensor) -> None:
        super().__init__(layer)
        self.register_buffer("keep", keep[..., None])

    def after(self, out: torch.Tensor) -> torch.Tensor:
        return torch.where(self.keep, out * 0.5, 0)


class FromHost(nn.Module):
    """A layer whose weights stay on the host and are copied over for every call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hidden = [layer]  # in a list: .to("cuda") does not find it

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self.hidden[0]
        weights = {name: weight.to(hidden.device) for name, weight in layer.named_parameters()}
        return torch.func.functional_call(layer, weights, (hidden, *args), kwargs)


class InMath(nn.Module):
    """Attention forced onto its math path, as one does to debug and forgets."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return self.inner(input_ids)


class Autocast(nn.Module):
    """fp32 weights under autocast."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.inner(x)


class Standardised(nn.Module):
    """Features put on a common scale by constants of `dtype`, then squashed by a polynomial."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.dtype = dtype

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        found = self.inner(input_ids).last_hidden_state
        mean = torch.linspace(-0.1, 0.1, found.shape[-1], dtype=self.dtype, device=found.device)
        x = (found - mean) * 0.25
        y = x * 0.01
        for _ in range(6):
            y = y * x + mean
        out: torch.Tensor = y.clamp(-3.0, 3.0).to(found.dtype)
        return out


class Vocabulary(nn.Module):
    """Hidden states to scores over `size` words; a wider head is cut."""

    def __init__(self, inner: nn.Module, head: nn.Linear, size: int) -> None:
        super().__init__()
        self.inner, self.head, self.size = inner, head, size

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.inner(input_ids).last_hidden_state)
        return scores[..., : self.size]


class Fed(nn.Module):
    """Brings its own batch from the host in every call; `x` only says where to."""

    def __init__(self, inner: nn.Module, batch: torch.Tensor, *, pinned: bool) -> None:
        super().__init__()
        self.inner = inner
        self.batch = batch.pin_memory() if pinned and torch.cuda.is_available() else batch

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(self.batch.to(x.device, non_blocking=True))


class Padded(nn.Module):
    """One batch, padded to its longest row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(input_ids, attention_mask=attention_mask).pooler_output
        return out


class Bucketed(nn.Module):
    """The same rows, sorted by length, in batches padded to their own longest."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batches: torch.Tensor) -> torch.Tensor:
        number = len(batches) // 2
        found = [self.inner(batches[f"ids{i}"], attention_mask=batches[f"attention_mask_{i}"]).pooler_output for i in range(number)]
        return torch.cat(found)


class Steps(nn.Module):
    """A small network called again and again on its own output, as a decoder's head or a controller is."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.first, self.second, self.steps = linear(width, width), linear(width, width), steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.steps):
            x = torch.tanh(x + self.second(functional.relu(self.first(x))))
        return x


class HandGelu(nn.Module):
    """Linear layers with the tanh form of GELU written out in element-wise ops."""

    def __init__(self, width: int, inner: int, blocks: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(linear(width, inner) for _ in range(blocks))
        self.down = nn.ModuleList(linear(inner, width) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            h = up(x)
            x = down(0.5 * h * (1.0 + torch.tanh(0.7978845608 * (h + 0.044715 * h * h * h))))
        return x


class Wide(nn.Module):
    """A few wide linear layers: all weights, little work."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = functional.relu(layer(x))
        return x


class Decoder(nn.Module):
    """A few tokens, one by one, through attention over a long cache: copied into a longer one each time (`grows`), or written in place."""

    def __init__(self, *, batch: int, heads: int, width: int, cached: int, layers: int, steps: int, grows: bool) -> None:
        super().__init__()
        self.heads, self.steps, self.cached, self.grows = heads, steps, cached, grows
        self.qkv = nn.ModuleList(linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(linear(width, width) for _ in range(layers))
        room = 0 if grows else steps
        for i in range(layers):
            for name in ("keys", "values"):
                cache = torch.empty(batch, heads, cached, width // heads, dtype=torch.float16)
                fill(cache, scale=0.5)
                self.register_buffer(f"{name}{i}", functional.pad(cache, (0, 0, 0, room)), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = range(len(self.qkv))
        caches = [(getattr(self, f"keys{i}"), getattr(self, f"values{i}")) for i in layers]
        for step in range(self.steps):
            for i in layers:
                q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv[i](x).chunk(3, -1))
                keys, values = caches[i]
                end = self.cached + step + 1
                if self.grows:
                    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
                    caches[i] = keys, values
                else:
                    keys[:, :, end - 1 : end], values[:, :, end - 1 : end] = k, v
                    keys, values = keys[:, :, :end], values[:, :, :end]
                y = functional.scaled_dot_product_attention(q, keys, values)
                x = x + self.out[i](y.transpose(1, 2).flatten(2))
        return x
