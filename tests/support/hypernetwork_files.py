"""Hypernetworks as AUTOMATIC1111 saves them, and what they compute, written from the formulas; independent of sdrt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Elementwise = Callable[[Tensor], Tensor]


def _softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def _elu(x: Tensor, scale: float = 1.0, alpha: float = 1.0) -> Tensor:
    return scale * torch.where(x > 0, x, alpha * (torch.exp(x.clamp(max=0)) - 1))


def _leaky(slope: float) -> Elementwise:
    return lambda x: torch.where(x > 0, x, slope * x)


ACTIVATIONS: dict[str, Elementwise] = {
    "relu": lambda x: x.clamp(min=0),
    "leakyrelu": _leaky(0.01),
    "elu": _elu,
    "swish": lambda x: x * (x / 6 + 0.5).clamp(0, 1),  # Hardswish, whatever the name says
    "tanh": lambda x: 2 / (1 + torch.exp(-2 * x)) - 1,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "celu": _elu,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "hardshrink": lambda x: torch.where(x.abs() > 0.5, x, torch.zeros_like(x)),
    "hardsigmoid": lambda x: (x / 6 + 0.5).clamp(0, 1),
    "hardswish": lambda x: x * (x / 6 + 0.5).clamp(0, 1),
    "hardtanh": lambda x: x.clamp(-1, 1),
    "logsigmoid": lambda x: -_softplus(-x),
    "mish": lambda x: x * torch.tanh(_softplus(x)),
    "relu6": lambda x: x.clamp(0, 6),
    "rrelu": _leaky((1 / 8 + 1 / 3) / 2),
    "selu": lambda x: _elu(x, 1.0507009873554805, 1.6732632423543772),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "softplus": _softplus,
    "softshrink": lambda x: torch.sign(x) * (x.abs() - 0.5).clamp(min=0),
    "softsign": lambda x: x / (1 + x.abs()),
    "tanhshrink": lambda x: x - torch.tanh(x),
}
"""By the name AUTOMATIC1111 gives them, at inference."""


@dataclass(frozen=True)
class Settings:
    """What AUTOMATIC1111 asks for when it makes a hypernetwork; dropout has a probability for each width of the
    structure.
    """

    widths: tuple[int, ...] = (64, 96, 128)
    structure: tuple[float, ...] = (1, 2, 1)
    activation: str | None = "linear"
    layer_norm: bool = False
    dropout: tuple[float, ...] | None = None
    activate_output: bool = True

    def layers(self, width: int) -> list[tuple[str, int, int]]:
        """The torch.nn layers of one network, in order: kind, and widths before and after."""
        found = []
        for i in range(len(self.structure) - 1):
            before, after = int(width * self.structure[i]), int(width * self.structure[i + 1])
            found.append(("linear", before, after))
            if self.activation not in (None, "linear") and (i < len(self.structure) - 2 or self.activate_output):
                found.append(("activation", after, after))
            if self.layer_norm:
                found.append(("norm", after, after))
            if self.dropout is not None and self.dropout[i + 1] > 0:
                found.append(("dropout", after, after))
        return found


def state(settings: Settings, width: int, generator: torch.Generator, size: float = 0.5) -> dict[str, Tensor]:
    """One network's tensors. `size` is about that of what it adds to an input of size 1."""
    tensors = {}
    for index, (kind, before, after) in enumerate(settings.layers(width)):
        if kind == "linear":
            tensors[f"linear.{index}.weight"] = (
                torch.randn(after, before, generator=generator) * size / math.sqrt(before)
            )
            tensors[f"linear.{index}.bias"] = torch.randn(after, generator=generator) * size / 4
        elif kind == "norm":
            tensors[f"linear.{index}.weight"] = size * (1 + 0.2 * torch.randn(after, generator=generator))
            tensors[f"linear.{index}.bias"] = torch.randn(after, generator=generator) * size / 4
    return tensors


def content(settings: Settings, seed: int, **changed: Any) -> dict[Any, Any]:
    """What a hypernetwork's .pt holds. None among `changed` leaves a setting out."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[Any, Any] = {
        width: (state(settings, width, generator), state(settings, width, generator)) for width in settings.widths
    }
    made |= {
        "step": 100,
        "name": "other",
        "layer_structure": list(settings.structure),
        "activation_func": settings.activation,
        "is_layer_norm": settings.layer_norm,
        "weight_initialization": "Normal",
        "use_dropout": settings.dropout is not None,
        "sd_checkpoint": "6ce0161689",
        "sd_checkpoint_name": "v1-5",
        "activate_output": settings.activate_output,
        "last_layer_dropout": False,
        "dropout_structure": None if settings.dropout is None else list(settings.dropout),
        "optional_info": None,
    }
    return {key: value for key, value in (made | changed).items() if key not in changed or changed[key] is not None}


def save(path: Path, settings: Settings, seed: int, **changed: Any) -> Path:
    torch.save(content(settings, seed, **changed), path)
    return path


def apply(settings: Settings, tensors: Mapping[str, Tensor], x: Tensor, scale: float) -> Tensor:
    """x + scale * layers(x), in the type of `x`."""
    h = x
    for index, (kind, _, _) in enumerate(settings.layers(x.shape[-1])):
        if kind == "activation":
            assert settings.activation is not None
            h = ACTIVATIONS[settings.activation](h)
        elif kind != "dropout":
            weight, bias = tensors[f"linear.{index}.weight"].to(x.dtype), tensors[f"linear.{index}.bias"].to(x.dtype)
            if kind == "linear":
                h = h @ weight.T + bias
            else:
                h = h - h.mean(dim=-1, keepdim=True)
                h = h / torch.sqrt((h**2).mean(dim=-1, keepdim=True) + 1e-5) * weight + bias
    return x + scale * h


Chain = Sequence[tuple[Settings, Mapping[Any, Any], float]]
"""Hypernetworks in order: settings, content and scale."""


def keys_and_values(chain: Chain, x: Tensor) -> tuple[Tensor, Tensor]:
    """What keys and what values are made from."""
    keys = values = x
    for settings, tensors, scale in chain:
        if x.shape[-1] in tensors:
            keys = apply(settings, tensors[x.shape[-1]][0], keys, scale)
            values = apply(settings, tensors[x.shape[-1]][1], values, scale)
    return keys, values


class Processor:
    """diffusers' attention with hypernetworks, for every attention layer of its UNet."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        keys, values = keys_and_values(self.chain, context)
        q, k, v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(keys), attn.to_v(values))
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        out: Tensor = attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))
        return out
