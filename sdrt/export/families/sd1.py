"""Stable Diffusion 1.x, with its inpainting and edit models and its distilled relatives."""

from __future__ import annotations

from sdrt.export.families.family import TOKEN_TABLE, Component, Family, Text
from sdrt.export.families.ldm import (
    CLIP,
    IGNORED_TEXT,
    SCHEDULER,
    UNET,
    UNET_COMPONENT,
    VAE,
    VAE_COMPONENT,
)

__all__ = ["CLIP", "SD1", "TEXT_ENCODER", "UNET", "VAE"]

TEXT_ENCODER = Component(
    name="text_encoder",
    title="text encoder",
    network="clip",
    prefix=CLIP,
    prefixes=(CLIP, "conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer.", "text_encoder."),
    needed=(TOKEN_TABLE, TOKEN_TABLE.removeprefix("text_model.")),
    bare=("text_model.", "embeddings.", "encoder.layers.", "final_layer_norm."),
    adapters_flat=("lora_te_", "lora_te1_", "lycoris_", "lycoris_te_", "lycoris_text_encoder_"),
    adapters_dotted=("", "text_encoder.", "text_encoders.clip_l.transformer.", CLIP),
    computes="text_model.",
    ignored=IGNORED_TEXT,
    text=Text("quick_gelu"),
    vectors="clip_l",
)

SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    builds="Stable Diffusion 1.x with its inpainting and edit models",
    kinds={
        4: "a Stable Diffusion 1.x model",
        8: "a Stable Diffusion 1.x edit model (instruct-pix2pix)",
        9: "a Stable Diffusion 1.x inpainting model",
    },
    alone="a Stable Diffusion UNet without its text encoder",
    components=(UNET_COMPONENT, VAE_COMPONENT, TEXT_ENCODER),
    context_width=768,
    tokens={768: "Stable Diffusion 1.x"},
    text_widths=(768,),
    adapters=("lora_te_",),
    heads=8,
    latent_scale=0.18215,
    size=(512, 512),
    prediction="epsilon",
    ignored=("cond_stage_model.logit_scale",),
    refused={"label_emb.": "a UNet that is told a class or a size"},
    pipelines=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    ),
    settings={
        "unet/config.json": {"addition_embed_type": (None,)},
        "text_encoder/config.json": {"hidden_act": ("quick_gelu",)},
        "scheduler/scheduler_config.json": SCHEDULER,
    },
    schedulers=("PNDMScheduler", "DDIMScheduler"),
)
