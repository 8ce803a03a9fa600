"""What tests of adapters share: modules of the emoji model in every spelling, and ways to open and compare."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from conftest import CHECKPOINT
from torch import nn

from sdrt.export.adapters.match import Lora, LoraOption, open_lora
from sdrt.export.architecture import Architecture
from sdrt.export.families.sd1 import CLIP, UNET
from sdrt.export.graph import recipes
from sdrt.export.read.checkpoint import open_checkpoint
from sdrt.export.skeletons import weights_of

M = TypeVar("M", bound=nn.Module)


def change_of(lora: Lora, weight: str, current: torch.Tensor) -> torch.Tensor:
    """What a LoRA adds to a weight, as a tensor."""
    return torch.from_numpy(lora.change(weight, current.float().numpy()))


# One module of each kind: its canonical name, kohya's, and its path in diffusers' UNet or transformers' text model.
_BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0."
LINEAR = (
    UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k",
    "lora_unet_" + _BLOCK.replace(".", "_") + "attn2_to_k",
    _BLOCK + "attn2.to_k",
)
SQUARE = (
    UNET + "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "lora_unet_" + _BLOCK.replace(".", "_") + "attn1_to_q",
    _BLOCK + "attn1.to_q",
)
POINTWISE = (
    UNET + "input_blocks.4.1.proj_in",
    "lora_unet_down_blocks_1_attentions_0_proj_in",
    "down_blocks.1.attentions.0.proj_in",
)
KERNEL = (
    UNET + "input_blocks.4.0.in_layers.2",
    "lora_unet_down_blocks_1_resnets_0_conv1",
    "down_blocks.1.resnets.0.conv1",
)
NORM = (
    UNET + "input_blocks.4.0.in_layers.0",
    "lora_unet_down_blocks_1_resnets_0_norm1",
    "down_blocks.1.resnets.0.norm1",
)
LAYER_NORM = (
    CLIP + "text_model.final_layer_norm",
    "lora_te_text_model_final_layer_norm",
    "text_model.final_layer_norm",
)
TEXT = (
    CLIP + "text_model.encoder.layers.0.mlp.fc1",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "text_model.encoder.layers.0.mlp.fc1",
)
QUERY = (
    CLIP + "text_model.encoder.layers.0.self_attn.q_proj",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    "text_model.encoder.layers.0.self_attn.q_proj",
)
EMBEDDING = (
    CLIP + "text_model.embeddings.position_embedding",
    "lora_te_text_model_embeddings_position_embedding",
    "text_model.embeddings.position_embedding",
)


@cache
def architecture() -> Architecture:
    """The emoji model's."""
    checkpoint = open_checkpoint(CHECKPOINT)
    checkpoint.close()
    return checkpoint.architecture


@cache
def model() -> tuple[dict[str, tuple[int, ...]], Architecture]:
    """Names and shapes of the emoji model's weights, and its architecture."""
    arch = architecture()
    return {name: shape for recipe in recipes(arch).values() for name, shape in weights_of(recipe).items()}, arch


def opened(path: Path, scale: float = 1.0, te_scale: float | None = None, *, allow_unmatched: bool = False) -> Lora:
    """An adapter matched to the emoji model."""
    shapes, arch = model()
    return open_lora(
        LoraOption(path, scale, scale if te_scale is None else te_scale), shapes, arch, allow_unmatched=allow_unmatched
    )


def randomised(module: M, seed: int, keep: Collection[str] = ()) -> M:
    """Every parameter and buffer replaced by seeded numbers away from zero, except those named."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if name not in keep:
                value.copy_(0.2 + 0.3 * torch.randn(value.shape, generator=generator))
    return module.requires_grad_(False)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error, in L2 norms."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())
