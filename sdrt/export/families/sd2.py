"""Stable Diffusion 2.x with its inpainting models, and SD-Turbo. The text encoder is OpenCLIP's ViT-H, heads of the
UNet have 64 channels, and some models predict v.
"""

from __future__ import annotations

from dataclasses import replace

from sdrt.export.families.family import Family, Sign, Text
from sdrt.export.families.ldm import (
    CLIP,
    IGNORED_TEXT,
    OPEN_CLIP_ROWS,
    SCHEDULER,
    UNET_COMPONENT,
    VAE_COMPONENT,
)
from sdrt.export.families.sd1 import SD1, TEXT_ENCODER

_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.0.model.", "text_encoders.clip_h.")

SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    builds="Stable Diffusion 2.x (SD-Turbo too) with its inpainting models",
    kinds={4: "a Stable Diffusion 2.x model", 9: "a Stable Diffusion 2.x inpainting model"},
    alone="a Stable Diffusion 2.x UNet without its text encoder",
    signs=(Sign("", _OPEN_CLIP),),
    components=(
        UNET_COMPONENT,
        VAE_COMPONENT,
        replace(
            TEXT_ENCODER,
            prefixes=(
                CLIP,
                "conditioner.embedders.0.transformer.",
                *_OPEN_CLIP,
                "text_encoders.clip_h.transformer.",
                "text_encoder.",
            ),
            adapters_dotted=(
                "",
                "text_encoder.",
                "text_encoders.clip_h.transformer.",
                CLIP,
                "cond_stage_model.model.",
                "conditioner.embedders.0.model.",
            ),
            ignored=IGNORED_TEXT,
            rows=OPEN_CLIP_ROWS,
            # The last of 24 layers is used by nothing, and files of transformers leave it out.
            text=Text("gelu", pad=0, used_layers=23),
            vectors="clip_h",
        ),
    ),
    context_width=1024,
    tokens={1024: "Stable Diffusion 2.x"},
    text_widths=(1024,),
    adapters=SD1.adapters,
    heads=None,
    head_width=64,
    upcast_attention=True,
    latent_scale=0.18215,
    size=(512, 512),
    size_of_v=(768, 768),
    prediction="epsilon",
    # ComfyUI's test: the deviation of this bias is above the limit in all known models that predict v.
    shows_v=("output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09),
    ignored=("cond_stage_model.logit_scale",),
    refused=SD1.refused,
    pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    settings={
        "unet/config.json": {"addition_embed_type": (None,)},
        "text_encoder/config.json": {"hidden_act": ("gelu",)},
        "scheduler/scheduler_config.json": SCHEDULER,
    },
    schedulers=("PNDMScheduler", "DDIMScheduler"),
)
