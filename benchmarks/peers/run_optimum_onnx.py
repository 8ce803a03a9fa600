"""optimum-onnx's Stable Diffusion pipeline on ONNX Runtime's CPU provider. No `options`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnxruntime
import torch
from optimum.onnxruntime import ORTStableDiffusionPipeline
from timed_picture import Draw, Pixels, Settings, main


def load(settings: Settings) -> Draw:
    threads = onnxruntime.SessionOptions()
    threads.intra_op_num_threads = settings.threads
    pipe = ORTStableDiffusionPipeline.from_pretrained(settings.model, session_options=threads, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
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
            latents=torch.from_numpy(settings.latents()),
            callback_on_step_end=step_end,
        ).images[0]
        return np.asarray(image), text_ms

    return draw


main(load)
