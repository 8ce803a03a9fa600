"""Name tables: LDM to diffusers against diffusers' own parameter names, and kohya's spelling of both."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import CHECKPOINT, LORA
from safetensors import safe_open
from tiny_model import regular_unet

from sdrt.export.architecture import UNetSpec
from sdrt.export.families.keys import adapter_names, diffusers_module
from sdrt.export.families.sd1 import CLIP, SD1, UNET
from sdrt.export.networks.unet import UNet

SPECS = {
    "emoji": regular_unet((64, 96, 128, 128), (2, 2, 2, 2), (1, 1, 1, 0), 1, 64, linear=False),
    "SD 1.5": regular_unet((320, 640, 1280, 1280), (2, 2, 2, 2), (1, 1, 1, 0), 1, 768, linear=False),
    "linear projections": regular_unet((32, 64), (2, 2), (1, 1), 1, 64, linear=True),
    "attention below only": regular_unet((32, 64, 64), (3, 3, 3), (0, 1, 1), 1, 96, linear=False),
    "many levels": regular_unet((32, 32, 32, 32, 32, 64), (1, 1, 1, 1, 1, 1), (1, 0, 1, 0, 1, 0), 1, 64, linear=False),
}


def ours(spec: UNetSpec) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in UNet(spec).named_parameters()}


def theirs(spec: UNetSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of diffusers' own UNet of these sizes."""
    from diffusers import UNet2DConditionModel

    down = ["CrossAttnDownBlock2D" if any(depth) else "DownBlock2D" for depth in spec.down_depth]
    up = ["CrossAttnUpBlock2D" if any(depth) else "UpBlock2D" for depth in reversed(spec.up_depth)]
    options: dict[str, Any] = {
        "attention_head_dim": spec.heads,
        "use_linear_projection": spec.linear_projections,
        "norm_num_groups": 32,
    }
    with torch.device("meta"):
        model = UNet2DConditionModel(
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            block_out_channels=spec.channels,
            layers_per_block=spec.res_blocks[0],
            cross_attention_dim=spec.context_width,
            **options,
        )
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def translated(name: str, spec: UNetSpec) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{diffusers_module(module, spec)}.{leaf}"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_every_weight_has_one_diffusers_name_and_no_name_is_left(spec: UNetSpec) -> None:
    mine, other = ours(spec), theirs(spec)
    table = {name: translated(name, spec) for name in mine}
    assert len(set(table.values())) == len(table)
    assert set(table.values()) == other.keys()
    for name, diffusers in table.items():
        assert mine[name] == other[diffusers], (name, diffusers)


@pytest.mark.parametrize(
    ("ldm", "diffusers"),
    [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks.4.0.skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        ("input_blocks.11.0.emb_layers.1", "down_blocks.3.resnets.1.time_emb_proj"),
        (
            "middle_block.1.transformer_blocks.0.attn1.to_out.0",
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        ),
        ("middle_block.2.out_layers.3", "mid_block.resnets.1.conv2"),
        ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
        (
            "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj",
            "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj",
        ),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ],
)
def test_known_names(ldm: str, diffusers: str) -> None:
    """Written down from diffusers' conversion script for Stable Diffusion 1.5."""
    assert diffusers_module(ldm, SPECS["SD 1.5"]) == diffusers


@pytest.mark.parametrize("module", ["", "out.7", "input_blocks.99.0.in_layers.0", "input_blocks", "label_emb.0.1"])
def test_names_of_no_module(module: str) -> None:
    with pytest.raises(KeyError):
        diffusers_module(module, SPECS["emoji"])


def checkpoint_modules() -> list[str]:
    with safe_open(CHECKPOINT, "pt") as file:
        return [name.removesuffix(".weight") for name in file.keys() if name.endswith(".weight")]  # noqa: SIM118  safe_open is no mapping


def test_adapter_names_cover_the_emoji_lora() -> None:
    table = adapter_names(checkpoint_modules(), SPECS["emoji"], SD1)
    with safe_open(LORA, "pt") as file:
        keys = list(file.keys())
    assert len(keys) == 744
    parts = Counter[str]()
    modules = set()
    for key in keys:
        part = next(suffix for suffix in (".lora_down.weight", ".lora_up.weight", ".alpha") if key.endswith(suffix))
        parts[part] += 1
        modules.add(key.removesuffix(part))
    assert set(parts.values()) == {248}
    assert modules <= table.keys()
    assert len({table[module] for module in modules}) == len(modules) == 248


def test_every_module_has_its_names_in_each_spelling_and_none_is_ambiguous() -> None:
    modules = checkpoint_modules()
    table = adapter_names(modules, SPECS["emoji"], SD1)
    prefixes = {
        UNET: ("lora_unet_", "lycoris_", "unet.", "diffusion_model."),
        CLIP: ("lora_te_", "lora_te1_", "text_encoder.", "lycoris_text_model_"),
    }
    for network, spellings in prefixes.items():
        for spelling in spellings:
            named = {
                module for name, module in table.items() if name.startswith(spelling) and module.startswith(network)
            }
            assert named == {module for module in modules if module.startswith(network)}, spelling
    assert all(module.startswith((UNET, CLIP)) for module in table.values())
    # Every name is claimed by one module only: building the table backwards gives the same.
    assert adapter_names(modules[::-1], SPECS["emoji"], SD1) == table


@pytest.mark.parametrize(
    ("name", "module"),
    [
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
            "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
        ),
        (
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0",
            "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
        ),
        ("lora_unet_mid_block_resnets_0_conv1", "middle_block.0.in_layers.2"),
        ("lora_unet_up_blocks_2_upsamplers_0_conv", "output_blocks.8.2.conv"),
        ("lora_unet_conv_in", "input_blocks.0.0"),
        ("lora_unet_input_blocks_0_0", "input_blocks.0.0"),
        ("lycoris_down_blocks_0_resnets_0_norm1", "input_blocks.1.0.in_layers.0"),
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
        ),
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out",
            "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
        ),
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k",
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
        ),
        ("down_blocks.0.attentions.0.proj_in", "input_blocks.1.1.proj_in"),
        ("diffusion_model.middle_block.1.proj_out", "middle_block.1.proj_out"),
    ],
)
def test_known_names_in_adapters(name: str, module: str) -> None:
    assert adapter_names(checkpoint_modules(), SPECS["emoji"], SD1)[name] == UNET + module


@pytest.mark.parametrize(
    "name",
    [
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
        "lora_te1_text_model_encoder_layers_1_self_attn_q_proj",
        "lycoris_text_model_encoder_layers_1_self_attn_q_proj",
        "text_encoder.text_model.encoder.layers.1.self_attn.q_proj",
        "text_encoder.text_model.encoder.layers.1.self_attn.to_q",
        "text_encoder.encoder.layers.1.self_attn.q_proj",
        "text_model.encoder.layers.1.self_attn.q_proj",
    ],
)
def test_known_names_of_the_text_encoder(name: str) -> None:
    table = adapter_names(checkpoint_modules(), SPECS["emoji"], SD1)
    assert table[name] == CLIP + "text_model.encoder.layers.1.self_attn.q_proj"
