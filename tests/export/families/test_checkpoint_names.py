"""Names: every spelling of a tensor's name arrives at the canonical one. diffusers' own networks are the reference for
its names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import reference
import torch
from checkpoint_files import SD15, VARIANTS
from plain_names import PLAIN
from tiny_model import TINY, Shapes, expected_shapes, seeded

from sdrt.errors import CheckpointError
from sdrt.export.architecture import Architecture
from sdrt.export.families.checkpoint_names import canonical_names, ema_name, has_ema, is_vae_attention
from sdrt.export.families.recognise import describe
from sdrt.export.families.sd1 import CLIP, UNET, VAE

PATH = Path("x.safetensors")


def arrived(spelled: Shapes) -> Shapes:
    """Shapes by canonical name, with the VAE's attention as 1x1 convolutions."""
    names = canonical_names(PATH, spelled, describe(spelled))
    assert names.keys() == spelled.keys() and len(set(names.values())) == len(names)
    return {
        canonical: (*spelled[name], 1, 1) if is_vae_attention(canonical) and len(spelled[name]) == 2 else spelled[name]
        for name, canonical in names.items()
    }


def renamed(shapes: Shapes, *changes: tuple[str, str]) -> Shapes:
    result = {}
    for name, shape in shapes.items():
        for pattern, new in changes:
            name = re.sub(pattern, new, name)
        result[name] = shape
    assert result.keys() != shapes.keys()
    return result


def only(shapes: Shapes, prefix: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name.startswith(prefix)}


SPELLINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "UNet below diffusion_model": ((r"^model\.diffusion_model\.", "diffusion_model."),),
    "UNet below unet, LDM names": ((r"^model\.diffusion_model\.", "unet."),),
    "bare UNet": ((r"^model\.diffusion_model\.", ""),),
    "VAE below vae": ((r"^first_stage_model\.", "vae."),),
    "bare VAE": ((r"^first_stage_model\.", ""),),
    "all bare": ((r"^(model\.diffusion_model|first_stage_model|cond_stage_model\.transformer)\.", ""),),
    "text encoder without text_model": ((r"^(cond_stage_model\.transformer\.)text_model\.", r"\1"),),
    "text encoder in sgm's layout": ((r"^cond_stage_model\.", "conditioner.embedders.0."),),
    "text encoder in ComfyUI's layout": ((r"^cond_stage_model\.", "text_encoders.clip_l."),),
    "text encoder below text_encoder": ((r"^cond_stage_model\.transformer\.", "text_encoder."),),
    "text encoder below text_encoder, without text_model": (
        (r"^cond_stage_model\.transformer\.text_model\.", "text_encoder."),
    ),
    "VAE attention, new names": (
        (r"(mid\.attn_1)\.([qkv])\.", r"\1.to_\2."),
        (r"(mid\.attn_1)\.proj_out\.", r"\1.to_out.0."),
        (r"(mid\.attn_1)\.norm\.", r"\1.group_norm."),
    ),
    "VAE attention, old names": (
        (r"(mid\.attn_1)\.q\.", r"\1.query."),
        (r"(mid\.attn_1)\.k\.", r"\1.key."),
        (r"(mid\.attn_1)\.v\.", r"\1.value."),
        (r"(mid\.attn_1)\.proj_out\.", r"\1.proj_attn."),
    ),
}


@pytest.mark.parametrize("changes", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_every_prefix_and_old_name(changes: tuple[tuple[str, str], ...]) -> None:
    shapes = expected_shapes(TINY)
    assert arrived(renamed(shapes, *changes)) == shapes


def test_canonical_names_stay() -> None:
    shapes = expected_shapes(SD15) | {"my.notes": (3,), "model_ema.decay": (), "out.0.weight": (4,), "encoder.x": (2,)}
    assert canonical_names(PATH, shapes, describe(shapes)) == {name: name for name in shapes}


def test_matrices_of_the_vaes_attention() -> None:
    shapes = expected_shapes(TINY)
    attention = [name for name in shapes if is_vae_attention(name)]
    assert len(attention) == 8
    assert arrived(shapes | {name: shapes[name][:2] for name in attention}) == shapes


def diffusers_shapes(arch: Architecture) -> dict[str, Shapes]:
    """Names and shapes of diffusers' and transformers' networks of an architecture that holds seeded weights, by
    component.
    """
    weights = seeded(arch)
    networks = {
        "unet.": reference.unet(weights, asdict(arch.unet)),
        "vae.": reference.vae(weights, asdict(arch.vae)),
        "text_encoder.": reference.text_model(weights, asdict(arch.texts[0])),
    }
    return {
        prefix: {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        for prefix, network in networks.items()
    }


@pytest.mark.parametrize(
    "arch",
    [
        PLAIN,
        replace(PLAIN, unet=replace(VARIANTS["attention on both levels"].unet, linear_projections=False)),
        VARIANTS["three-level VAE"],
    ],
    ids=["tiny", "attention on both levels", "three-level VAE"],
)
def test_diffusers_names_with_and_without_a_prefix(arch: Architecture) -> None:
    arch = replace(arch, unet=replace(arch.unet, linear_projections=False))
    parts, expected = diffusers_shapes(arch), expected_shapes(arch)
    together = {prefix + name: shape for prefix, shapes in parts.items() for name, shape in shapes.items()}
    assert arrived(together) == expected
    for prefix, canonical in (("unet.", UNET), ("vae.", VAE), ("text_encoder.", CLIP)):
        assert arrived(parts[prefix]) == only(expected, canonical)
    # A file of LDM names whose VAE is in diffusers' naming.
    mixed = {name: shape for name, shape in expected.items() if not name.startswith(VAE)} | {
        VAE + name: shape for name, shape in parts["vae."].items()
    }
    assert arrived(mixed) == expected


def test_diffusers_values_arrive_under_the_right_names() -> None:
    """Shapes alone would not tell q from k: values do."""
    weights = seeded(PLAIN)
    for prefix, network in (
        ("unet.", reference.unet(weights, asdict(PLAIN.unet))),
        ("vae.", reference.vae(weights, asdict(PLAIN.vae))),
    ):
        state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name, canonical in canonical_names(PATH, shapes, describe(shapes)).items():
            assert torch.equal(state[name].flatten(), weights[canonical].flatten()), name


def test_adapters_keep_their_names() -> None:
    for shapes in (
        {
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": (4, 320),
            "conv_in.weight": (320, 4, 3, 3),
        },
        {"emb_params": (4, 768)},
    ):
        assert canonical_names(PATH, shapes, describe(shapes)) == {name: name for name in shapes}


def test_names_of_averaged_weights() -> None:
    """Written down from a file that CompVis' LDM saved."""
    assert (
        ema_name(UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight")
        == "model_ema.diffusion_modelinput_blocks11transformer_blocks0attn1to_qweight"
    )
    names = [ema_name(name) for name in expected_shapes(SD15) if name.startswith(UNET)]
    assert len(set(names)) == 686
    assert has_ema(names) and not has_ema(names[:100]) and not has_ema(["model_ema.decay", "model_ema.num_updates"])


@pytest.mark.parametrize(
    ("forge", "what"),
    [
        (lambda i: f"down_blocks.{i}.resnets.0.conv1.weight", "20,000 blocks"),
        (lambda i: f"down_blocks.0.resnets.{i}.conv1.weight", "20,000 blocks"),
        (lambda i: f"down_blocks.0.attentions.0.transformer_blocks.{i}.norm1.weight", "20,000 blocks"),
    ],
)
def test_forged_number_of_blocks(forge: Callable[[int], str], what: str) -> None:
    shapes: Shapes = {"conv_in.weight": (32, 4, 3, 3), "down_blocks.0.resnets.0.norm1.weight": (1,)} | {
        forge(i): (1,) for i in range(20_000)
    }
    with pytest.raises(CheckpointError, match=what):
        canonical_names(PATH, shapes, describe(shapes))
