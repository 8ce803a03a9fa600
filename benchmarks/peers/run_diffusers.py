"""diffusers on a CPU as its documentation advises: channels-last, and, for the compiled variant, torch.compile of the
UNet and the decoder.

Compiled code is kept in a cache folder between processes, so a cold start is one with a warm cache. `options`: `dtype`,
`compile`.
"""

from __future__ import annotations

import os

from timed_picture import Draw, Settings, drawn_by_diffusers, main


def load(settings: Settings) -> Draw:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = settings.cache
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(settings.threads)
    dtype = getattr(torch, settings.options["dtype"])
    pipe = DiffusionPipeline.from_pretrained(settings.model, torch_dtype=dtype, local_files_only=True)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    if settings.options["compile"]:
        pipe.unet = torch.compile(pipe.unet, fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True)
    return drawn_by_diffusers(pipe, settings, torch.from_numpy(settings.latents()).to(dtype))


main(load)
