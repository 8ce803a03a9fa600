"""Stable Diffusion 1.x: CLIP's text encoder as transformers names it, the UNet and VAE as CompVis' LDM names them."""

from __future__ import annotations

from sdrt.export.families.family import Component, Family

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."

_UNET = Component(
    name="unet",
    title="UNet",
    network="unet",
    prefix=UNET,
    prefixes=(UNET, "diffusion_model.", "unet."),
    needed=("input_blocks.0.0.weight", "conv_in.weight"),
    bare=(
        "input_blocks.",
        "middle_block.",
        "output_blocks.",
        "time_embed.",
        "out.",
        "label_emb.",
        "down_blocks.",
        "mid_block.",
        "up_blocks.",
        "conv_in.",
        "conv_out.",
        "conv_norm_out.",
        "time_embedding.",
        "add_embedding.",
    ),
    adapters_flat=("lora_unet_", "lycoris_", "lycoris_unet_"),
    adapters_dotted=("", "unet.", "diffusion_model.", UNET),
)
_VAE = Component(
    name="vae",
    title="VAE",
    network="vae",
    prefix=VAE,
    prefixes=(VAE, "vae."),
    needed=("decoder.conv_in.weight",),
    bare=(
        "decoder.",
        "encoder.conv_",
        "encoder.down",
        "encoder.mid",
        "encoder.norm_out.",
        "quant_conv.",
        "post_quant_conv.",
    ),
    ignored=("loss.", "model_ema."),
)
_TEXT_ENCODER = Component(
    name="text_encoder",
    title="text encoder",
    network="clip",
    prefix=CLIP,
    prefixes=(CLIP, "conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer.", "text_encoder."),
    needed=("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"),
    bare=("text_model.", "embeddings.", "encoder.layers.", "final_layer_norm."),
    adapters_flat=("lora_te_", "lora_te1_", "lycoris_", "lycoris_te_", "lycoris_text_encoder_"),
    adapters_dotted=("", "text_encoder.", "text_encoders.clip_l.transformer.", CLIP),
    computes="text_model.",
    ignored=("text_model.embeddings.position_ids", "text_projection", "logit_scale"),
)

SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    builds="Stable Diffusion 1.x and its inpainting models",
    kinds={4: "a Stable Diffusion 1.x model", 9: "a Stable Diffusion 1.x inpainting model"},
    components=(_UNET, _VAE, _TEXT_ENCODER),
    token_table=CLIP + "text_model.embeddings.token_embedding.weight",
    context_width=768,
    token_width=768,
    heads=8,
    latent_scale=0.18215,
    size=(512, 512),
    prediction="epsilon",
    ignored=("cond_stage_model.logit_scale",),
    refused={
        "time_embed.cond_proj.": "a latent consistency model, whose UNet is told the guidance scale",
        "time_embedding.cond_proj.": "a latent consistency model, whose UNet is told the guidance scale",
        "label_emb.": "a UNet that is told a class or a size",
    },
    pipelines=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    ),
    settings={
        "text_encoder/config.json": {"hidden_act": ("quick_gelu",)},
        "scheduler/scheduler_config.json": {
            "beta_schedule": ("scaled_linear",),
            "beta_start": (0.00085,),
            "beta_end": (0.012,),
            "num_train_timesteps": (1000,),
        },
    },
    schedulers=("PNDMScheduler", "DDIMScheduler"),
)
