"""diffusers on a CPU as its documentation advises: channels-last, and, for the compiled variant, torch.compile of the UNet and the decoder.

Compiled code is kept in a cache folder between processes, so a cold start is one with a warm cache. `options`: `dtype`, `compile`.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from timed_picture import Draw, Pixels, Settings, main


def load(settings: Settings) -> Draw:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = settings.cache
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(settings.threads)
    dtype = getattr(torch, settings.options["dtype"])
    pipe = StableDiffusionPipeline.from_pretrained(settings.model, torch_dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    if settings.options["compile"]:
        pipe.unet = torch.compile(pipe.unet, fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True)
    encode = pipe.encode_prompt
    text_ms = 0.0

    def timed_encode(*arguments: Any, **options: Any) -> Any:
        nonlocal text_ms
        started = time.monotonic()
        encoded = encode(*arguments, **options)
        text_ms = (time.monotonic() - started) * 1000
        return encoded

    pipe.encode_prompt = timed_encode

    def draw(prompt: str, marks: list[float]) -> tuple[Pixels, float | None]:
        def step_end(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            marks.append(time.monotonic())
            return tensors

        width, height = settings.size
        image = pipe(
            prompt,
            negative_prompt=settings.negative,
            num_inference_steps=settings.steps,
            guidance_scale=settings.cfg,
            width=width,
            height=height,
            latents=torch.from_numpy(settings.latents()).to(dtype),
            callback_on_step_end=step_end,
        ).images[0]
        return np.asarray(image), text_ms

    return draw


main(load)
