"""Checkpoints in the spellings that people's files have."""

from __future__ import annotations

from dataclasses import replace

from tiny_model import TINY

from sdrt.export.architecture import Architecture, ClipSpec, UNetSpec, VaeSpec

SD15 = Architecture(
    "sd1",
    "epsilon",
    (512, 512),
    ClipSpec(768, 12, 12, 3072, 49408, 77),
    UNetSpec(4, 4, (320, 640, 1280, 1280), (2, 2, 2, 2), (1, 1, 1, 0), 1, 768, False, 8, None),
    VaeSpec((128, 256, 512, 512), 2, 4, 0.18215),
)


VARIANTS = {
    "linear projections": TINY,
    "attention on both levels": replace(TINY, unet=replace(TINY.unet, transformer_depth=(1, 1))),
    "attention on the second level": replace(
        TINY, unet=replace(TINY.unet, transformer_depth=(0, 1), linear_projections=False)
    ),
    "deep transformers": replace(TINY, unet=replace(TINY.unet, transformer_depth=(2, 3), middle_depth=4)),
    "res blocks per level": replace(
        TINY, unet=replace(TINY.unet, channels=(32, 64, 96), res_blocks=(1, 3, 2), transformer_depth=(1, 0, 2))
    ),
    "three-level VAE": replace(TINY, vae=VaeSpec((32, 64, 96), 3, 4, 0.18215)),
    "wide text": replace(TINY, clip=ClipSpec(128, 3, 2, 512, 50, 77), unet=replace(TINY.unet, context_width=128)),
}
