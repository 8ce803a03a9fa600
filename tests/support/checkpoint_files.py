"""Checkpoints in the spellings that people's files have."""

from __future__ import annotations

from dataclasses import replace

from tiny_model import TINY, levels, regular_unet

from sdrt.export.architecture import Architecture, ClipSpec, VaeSpec

SD15 = Architecture(
    "sd1",
    "epsilon",
    (512, 512),
    (ClipSpec(768, 12, 12, 3072, 49408, 77),),
    regular_unet((320, 640, 1280, 1280), (2, 2, 2, 2), (1, 1, 1, 0), 1, 768, linear=False),
    VaeSpec((128, 256, 512, 512), 2, 4, 0.18215),
)


VARIANTS = {
    "linear projections": TINY,
    "attention on both levels": replace(TINY, unet=replace(TINY.unet, **levels((1, 1), (1, 1)))),
    "attention on the second level": replace(
        TINY, unet=replace(TINY.unet, **levels((1, 1), (0, 1)), linear_projections=False)
    ),
    "deep transformers": replace(TINY, unet=replace(TINY.unet, **levels((1, 1), (2, 3)), middle=4)),
    "res blocks per level": replace(
        TINY, unet=replace(TINY.unet, channels=(32, 64, 96), **levels((1, 3, 2), (1, 0, 2)))
    ),
    "three-level VAE": replace(TINY, vae=VaeSpec((32, 64, 96), 3, 4, 0.18215)),
    "wide text": replace(TINY, texts=(ClipSpec(128, 3, 2, 512, 50, 77),), unet=replace(TINY.unet, context_width=128)),
}
