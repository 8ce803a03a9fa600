"""Adapters of SDXL and Stable Diffusion 2.x: every spelling of their modules, joined projections, files that diffusers
and peft write, embeddings for two text encoders, and files of one family given to another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_files import change_of
from conftest import CHECKPOINT, EMOJI, EMOJI_XL, LORA
from safetensors.torch import save_file
from tiny_model import expected_shapes, header_only, levels, seeded

from sdrt.errors import AdapterError
from sdrt.export.adapters.embedding import EmbeddingOption, bundled_embeddings, extended_tables, open_embedding
from sdrt.export.adapters.match import Lora, LoraOption, open_lora
from sdrt.export.architecture import Architecture, ClipSpec, UNetSpec, VaeSpec
from sdrt.export.fitting import fit
from sdrt.export.inspect import inspect_file

Tensors = dict[str, torch.Tensor]
UNET, CLIP, CLIP_2 = "model.diffusion_model.", "cond_stage_model.transformer.", "conditioner.embedders.1.transformer."
BLOCK = "transformer_blocks.1.attn2.to_k"
LAYER, LAYER_2 = CLIP + "text_model.encoder.layers.0.", CLIP_2 + "text_model.encoder.layers.1."
MLP = ("mlp.fc1", "mlp.fc2")

CLIP_L = ClipSpec(64, 3, 1, 96, 50, 77, clip_skip=(2,), final_norm=False)
SDXL = Architecture(
    "sdxl",
    "epsilon",
    (64, 64),
    (CLIP_L, ClipSpec(128, 2, 2, 160, 50, 77, (2,), "gelu", final_norm=False, projection=96, pad=0)),
    UNetSpec(
        4, 4, (32, 64, 64), *levels((2, 2, 2), (0, 2, 2)).values(), 2, 192, True, None, 64, vector_width=96 + 6 * 256
    ),
    VaeSpec((32, 32), 1, 4, 0.13025),
    last_layer=2,
    sizes=6,
    size_width=256,
)
SD2 = replace(
    SDXL,
    family="sd2",
    texts=(ClipSpec(64, 2, 1, 96, 50, 77, activation="gelu", pad=0),),
    unet=UNetSpec(4, 4, (64, 64), *levels((2, 2), (1, 0)).values(), 1, 64, True, None, 64, upcast_attention=True),
    last_layer=1,
    sizes=0,
    size_width=0,
)


def opened(path: Path, arch: Architecture, *, scale: float = 1.0, allow_unmatched: bool = False) -> Lora:
    return open_lora(LoraOption(path, scale, scale), expected_shapes(arch), arch, allow_unmatched=allow_unmatched)


def refused(path: Path, arch: Architecture, tensors: Mapping[str, torch.Tensor], *fragments: str) -> AdapterError:
    save_file(dict(tensors), path)
    with pytest.raises(AdapterError) as caught:
        opened(path, arch)
    for fragment in fragments:
        assert fragment in caught.value.message, caught.value.message
    return caught.value


def check_changes(path: Path, arch: Architecture, expected: Mapping[str, torch.Tensor]) -> Lora:
    """An adapter changes exactly these weights, by exactly that, on top of the model's own."""
    base = seeded(arch)
    adapter = opened(path, arch)
    with adapter.file:
        assert adapter.deltas.keys() == expected.keys() and adapter.unmatched == ()
        for weight, change in expected.items():
            torch.testing.assert_close(change_of(adapter, weight, base[weight]), change.float(), rtol=2e-5, atol=2e-5)
    return adapter


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "style.safetensors"


# Spellings, written down from each tool's files: what the file says, and the weight that it means.

SPELLINGS: dict[str, tuple[Architecture, dict[str, str]]] = {
    "kohya, UNet as Stability's code has it": (
        SDXL,
        {
            "lora_unet_input_blocks_0_0": UNET + "input_blocks.0.0",
            "lora_unet_input_blocks_3_0_op": UNET + "input_blocks.3.0.op",
            "lora_unet_input_blocks_4_0_in_layers_2": UNET + "input_blocks.4.0.in_layers.2",
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": UNET + "input_blocks.4.1." + BLOCK,
            "lora_unet_input_blocks_8_1_transformer_blocks_0_ff_net_0_proj": UNET
            + "input_blocks.8.1.transformer_blocks.0.ff.net.0.proj",
            "lora_unet_middle_block_1_proj_in": UNET + "middle_block.1.proj_in",
            "lora_unet_output_blocks_2_2_conv": UNET + "output_blocks.2.2.conv",
            "lora_unet_output_blocks_5_1_transformer_blocks_1_attn1_to_out_0": UNET
            + "output_blocks.5.1.transformer_blocks.1.attn1.to_out.0",
            "lora_unet_time_embed_0": UNET + "time_embed.0",
            "lora_unet_label_emb_0_0": UNET + "label_emb.0.0",
            "lora_unet_label_emb_0_2": UNET + "label_emb.0.2",
            "lora_unet_out_2": UNET + "out.2",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": LAYER + "self_attn.q_proj",
            "lora_te2_text_model_encoder_layers_1_self_attn_q_proj": LAYER_2 + "self_attn.q_proj",
            "lora_te2_text_model_encoder_layers_1_mlp_fc1": LAYER_2 + "mlp.fc1",
            "lora_te2_text_projection": CLIP_2 + "text_projection",
        },
    ),
    "kohya, UNet as diffusers has it": (
        SDXL,
        {
            "lora_unet_conv_in": UNET + "input_blocks.0.0",
            "lora_unet_down_blocks_0_downsamplers_0_conv": UNET + "input_blocks.3.0.op",
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k": UNET + "input_blocks.4.1." + BLOCK,
            "lora_unet_mid_block_attentions_0_proj_in": UNET + "middle_block.1.proj_in",
            "lora_unet_up_blocks_0_upsamplers_0_conv": UNET + "output_blocks.2.2.conv",
            "lora_unet_up_blocks_1_attentions_2_transformer_blocks_1_attn1_to_out_0": UNET
            + "output_blocks.5.1.transformer_blocks.1.attn1.to_out.0",
            "lora_unet_up_blocks_2_resnets_2_conv_shortcut": UNET + "output_blocks.8.0.skip_connection",
            "lora_unet_time_embedding_linear_1": UNET + "time_embed.0",
            "lora_unet_add_embedding_linear_1": UNET + "label_emb.0.0",
            "lora_unet_add_embedding_linear_2": UNET + "label_emb.0.2",
            "lora_unet_conv_out": UNET + "out.2",
        },
    ),
    "diffusers and peft": (
        SDXL,
        {
            "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": UNET + "input_blocks.4.1." + BLOCK,
            "unet.add_embedding.linear_1": UNET + "label_emb.0.0",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": LAYER + "self_attn.q_proj",
            "text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj": LAYER_2 + "self_attn.q_proj",
            "text_encoder_2.encoder.layers.1.mlp.fc2": LAYER_2 + "mlp.fc2",
            "text_encoder_2.base_model.model.text_model.encoder.layers.1.mlp.fc1": LAYER_2 + "mlp.fc1",
        },
    ),
    "AUTOMATIC1111's own": (
        SDXL,
        {
            "diffusion_model_input_blocks_4_1_transformer_blocks_1_attn2_to_k": UNET + "input_blocks.4.1." + BLOCK,
            "0_transformer_text_model_encoder_layers_0_self_attn_q_proj": LAYER + "self_attn.q_proj",
            "1_model_transformer_resblocks_1_attn_q_proj": LAYER_2 + "self_attn.q_proj",
            "1_model_transformer_resblocks_1_attn_k_proj": LAYER_2 + "self_attn.k_proj",
            "1_model_transformer_resblocks_1_attn_v_proj": LAYER_2 + "self_attn.v_proj",
            "1_model_transformer_resblocks_1_attn_out_proj": LAYER_2 + "self_attn.out_proj",
            "1_model_transformer_resblocks_1_mlp_c_fc": LAYER_2 + "mlp.fc1",
            "1_model_transformer_resblocks_1_mlp_c_proj": LAYER_2 + "mlp.fc2",
        },
    ),
    "ComfyUI, OneTrainer and sliders": (
        SDXL,
        {
            "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k": UNET + "input_blocks.4.1." + BLOCK,
            "diffusion_model.label_emb.0.0": UNET + "label_emb.0.0",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": LAYER + "mlp.fc1",
            "text_encoders.clip_g.transformer.text_model.encoder.layers.1.mlp.fc1": LAYER_2 + "mlp.fc1",
            "text_encoders.clip_g.transformer.text_projection": CLIP_2 + "text_projection",
        },
    ),
    "the checkpoint's": (
        SDXL,
        {
            "model.diffusion_model.out.2": UNET + "out.2",
            "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1": LAYER + "mlp.fc1",
            "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_proj": LAYER_2 + "mlp.fc2",
            "conditioner.embedders.1.model.transformer.resblocks.0.attn.out_proj": CLIP_2
            + "text_model.encoder.layers.0.self_attn.out_proj",
        },
    ),
    "LyCORIS": (
        SDXL,
        {
            "lycoris_input_blocks_4_1_proj_out": UNET + "input_blocks.4.1.proj_out",
            "lycoris_te1_text_model_encoder_layers_0_mlp_fc2": LAYER + "mlp.fc2",
            "lycoris_te2_text_model_encoder_layers_1_mlp_fc2": LAYER_2 + "mlp.fc2",
        },
    ),
    "Stable Diffusion 2.x": (
        SD2,
        {
            "lora_unet_down_blocks_0_attentions_0_proj_in": UNET + "input_blocks.1.1.proj_in",
            "lora_unet_output_blocks_5_1_proj_out": UNET + "output_blocks.5.1.proj_out",
            "lora_te_text_model_encoder_layers_0_self_attn_v_proj": LAYER + "self_attn.v_proj",
            "cond_stage_model.model.transformer.resblocks.1.mlp.c_fc": CLIP + "text_model.encoder.layers.1.mlp.fc1",
            "text_encoder.text_model.encoder.layers.1.mlp.fc2": CLIP + "text_model.encoder.layers.1.mlp.fc2",
        },
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_module_means_its_weight_in_every_spelling(file: Path, name: str) -> None:
    """Ranks differ by module; where no alpha is given, the scale is 1."""
    arch, modules = SPELLINGS[name]
    random, tensors, expected = torch.Generator().manual_seed(0), Tensors(), Tensors()
    for i, (module, canonical) in enumerate(modules.items()):
        shape, rank = expected_shapes(arch)[canonical + ".weight"], 1 + i % 4
        up = torch.randn(shape[0], rank, *[1] * len(shape[2:]), generator=random)
        down = torch.randn(rank, *shape[1:], generator=random)
        tensors |= {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
        if i % 3 == 2:
            tensors[f"{module}.alpha"] = torch.tensor(0.5)
        scale = 0.5 / rank if i % 3 == 2 else 1.0
        expected[canonical + ".weight"] = scale * torch.einsum("or,ri...->oi...", up.flatten(1), down)
    save_file(tensors, file)
    check_changes(file, arch, expected)
    found = inspect_file(file)["modules"]
    assert found.get("text_encoder_2", 0) == sum(weight.startswith(CLIP_2) for weight in expected)
    assert found.get("unet", 0) == sum(weight.startswith(UNET) for weight in expected)


# Kinds: formulas in float64, on a convolution, a matrix of the vector's, and two of the second text encoder's


def loha(shape: tuple[int, ...], make: Callable[..., torch.Tensor]) -> tuple[Tensors, torch.Tensor]:
    flat = math.prod(shape[1:])
    parts = [make(shape[0], 3), make(3, flat), make(shape[0], 3), make(3, flat)]
    a, b, c, d = (part.double() for part in parts)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return dict(zip(names, parts, strict=True)), ((a @ b) * (c @ d)).reshape(shape)


def lokr(shape: tuple[int, ...], make: Callable[..., torch.Tensor]) -> tuple[Tensors, torch.Tensor]:
    small = make(2, 2)
    large = make(shape[0] // 2, shape[1] // 2, *shape[2:])
    return (
        {"lokr_w1": small, "lokr_w2": large},
        torch.kron(small.double().reshape(2, 2, *[1] * len(shape[2:])), large.double()),
    )


def full(shape: tuple[int, ...], make: Callable[..., torch.Tensor]) -> tuple[Tensors, torch.Tensor]:
    whole = make(*shape)
    return {"diff": whole}, whole.double()


@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("kind", [loha, lokr, full])
def test_kinds_on_modules_of_sdxl(file: Path, kind: Callable[..., tuple[Tensors, torch.Tensor]], dora: bool) -> None:
    random, tensors, expected = torch.Generator().manual_seed(1), Tensors(), Tensors()

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    modules = {
        "lora_unet_input_blocks_0_0": UNET + "input_blocks.0.0",
        "lora_unet_label_emb_0_0": UNET + "label_emb.0.0",
        "lora_te2_text_model_encoder_layers_1_mlp_fc1": LAYER_2 + "mlp.fc1",
        "lora_te2_text_projection": CLIP_2 + "text_projection",
    }
    for module, canonical in modules.items():
        weight = canonical + ".weight"
        base = seeded(SDXL)[weight].double()
        parts, change = kind(tuple(base.shape), make)
        tensors |= {f"{module}.{part}": value for part, value in parts.items()}
        if dora:
            moved, rest = base + change, list(range(1, base.dim()))
            magnitude = make(base.shape[0], *[1] * len(rest)).abs()
            tensors[f"{module}.dora_scale"] = magnitude
            change = moved * magnitude.double() / moved.square().sum(rest, keepdim=True).sqrt() - base
        expected[weight] = change
    norm = UNET + "input_blocks.4.1.norm"
    tensors |= {"lora_unet_input_blocks_4_1_norm.w_norm": make(64), "lora_unet_input_blocks_4_1_norm.b_norm": make(64)}
    for leaf, part in (("weight", "w_norm"), ("bias", "b_norm")):
        expected[f"{norm}.{leaf}"] = tensors[f"lora_unet_input_blocks_4_1_norm.{part}"].double()
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    check_changes(file, SDXL, expected)


# A change of OpenCLIP's joined projection is one of queries, keys and values, by rows.

JOINED = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj"
PARTS = [f"{CLIP_2}text_model.encoder.layers.0.self_attn.{part}_proj" for part in "qkv"]


@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
def test_joined_projection(file: Path, dora: bool) -> None:
    random, base = torch.Generator().manual_seed(2), seeded(SDXL)
    up, down = torch.randn(384, 4, generator=random), torch.randn(4, 128, generator=random)
    bias, magnitude = torch.randn(384, generator=random), torch.rand(384, 1, generator=random)
    tensors = {f"{JOINED}.lora_up.weight": up, f"{JOINED}.lora_down.weight": down, f"{JOINED}.diff_b": bias}
    joined = torch.cat([base[f"{part}.weight"] for part in PARTS]).double()
    change = up.double() @ down.double()
    if dora:
        tensors[f"{JOINED}.dora_scale"] = magnitude
        moved = joined + change
        change = moved * magnitude / moved.norm(dim=1, keepdim=True) - joined
    expected = {f"{part}.weight": rows for part, rows in zip(PARTS, change.chunk(3), strict=True)}
    expected |= {f"{part}.bias": rows for part, rows in zip(PARTS, bias.chunk(3), strict=True)}
    save_file(tensors, file)
    check_changes(file, SDXL, expected)


def test_joined_projection_beside_a_part_of_it_and_with_magnitudes_of_inputs(file: Path) -> None:
    joined = {f"{JOINED}.lora_up.weight": torch.ones(384, 4), f"{JOINED}.lora_down.weight": torch.ones(4, 128)}
    query = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    both = {f"{query}.lora_up.weight": torch.ones(128, 4), f"{query}.lora_down.weight": torch.ones(4, 128)}
    refused(file, SDXL, joined | both, f"changes {PARTS[0]}.weight, which another key of the file changes too")
    refused(file, SDXL, joined | {f"{JOINED}.dora_scale": torch.ones(1, 128)}, "a magnitude for each input")


# Files that diffusers and peft write


@pytest.mark.parametrize("writer", ["peft", "kohya"])
def test_file_that_diffusers_saves(tmp_path: Path, writer: str) -> None:
    """The change of each module that peft itself computes, under the name by which diffusers reads a checkpoint; the
    file as StableDiffusionXLPipeline saves it, or as diffusers turns it into kohya's format.
    """
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    spec = SDXL.unet
    unet = UNet2DConditionModel(
        block_out_channels=spec.channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        attention_head_dim=(1, 1, 1),
        cross_attention_dim=spec.context_width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=spec.vector_width,
    )
    clip = SDXL.texts[1]
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=clip.vocabulary,
            hidden_size=clip.width,
            intermediate_size=clip.mlp_width,
            num_hidden_layers=clip.layers,
            num_attention_heads=clip.heads,
            projection_dim=clip.projection,
        )
    )
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv1", "conv_in", "add_embedding.linear_1", "conv"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=targets))
    text.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "out_proj", "fc1"]))
    random = torch.Generator().manual_seed(3)
    for name, parameter in [*unet.named_parameters(), *text.named_parameters()]:
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=random)
    ldm = {name: tensor for name, tensor in seeded(SDXL).items() if name.startswith(UNET)}
    own = {id(tensor): name for name, tensor in ldm.items()}
    names = {
        name: own[id(tensor)] for name, tensor in convert_ldm_unet_checkpoint(dict(ldm), dict(unet.config)).items()
    }
    expected = {
        names[f"{name}.weight"]: module.get_delta_weight("default").detach()
        for name, module in unet.named_modules()
        if hasattr(module, "get_delta_weight")
    } | {
        f"{CLIP_2}{name}.weight": module.get_delta_weight("default").detach()
        for name, module in text.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert len(expected) > 60 and CLIP_2 + "text_model.encoder.layers.1.mlp.fc1.weight" in expected
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        text_encoder_2_lora_layers=get_peft_model_state_dict(text),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        text_encoder_2_lora_adapter_metadata=text.peft_config["default"].to_dict(),
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    if writer == "kohya":
        stored = convert_state_dict_to_kohya(load_file(path))
        for name in [name for name in stored if name.endswith(".alpha")]:  # it writes the rank
            stored[name] = torch.tensor(3.0 if name.startswith("lora_te2_") else 2.0)
        path = tmp_path / "kohya.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path)
        assert "lora_te2_text_model_encoder_layers_1_mlp_fc1.lora_down.weight" in stored
    check_changes(path, SDXL, expected)


# Files of one family given to another: nothing but the header is read. The files' data is a hole.

PAIR = ("lora_down.weight", "lora_up.weight")


def pairs(modules: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """Shapes of a LoRA of rank 4, from modules to their outputs and inputs."""
    return {
        f"{module}.{part}": shape
        for module, (outputs, inputs) in modules.items()
        for part, shape in zip(PAIR, ((4, inputs), (outputs, 4)), strict=True)
    }


SD1_LORA = pairs(
    {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (640, 768),
    }
)
SD2_LORA = pairs(
    {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (1024, 1024),
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (640, 1024),
    }
)
SDXL_LORA = pairs({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048)})
SDXL_TEXT_LORA = pairs({"lora_te2_text_model_encoder_layers_0_mlp_fc1": (64, 64)})
ONE_ENCODER = pairs({"lora_te_text_model_encoder_layers_0_mlp_fc1": (64, 64)})
SD1 = replace(SD2, family="sd1")


@pytest.mark.parametrize(
    ("arch", "shapes", "made_for", "title"),
    [
        (SDXL, SD1_LORA, "Stable Diffusion 1.x", "SDXL"),
        (SDXL, SD2_LORA, "Stable Diffusion 2.x", "SDXL"),
        (SDXL, ONE_ENCODER, "Stable Diffusion 1.x or Stable Diffusion 2.x", "SDXL"),
        (SD1, SDXL_LORA, "SDXL", "Stable Diffusion 1.x"),
        (SD1, SDXL_TEXT_LORA, "SDXL", "Stable Diffusion 1.x"),
        (SD1, SD2_LORA, "Stable Diffusion 2.x", "Stable Diffusion 1.x"),
        (SD2, SD1_LORA, "Stable Diffusion 1.x", "Stable Diffusion 2.x"),
        (SD2, SDXL_LORA, "SDXL", "Stable Diffusion 2.x"),
    ],
)
def test_lora_of_another_family_is_refused_by_name(
    file: Path, arch: Architecture, shapes: dict[str, tuple[int, ...]], made_for: str, title: str
) -> None:
    header_only(file, shapes)
    for allow_unmatched in (False, True):
        with pytest.raises(AdapterError) as caught:
            opened(file, arch, allow_unmatched=allow_unmatched)
        assert caught.value.message.endswith(f": a LoRA made for {made_for}, expected one for {title}")


def test_lora_of_an_inpainting_model_on_another(file: Path) -> None:
    header_only(
        file, {"lora_unet_conv_in.lora_down.weight": (4, 9, 3, 3), "lora_unet_conv_in.lora_up.weight": (32, 4, 1, 1)}
    )
    with pytest.raises(AdapterError, match=r"made for an SDXL inpainting model: .* 9 channels, this model's has 4"):
        opened(file, SDXL)
    opened(file, replace(SDXL, unet=replace(SDXL.unet, in_channels=9))).file.close()


# What a file says beside its changes


@pytest.mark.parametrize(
    ("arch", "unused"),
    [
        (SDXL, "lora_te1_text_model_encoder_layers_2_mlp_fc1"),
        (SDXL, "lora_te1_text_model_final_layer_norm"),
        (SD2, "lora_te_text_model_encoder_layers_2_mlp_fc1"),
    ],
)
def test_layers_that_the_model_does_not_use_are_left_out(file: Path, arch: Architecture, unused: str) -> None:
    """Trainers change every layer of a text encoder: SDXL's contexts come from the layer before the last, and OpenCLIP
    has a layer that SD 2.x does not use.
    """
    used = unused.replace("layers_2", "layers_0").replace("final_layer_norm", "encoder_layers_0_mlp_fc1")
    pair = {f"{used}.lora_up.weight": torch.ones(96, 4), f"{used}.lora_down.weight": torch.ones(4, 64)}
    more = (
        {f"{unused}.w_norm": torch.ones(64)}
        if "norm" in unused
        else {name.replace(used, unused): value.clone() for name, value in pair.items()}
    )
    save_file(pair | more, file)
    adapter = opened(file, arch)
    adapter.file.close()
    assert list(adapter.deltas) == [LAYER + "mlp.fc1.weight"] and adapter.unmatched == ()
    assert adapter.notes == (f"{len(more)} of its keys change layers of a text encoder that the model does not use",)
    refused(file, arch, pair | {"lora_te1_text_model_encoder_layers_4_mlp_fc1.diff": torch.ones(96, 64)}, "1 of 3 keys")


def test_lora_that_makes_a_model_predict_v(file: Path) -> None:
    module = "lora_unet_out_2"
    pair = {f"{module}.lora_up.weight": torch.ones(4, 4, 1, 1), f"{module}.lora_down.weight": torch.ones(4, 32, 3, 3)}
    save_file(pair | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, file)
    adapter = opened(file, SDXL)
    adapter.file.close()
    assert adapter.predicts_v and adapter.zero_snr and adapter.unmatched == ()


# Embeddings


def vectors(count: int, width: int) -> torch.Tensor:
    return torch.arange(count * width, dtype=torch.float32).reshape(count, width) / width


def test_embedding_for_two_text_encoders(tmp_path: Path) -> None:
    """Each encoder's table gets its own vectors at the same rows: the first file's, then those that a LoRA brings."""
    first, second = vectors(2, 64), vectors(2, 128)
    save_file({"clip_l": first, "clip_g": second}, tmp_path / "x.safetensors")
    module = "lora_unet_label_emb_0_2"
    bundle = {"bundle_emb.<toy>.clip_l": -first[0], "bundle_emb.<toy>.clip_g": -second[:1]}  # one vector, both ways
    pair = {f"{module}.lora_up.weight": torch.ones(128, 1), f"{module}.lora_down.weight": torch.ones(1, 128)}
    save_file(bundle | pair, tmp_path / "lora.safetensors")
    lora = opened(tmp_path / "lora.safetensors", SDXL)
    learned = open_embedding(EmbeddingOption(tmp_path / "x.safetensors", "x"), SDXL)
    with lora.file, learned.file:
        found = [learned, *bundled_embeddings([lora], SDXL)]
        assert [(embedding.option.trigger, embedding.vectors) for embedding in found] == [("x", 2), ("<toy>", 1)]
        arch, tables = extended_tables(found, SDXL)
        assert [text.vocabulary for text in arch.texts] == [53, 53]
        base, table = seeded(SDXL), "text_model.embeddings.token_embedding.weight"
        for prefix, own in ((CLIP, first), (CLIP_2, second)):
            made = tables[prefix + table]
            expected = torch.cat([base[prefix + table], own, -own[:1]])
            assert made.shape == expected.shape and np.array_equal(made.make(lambda name: base[name].numpy()), expected)
    assert inspect_file(tmp_path / "lora.safetensors")["embeddings"] == {"<toy>": [1, 192]}


@pytest.mark.parametrize(
    ("arch", "content", "message"),
    [
        (SDXL, {"clip_l": (2, 64)}, "clip_g is missing: expected vectors for each text encoder, clip_l and clip_g"),
        (SDXL, {"clip_g": (2, 128)}, "clip_l is missing"),
        (SDXL, {"emb_params": (2, 768)}, "found emb_params alone: it was made for Stable Diffusion 1.x"),
        (SDXL, {"clip_l": (2, 64), "clip_g": (3, 128)}, "hold 2 and 3 vectors"),
        (SDXL, {"clip_l": (2, 768), "clip_g": (2, 1280)}, "clip_l: expected vectors 64 wide, found 768"),
        (SDXL, {"clip_h": (2, 1024)}, "made for Stable Diffusion 2.x"),
        (SD2, {"clip_l": (2, 64), "clip_g": (2, 128)}, "made for SDXL"),
        (SD2, {"emb_params": (2, 768)}, "expected vectors 64 wide, found 768: it was made for Stable Diffusion 1.x"),
    ],
)
def test_embedding_of_another_family(
    file: Path, arch: Architecture, content: dict[str, tuple[int, int]], message: str
) -> None:
    save_file({name: torch.ones(shape) for name, shape in content.items()}, file)
    with pytest.raises(AdapterError) as caught:
        open_embedding(EmbeddingOption(file, "x"), arch)
    assert message in caught.value.message and caught.value.fix


@pytest.mark.parametrize("name", ["emb_params", "clip_h"])
def test_embedding_for_sd2(file: Path, name: str) -> None:
    save_file({name: torch.ones(3, 64)}, file)
    embedding = open_embedding(EmbeddingOption(file, "x"), SD2)
    embedding.file.close()
    assert embedding.vectors == 3 and inspect_file(file)["kind"] == "a textual-inversion embedding"


# The emoji model's LoRA, of the UNet and both text encoders


def test_every_key_of_the_emoji_lora_has_its_place() -> None:
    """One of three layers of the first text encoder is not used: six modules change nothing."""
    path = EMOJI / "toy-xl.safetensors"
    assert fit(path, "a LoRA", EMOJI_XL)["touches"] == {"unet": 253, "text_encoder": 12, "text_encoder_2": 18}
    assert inspect_file(path)["modules"] == {"unet": 253, "text_encoder": 18, "text_encoder_2": 18}
    for lora, checkpoint in ((path, CHECKPOINT), (LORA, EMOJI_XL)):
        assert "a LoRA made for" in fit(lora, "a LoRA", checkpoint)["why"]


def test_every_module_that_kohya_trains_in_sdxl_has_its_place(file: Path) -> None:
    """At the published sizes: 70 transformer blocks of 10 projections, 11 attentions of 2, and 12 and 32 layers of 6."""
    clip_l = ClipSpec(768, 12, 12, 3072, 49408, 77, (2,), final_norm=False)
    clip_g = ClipSpec(1280, 32, 20, 5120, 49408, 77, (2,), "gelu", final_norm=False, projection=1280, pad=0)
    depths = levels((2, 2, 2), (0, 2, 10)).values()
    unet = UNetSpec(4, 4, (320, 640, 1280), *depths, 10, 2048, True, None, 64, vector_width=2816)
    arch = replace(SDXL, texts=(clip_l, clip_g), unet=unet)
    shapes = dict(expected_shapes(arch))
    spelled = {
        name: "lora_unet_" + name.removeprefix(UNET).removesuffix(".weight").replace(".", "_")
        for name, shape in shapes.items()
        if re.search(r"\.1\.(proj_|transformer_blocks)", name) and name.startswith(UNET) and len(shape) == 2
    }
    for number, prefix, layers, width in ((1, CLIP, 12, 768), (2, CLIP_2, 32, 1280)):
        for layer in range(layers):
            for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", *MLP):
                path = f"text_model.encoder.layers.{layer}.{module}"
                spelled[f"{prefix}{path}.weight"] = f"lora_te{number}_{path.replace('.', '_')}"
                shapes.setdefault(f"{prefix}{path}.weight", (width, width))
    keys = dict[str, tuple[int, ...]]()
    for weight, module in spelled.items():
        outputs, inputs = shapes[weight]
        keys |= {
            f"{module}.lora_down.weight": (8, inputs),
            f"{module}.lora_up.weight": (outputs, 8),
            f"{module}.alpha": (),
        }
    assert len(spelled) == 722 + 72 + 192
    adapter = open_lora(LoraOption(header_only(file, keys)), expected_shapes(arch), arch)
    adapter.file.close()
    assert adapter.unmatched == () and adapter.deltas.keys() == spelled.keys() - {
        name for name in spelled if name.startswith(CLIP + "text_model.encoder.layers.11.")
    }
