"""The small SDXL's own LoRAs, in kohya's names, through a whole build: the pictures of diffusers, which reads the same
files itself.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import reference
import torch
from conftest import EMOJI, EMOJI_XL
from reference import TRAINING, psnr

from sdrt.export.adapters.match import LoraOption
from sdrt.export.build import BuildOptions, build
from sdrt.runtime import Pipeline


def test_lora_of_the_unet_and_both_text_encoders(tmp_path: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    lora = EMOJI / "toy-xl.safetensors"
    report = build(BuildOptions(EMOJI_XL, (LoraOption(lora, 0.8),), precision="fp32", output=tmp_path / "toy.sdrt"))
    applied = report.manifest.sources[-1].applied
    assert applied == {"unet": 253, "text_encoder": 12, "text_encoder_2": 18}
    theirs = reference.sdxl_pipeline(EMOJI_XL, reference.sizes(report.path), tmp_path)
    theirs.scheduler = EulerDiscreteScheduler(**TRAINING, timestep_spacing="linspace", steps_offset=1)
    theirs.set_progress_bar_config(disable=True)

    def draw(**options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of diffusers, about itself
            images = theirs(
                "teddy bear",
                height=64,
                width=64,
                num_inference_steps=8,
                guidance_scale=3.0,
                generator=torch.Generator().manual_seed(4),
                output_type="np",
                **options,
            ).images
        return np.round(images * 255).astype(np.uint8)

    without = draw()
    theirs.load_lora_weights(str(lora.parent), weight_name=lora.name, local_files_only=True)
    theirs.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"], lora_scale=0.8)
    expected = draw()
    with Pipeline.load(report.path, backend="onnxruntime", threads=1) as pipeline:
        found = pipeline("teddy bear", cfg=3.0, steps=8, sampler="euler", seed=4, compat="diffusers").images
    assert psnr(found, expected) >= 45
    assert psnr(found, without) < 30 and found.std() > 20
