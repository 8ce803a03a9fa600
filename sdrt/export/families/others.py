"""Families that sdrt does not build, as far as their files tell them apart."""

from __future__ import annotations

from sdrt.export.families.family import OtherFamily, Sign

_FIRST_OPEN_CLIP = "conditioner.embedders.0.model.ln_final.weight"

OTHERS = (
    OtherFamily(
        "Flux",
        (Sign("a Flux model", ("model.diffusion_model.double_blocks.", "double_blocks.")),),
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
        (Sign("an SD3 model", ("model.diffusion_model.joint_blocks.", "joint_blocks.")),),
        adapters=("lora_te3_", "lora_unet_joint_blocks", "joint_blocks.", "diffusion_model.joint_blocks."),
    ),
    OtherFamily(
        "SD3 or Flux", adapters=("lora_transformer_", "transformer.transformer_blocks.", "lycoris_transformer_blocks")
    ),
    OtherFamily(
        "SDXL",
        (Sign("an SDXL model", holds="conditioner.embedders.1.model.ln_final.weight"),),
        contexts={2048: "an SDXL UNet without its text encoders"},
        tokens={1280: "SDXL's second text encoder"},
        adapters=("lora_te2_", "text_encoder_2.", "conditioner.embedders.1."),
        embeddings=("clip_g",),
    ),
    OtherFamily(
        "Stable Diffusion 2.x",
        (
            Sign("an SD2 model", holds=_FIRST_OPEN_CLIP, shape=(1024,)),
            Sign("an SDXL refiner", holds=_FIRST_OPEN_CLIP),
            Sign("an SD2 depth model", ("depth_model.",)),
            Sign("an unCLIP model", ("embedder.model.",)),
            Sign("an SD2 model", ("cond_stage_model.model.",)),
        ),
        contexts={1024: "an SD2 UNet without its text encoder"},
        tokens={1024: "Stable Diffusion 2.x"},
    ),
)
"""In the order in which files are compared with them."""
