"""SDXL with its inpainting and edit models and its distilled relatives (SSD-1B, Vega, KOALA): CLIP-L and OpenCLIP's
ViT-bigG side by side, a UNet that is told the second one's pooled vector and six sizes, and a VAE that overflows in
float16.
"""

from __future__ import annotations

from dataclasses import replace

from sdrt.export.families.family import Component, Family, Sign, Text
from sdrt.export.families.ldm import (
    CLIP,
    OPEN_CLIP_ROWS,
    OPEN_CLIP_TRANSPOSED,
    SCHEDULER,
    UNET_COMPONENT,
    VAE_COMPONENT,
    unet_sign,
)
from sdrt.export.families.sd1 import TEXT_ENCODER

CLIP_2 = "conditioner.embedders.1.transformer."
_SECOND = ("conditioner.embedders.1.", "text_encoders.clip_g.", "text_encoder_2.")

_TEXT_ENCODER = replace(
    TEXT_ENCODER,
    title="first text encoder",
    # A name without a component would fit both encoders.
    adapters_flat=("lora_te1_", "lycoris_te1_", "lycoris_text_encoder_", "0_transformer_"),
    adapters_dotted=(
        "text_encoder.",
        "text_encoders.clip_l.transformer.",
        CLIP,
        "conditioner.embedders.0.transformer.",
    ),
    text=Text("quick_gelu", final_norm=False),
)
_TEXT_ENCODER_2 = Component(
    name="text_encoder_2",
    title="second text encoder",
    network="clip",
    prefix=CLIP_2,
    prefixes=(
        CLIP_2,
        "conditioner.embedders.1.model.",
        "text_encoders.clip_g.",
        "text_encoders.clip_g.transformer.",
        "text_encoder_2.",
    ),
    needed=(),
    bare=(),
    adapters_flat=("lora_te2_", "lycoris_te2_", "lycoris_text_encoder_2_", "1_model_"),
    adapters_dotted=("text_encoder_2.", "text_encoders.clip_g.transformer.", CLIP_2, "conditioner.embedders.1.model."),
    computes="text_",
    ignored=("text_model.embeddings.position_ids", "logit_scale"),
    rows=OPEN_CLIP_ROWS,
    transposed=OPEN_CLIP_TRANSPOSED,
    text=Text("gelu", pad=0, final_norm=False, pooled=True),
    vectors="clip_g",
)

SDXL = Family(
    name="sdxl",
    title="SDXL",
    builds="SDXL with its inpainting and edit models",
    kinds={4: "an SDXL model", 8: "an SDXL edit model (instruct-pix2pix)", 9: "an SDXL inpainting model"},
    alone="an SDXL UNet without its text encoders",
    signs=(Sign("", _SECOND), unet_sign("", "label_emb.0.", "add_embedding.")),
    components=(UNET_COMPONENT, VAE_COMPONENT, _TEXT_ENCODER, _TEXT_ENCODER_2),
    context_width=2048,
    tokens={1280: "SDXL's second text encoder"},
    text_widths=(768, 1280),
    heads=None,
    head_width=64,
    vae_overflows=True,
    last_layer=2,
    zero_empty=True,
    sizes=6,
    size_width=256,
    latent_scale=0.13025,
    size=(1024, 1024),
    prediction="epsilon",
    ignored=("conditioner.embedders.0.logit_scale", "conditioner.embedders.1.logit_scale"),
    refused={},
    pipelines=(
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
    ),
    settings={
        "unet/config.json": {
            "addition_embed_type": ("text_time",),
            "addition_time_embed_dim": (256,),
        },
        "text_encoder/config.json": {"hidden_act": ("quick_gelu",)},
        "text_encoder_2/config.json": {"hidden_act": ("gelu",)},
        "scheduler/scheduler_config.json": SCHEDULER,
    },
    schedulers=("EulerDiscreteScheduler",),
    adapters=(*_TEXT_ENCODER_2.adapters_flat, *_TEXT_ENCODER_2.adapters_dotted),
)
