"""optimum-onnx's Stable Diffusion pipeline on ONNX Runtime's CPU provider. No `options`."""

from __future__ import annotations

import onnxruntime
import torch
from optimum.onnxruntime import ORTStableDiffusionPipeline
from timed_picture import Draw, Settings, drawn_by_diffusers, main


def load(settings: Settings) -> Draw:
    threads = onnxruntime.SessionOptions()
    threads.intra_op_num_threads = settings.threads
    pipe = ORTStableDiffusionPipeline.from_pretrained(settings.model, session_options=threads, local_files_only=True)
    return drawn_by_diffusers(pipe, settings, torch.from_numpy(settings.latents()))


main(load)
