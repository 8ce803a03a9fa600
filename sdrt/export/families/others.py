"""Families that sdrt does not build, as far as their files tell them apart."""

from __future__ import annotations

from sdrt.export.families.family import OtherFamily, Sign
from sdrt.export.families.ldm import UNET, unet_sign

_REFINER, _UNCLIP, _DEPTH = "an SDXL refiner", "an unCLIP model", "an SD2 depth model"
_FIRST_OPEN_CLIP = "conditioner.embedders.0.model."

OTHERS = (
    OtherFamily(
        "Flux",
        (Sign("a Flux model", (UNET + "double_blocks.", "double_blocks.", "single_transformer_blocks.")),),
        adapters=(
            "lora_unet_double_blocks",
            "lora_unet_single_blocks",
            "transformer.single_transformer_blocks.",
            "double_blocks.",
            "diffusion_model.double_blocks.",
            "lycoris_single_transformer_blocks",
        ),
    ),
    OtherFamily(
        "SD3",
        (Sign("an SD3 model", (UNET + "joint_blocks.", "joint_blocks.")),),
        adapters=("lora_te3_", "lora_unet_joint_blocks", "joint_blocks.", "diffusion_model.joint_blocks."),
    ),
    OtherFamily(
        "SD3 or Flux", adapters=("lora_transformer_", "transformer.transformer_blocks.", "lycoris_transformer_blocks")
    ),
    OtherFamily(
        "Stable Video Diffusion",
        (
            Sign("a Stable Video Diffusion model", ("conditioner.embedders.0.open_clip.",)),
            Sign("a Stable Video Diffusion model", within=".time_stack."),
            Sign("a text-to-video model", within=".temopral_conv."),  # spelled so by ModelScope
            Sign("a text-to-video model", within=".temp_convs."),
        ),
    ),
    OtherFamily(
        "Stable Cascade", (unet_sign("a Stable Cascade model", "clf.", "clip_txt_mapper.", "clip_txt_pooled_mapper."),)
    ),
    OtherFamily(
        "PixArt",
        (
            unet_sign("a PixArt model", "t_block.", "adaln_single."),
            Sign("a PixArt model", ("transformer.adaln_single.",)),
        ),
    ),
    OtherFamily(
        "Stable unCLIP",
        (
            Sign(_UNCLIP, ("embedder.model.", "noise_augmentor.")),
            unet_sign(_UNCLIP, "class_embedding."),
            Sign(_UNCLIP, ("cond_stage_model.model.",), beside=UNET + "label_emb."),
            Sign(_DEPTH, ("depth_model.",)),
        ),
    ),
    OtherFamily(
        "the SDXL refiner",
        (
            Sign(_REFINER, (_FIRST_OPEN_CLIP,), beside=UNET + "label_emb."),
            Sign(_REFINER, holds=_FIRST_OPEN_CLIP + "ln_final.weight", shape=(1280,)),
            *(Sign(_REFINER, holds=sign + "label_emb.0.0.weight", columns=2560) for sign in (UNET, "")),
        ),
    ),
)
"""In the order in which files are compared with them."""
CHANNELS = {5: _DEPTH, 7: "an x4 upscaler"}
"""What a UNet of so many input channels is, in any family."""
