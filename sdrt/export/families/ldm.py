"""What all families of latent diffusion share: the UNet and the VAE as CompVis' LDM names them, and CLIP's text encoder
as transformers names it.
"""

from __future__ import annotations

from sdrt.export.families.family import Component, Sign

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
OPEN_CLIP_ROWS = {
    f".in_proj_{leaf}": tuple(f".{part}_proj.{leaf}" for part in ("q", "k", "v")) for leaf in ("weight", "bias")
}
"""OpenCLIP stores an attention layer's projections of queries, keys and values in one tensor, in that order."""
OPEN_CLIP_TRANSPOSED = {"text_projection": "text_projection.weight"}
"""OpenCLIP multiplies by its projection from the right; transformers has a linear layer."""

UNET_COMPONENT = Component(
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
    adapters_flat=("lora_unet_", "lycoris_", "lycoris_unet_", "diffusion_model_"),
    adapters_dotted=("", "unet.", "diffusion_model.", UNET),
)
VAE_COMPONENT = Component(
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
IGNORED_TEXT = ("text_model.embeddings.position_ids", "text_projection", "logit_scale")
"""Of a text encoder whose contexts alone are used."""

SCHEDULER = {
    "beta_schedule": ("scaled_linear",),
    "beta_start": (0.00085,),
    "beta_end": (0.012,),
    "num_train_timesteps": (1000,),
}
"""The noise schedule of all families, in diffusers' words."""


def unet_sign(kind: str, *starts: str) -> Sign:
    """Shows that a file's UNet, however spelled, has a tensor whose name below the UNet's prefix begins with one of
    `starts`.
    """
    return Sign(kind, tuple(prefix + start for prefix in (*UNET_COMPONENT.prefixes, "") for start in starts))
