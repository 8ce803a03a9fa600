"""The small SDXL's own LoRAs, in kohya's names, through a whole build: the pictures of diffusers, which reads the same
files itself.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import EMOJI, EMOJI_XL
from reference import TRAINING, psnr
from safetensors.torch import load_file, save_file

from sdrt.export.adapters.match import LoraOption
from sdrt.export.build import BuildOptions, build
from sdrt.runtime import Pipeline

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "toy": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace", "steps_offset": 1}),
    "lcm": ("LCMScheduler", {"steps_offset": 1}),
}


def drawn(pipeline: Any, steps: int, guidance: float) -> Any:
    """A picture uint8 `[1, 64, 64, 3]` of diffusers'."""
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers, about itself
        images = pipeline(
            "teddy bear",
            height=64,
            width=64,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(4),
            output_type="np",
        ).images
    return np.round(images * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "scale", "applied", "settings"),
    [
        (
            "toy",
            0.8,
            {"unet": 253, "text_encoder": 12, "text_encoder_2": 18},
            {"steps": 8, "cfg": 3.0, "sampler": "euler"},
        ),
        ("lcm", 1.0, {"unet": 253}, {"steps": 4, "cfg": 1.0, "sampler": "lcm"}),
    ],
)
def test_lora_draws_diffusers_picture(
    tmp_path: Path, name: str, scale: float, applied: dict[str, int], settings: dict[str, Any]
) -> None:
    import diffusers

    lora = EMOJI / f"{name}-xl.safetensors"
    report = build(BuildOptions(EMOJI_XL, (LoraOption(lora, scale),), precision="fp32", output=tmp_path / "xl.sdrt"))
    assert report.manifest.sources[-1].applied == applied
    theirs = reference.sdxl_pipeline(EMOJI_XL, reference.sizes(report.path), tmp_path)
    scheduler, options = SCHEDULERS[name]
    theirs.scheduler = getattr(diffusers, scheduler)(**TRAINING, **options)

    without = drawn(theirs, settings["steps"], settings["cfg"])
    theirs.load_lora_weights(str(lora.parent), weight_name=lora.name, local_files_only=True)
    theirs.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"], lora_scale=scale)
    expected = drawn(theirs, settings["steps"], settings["cfg"])
    with Pipeline.load(report.path, backend="onnxruntime", threads=1) as pipeline:
        found = pipeline("teddy bear", seed=4, compat="diffusers", **settings).images
    assert psnr(found, expected) >= 45
    assert psnr(found, without) < 35 and found.std() > 20


def test_lora_that_makes_the_model_predict_v_with_zero_snr(tmp_path: Path) -> None:
    """Its keys `v_pred` and `ztsnr` say so to the build; diffusers does not know them and is told."""
    from diffusers import DDIMScheduler

    lora, plain = EMOJI / "velocity-xl.safetensors", tmp_path / "plain.safetensors"
    report = build(BuildOptions(EMOJI_XL, (LoraOption(lora),), precision="fp32", output=tmp_path / "xl.sdrt"))
    assert (report.manifest.diffusion.prediction, report.manifest.diffusion.zero_snr) == ("v", True)
    assert report.manifest.sources[-1].applied == {"unet": 263}
    theirs = reference.sdxl_pipeline(EMOJI_XL, reference.sizes(report.path), tmp_path)
    v = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs.scheduler = DDIMScheduler(**TRAINING, **v, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    tensors = load_file(lora)
    save_file({name: tensor for name, tensor in tensors.items() if name not in ("v_pred", "ztsnr")}, plain)
    theirs.load_lora_weights(str(tmp_path), weight_name=plain.name, local_files_only=True)
    theirs.fuse_lora(components=["unet"])
    expected = drawn(theirs, 8, 3.0)
    with Pipeline.load(report.path, backend="onnxruntime", threads=1) as pipeline:
        settings = {"steps": 8, "cfg": 3.0, "sampler": "ddim", "schedule": "trailing"}
        found = pipeline("teddy bear", seed=4, compat="diffusers", **settings).images
    assert psnr(found, expected) >= 45 and found.std() > 20
