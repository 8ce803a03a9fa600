"""A tiny SDXL and a tiny Stable Diffusion 2.x, and the spellings that people's files of them have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tiny_model import levels

from sdrt.export.architecture import Architecture, ClipSpec, UNetSpec, VaeSpec
from sdrt.export.families.sd1 import CLIP
from sdrt.export.families.sdxl import CLIP_2

Tensors = Mapping[str, torch.Tensor]

_VAE = VaeSpec((32, 64), 1, 4, 0.18215)
TINY_SD2 = Architecture(
    "sd2",
    "epsilon",
    (512, 512),
    (ClipSpec(64, 2, 1, 96, 50, 77, activation="gelu", pad=0),),
    UNetSpec(4, 4, (64, 128), *levels((1, 1), (1, 0)).values(), 1, 64, True, None, 64, upcast_attention=True),
    _VAE,
)
TINY_XL = Architecture(
    "sdxl",
    "epsilon",
    (1024, 1024),
    (
        ClipSpec(64, 2, 1, 96, 50, 77, final_norm=False),
        ClipSpec(64, 3, 1, 96, 50, 77, activation="gelu", final_norm=False, projection=32, pad=0),
    ),
    UNetSpec(4, 4, (64, 128), *levels((1, 1), (0, 2)).values(), 2, 128, True, None, 64, vector_width=32 + 6 * 256),
    VaeSpec((32, 64), 1, 4, 0.13025),
    last_layer=2,
    sizes=6,
    size_width=256,
    zero_empty=True,
)

_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}


def open_clip(tensors: Tensors, prefix: str, new: str) -> dict[str, torch.Tensor]:
    """The tensors with those of the text encoder below `prefix` as OpenCLIP stores them, below `new`."""
    spelled = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    for name in (name for name in tensors if name.startswith(prefix)):
        below = name.removeprefix(prefix)
        if "self_attn.q_proj." in below:
            qkv = [tensors[name.replace("q_proj", part + "_proj")] for part in "qkv"]
            below = below.replace("self_attn.q_proj.", "attn.in_proj_")
            for theirs, ours in _OPEN_CLIP.items():
                below = below.replace(theirs, ours)
            spelled[new + below] = torch.cat(qkv)
        elif below == "text_projection.weight":
            spelled[new + "text_projection"] = tensors[name].T.contiguous()
        elif ".k_proj." not in below and ".v_proj." not in below:
            for theirs, ours in _OPEN_CLIP.items():
                below = below.replace(theirs, ours)
            spelled[new + below] = tensors[name]
    return spelled | {new + "logit_scale": torch.ones(())}


def renamed(tensors: Tensors, prefixes: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors with other prefixes."""
    found = {}
    for name, tensor in tensors.items():
        old = next((old for old in prefixes if name.startswith(old)), "")
        found[prefixes.get(old, "") + name.removeprefix(old)] = tensor
    return found


def sgm(tensors: Tensors) -> dict[str, torch.Tensor]:
    """An SDXL in the layout of its first release."""
    return renamed(
        open_clip(tensors, CLIP_2, "conditioner.embedders.1.model."), {CLIP: "conditioner.embedders.0.transformer."}
    )
