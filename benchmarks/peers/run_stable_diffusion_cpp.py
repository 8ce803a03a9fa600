"""stable-diffusion.cpp through its Python binding, built from source for this CPU. `options`: `type` of the weights,
f16 or q8_0.

It draws its noise itself; its "cuda" generator is the one the run's noise comes from. It does not tell how long
encoding the text takes.
"""

from __future__ import annotations

import time

import numpy as np
from stable_diffusion_cpp import StableDiffusion
from timed_picture import Draw, Pixels, Settings, main


def load(settings: Settings) -> Draw:
    model = StableDiffusion(
        model_path=settings.model,
        vae_decode_only=True,
        n_threads=settings.threads,
        wtype=settings.options["type"],
        rng_type="cuda",
        diffusion_flash_attn=True,
        diffusion_conv_direct=settings.options["conv_direct"],
        vae_conv_direct=settings.options["conv_direct"],
        verbose=False,
    )

    def draw(prompt: str, marks: list[float]) -> tuple[Pixels, float | None]:
        def progress(step: int, steps: int, seconds: float) -> None:
            if step and steps == settings.steps:  # loading reports progress as well
                marks.append(time.monotonic())

        width, height = settings.size
        images = model.generate_image(
            prompt,
            negative_prompt=settings.negative,
            width=width,
            height=height,
            cfg_scale=settings.cfg,
            sample_method="euler",
            scheduler="discrete",
            sample_steps=settings.steps,
            seed=settings.seed,
            progress_callback=progress,
        )
        return np.asarray(images[0].convert("RGB")), None

    return draw


main(load)
