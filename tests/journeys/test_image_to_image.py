"""Whole pictures from text, from an image and under a mask, against diffusers' own pipelines with every scheduler it
has for our samplers.

The reference networks hold the bundle's stored weights; prompts go through transformers' tokenizer, noise through
torch's generator.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import CHECKPOINT
from PIL import Image
from reference import TRAINING, psnr
from safetensors.torch import load_file, save_file

from sdrt.errors import UsageError
from sdrt.runtime import Pipeline
from sdrt.runtime.engine import Pixels
from sdrt.runtime.sampling.registry import SAMPLERS

LIKE_DIFFUSERS_DB = 45.0
STEPS = 8
DIFFUSERS = [name for name, sampler in SAMPLERS.items() if sampler.diffusers is not None]


def scheduler(name: str, seed: int) -> Any:
    """diffusers' scheduler of a sampler, as Stable Diffusion 1.x repositories configure it."""
    import diffusers

    label = SAMPLERS[name].scheduler
    assert label is not None
    cls, _, variant = label.partition(" ")
    options: dict[str, Any] = dict(TRAINING)
    if cls in ("DDIMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler"):
        options |= {"set_alpha_to_one": False, "steps_offset": 1}
    if cls in ("DDIMScheduler", "DDPMScheduler"):
        options |= {"clip_sample": False, "timestep_spacing": "leading", "steps_offset": 1}
    if cls == "PNDMScheduler":
        options |= {"skip_prk_steps": True}
    if variant:
        options |= {"algorithm_type": variant.strip("()")}
    if cls == "DPMSolverSDEScheduler":
        options |= {"noise_sampler_seed": seed}  # else it draws one from the process
    return getattr(diffusers, cls)(**options)


@pytest.fixture(scope="module")
def ours(flat_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(flat_bundle, threads=1) as pipeline:
        yield pipeline


Draw = Callable[..., Pixels]


def drawer(bundle: Path, folder: Path) -> Draw:
    """Draws with diffusers: `kind` is StableDiffusionPipeline, ...Img2ImgPipeline or ...InpaintPipeline; the rest are
    its arguments.
    """
    import diffusers

    base = reference.diffusers_pipeline(bundle, reference.clip_tokenizer(folder))

    def draw(kind: str, sampler: str, seed: int, **arguments: Any) -> Pixels:
        pipeline = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(
            **base.components, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of diffusers and torchsde, about themselves
            pipeline.scheduler = scheduler(sampler, seed)
            if sampler == "tcd":
                arguments["eta"] = 0.3  # what its authors recommend; the pipelines' own default is 0
            image = pipeline(
                "red apple", negative_prompt="blue", guidance_scale=3.0, num_inference_steps=STEPS, output_type="np",
                generator=torch.Generator("cpu").manual_seed(seed), **arguments,
            ).images  # fmt: skip
        return np.round(image * 255).astype(np.uint8)

    return draw


@pytest.fixture(scope="module")
def diffusers_draw(flat_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Draw:
    return drawer(flat_bundle, tmp_path_factory.mktemp("clip"))


def drawn(pipe: Pipeline, sampler: str, seed: int, **settings: Any) -> Pixels:
    return pipe(
        "red apple", negative="blue", cfg=3.0, steps=STEPS, seed=seed, sampler=sampler, compat="diffusers", **settings
    ).images


@pytest.mark.parametrize("sampler", DIFFUSERS)
def test_text_to_image(ours: Pipeline, diffusers_draw: Draw, sampler: str) -> None:
    expected = diffusers_draw("", sampler, 11, height=64, width=64)
    assert psnr(drawn(ours, sampler, 11), expected) >= LIKE_DIFFUSERS_DB


@pytest.mark.parametrize("sampler", DIFFUSERS)
def test_image_to_image(ours: Pipeline, diffusers_draw: Draw, init: Image.Image, sampler: str) -> None:
    expected = diffusers_draw("Img2Img", sampler, 12, image=init, strength=0.6)
    found = drawn(ours, sampler, 12, init_image=init, strength=0.6)
    assert psnr(found, expected) >= LIKE_DIFFUSERS_DB
    assert psnr(found, np.asarray(init)[None]) < 30  # it was repainted


@pytest.mark.parametrize("sampler", DIFFUSERS)
@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_inpainting(
    ours: Pipeline, diffusers_draw: Draw, init: Image.Image, mask: Image.Image, sampler: str, strength: float
) -> None:
    expected = diffusers_draw(
        "Inpaint", sampler, 13, image=init, mask_image=mask, strength=strength, height=64, width=64
    )
    found = drawn(ours, sampler, 13, init_image=init, mask=mask, strength=strength)
    assert psnr(found, expected) >= LIKE_DIFFUSERS_DB
    assert psnr(found[:, :16], np.asarray(init)[None, :16]) > psnr(found[:, 32:], np.asarray(init)[None, 32:]) + 3


@pytest.mark.parametrize("strength", [0.05, 0.13, 0.5, 0.99, 1.0])
def test_strength_counts_steps_as_diffusers_does(
    ours: Pipeline, diffusers_draw: Draw, init: Image.Image, strength: float
) -> None:
    if int(STEPS * strength) == 0:
        with pytest.raises(UsageError, match="strength"):
            drawn(ours, "euler", 1, init_image=init, strength=strength)
        return
    expected = diffusers_draw("Img2Img", "euler", 14, image=init, strength=strength)
    assert psnr(drawn(ours, "euler", 14, init_image=init, strength=strength), expected) >= LIKE_DIFFUSERS_DB


def test_an_image_of_another_size(ours: Pipeline, diffusers_draw: Draw, init: Image.Image) -> None:
    large = init.resize((128, 64))
    expected = diffusers_draw("Img2Img", "ddim", 15, image=large, strength=0.5)
    assert psnr(drawn(ours, "ddim", 15, init_image=large, strength=0.5, size=(128, 64)), expected) >= LIKE_DIFFUSERS_DB


# AUTOMATIC1111's rules, as far as they can be read off the pictures


@pytest.mark.parametrize(("strength", "calls"), [(0.75, 16), (0.5, 11), (0.01, 1), (1.0, 20)])
def test_a1111_counts_steps(ours: Pipeline, init: Image.Image, strength: float, calls: int) -> None:
    """int(strength * steps) + 1 model calls, strength being held below 1."""
    steps = list(ours.stream("sun", cfg=3, steps=20, seed=1, init_image=init, strength=strength))
    assert len(steps) == calls == int(min(strength, 0.999) * 20) + 1


def test_a1111_lays_the_image_over_the_picture(ours: Pipeline, init: Image.Image, mask: Image.Image) -> None:
    found = ours("red apple", cfg=3, steps=8, seed=1, init_image=init, mask=mask, strength=0.9, mask_blur=2).images[0]
    assert np.array_equal(found[:12], np.asarray(init)[:12])  # kept to the pixel, away from the soft edge
    assert psnr(found[40:], np.asarray(init)[40:]) < 25


@pytest.mark.parametrize("compat", ["a1111", "diffusers"])
def test_nothing_to_repaint(ours: Pipeline, init: Image.Image, compat: str) -> None:
    """Under a black mask the image comes back, in diffusers through the VAE."""
    black = Image.new("L", init.size, 0)
    found = ours("red apple", cfg=3, steps=5, seed=1, init_image=init, mask=black, strength=0.8, compat=compat).images[
        0
    ]
    if compat == "a1111":
        assert np.array_equal(found, np.asarray(init))
    else:
        assert psnr(found, np.asarray(init)) > 25


def test_files_are_read_once(ours: Pipeline, init: Image.Image, mask: Image.Image, tmp_path: Path) -> None:
    """A picture is kept, with the hashes of what it was made from, whatever becomes of the files while it is drawn."""
    files = {"init_image": tmp_path / "init.png", "mask": tmp_path / "mask.png"}
    init.save(files["init_image"])
    mask.save(files["mask"])
    expected = {f"{name}_sha256": hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    steps = ours.stream("sun", cfg=3, steps=2, seed=1, **files)  # type: ignore[arg-type]
    next(steps)
    files["init_image"].unlink()
    files["mask"].write_bytes(b"another")
    *_, last = steps
    assert last.result is not None
    assert {name: last.result.parameters[name] for name in expected} == expected


def test_batches_and_seeds(ours: Pipeline, init: Image.Image, mask: Image.Image) -> None:
    settings: dict[str, Any] = {
        "cfg": 3,
        "steps": 4,
        "init_image": init,
        "mask": mask,
        "compat": "diffusers",
        "strength": 0.8,
    }
    together = ours("sun", seed=3, count=3, batch=3, **settings).images
    alone = np.concatenate([ours("sun", seed=seed, **settings).images for seed in (3, 4, 5)])
    assert psnr(together, alone) > 60 and psnr(alone[0], alone[1]) < 40


def test_the_result_says_what_was_asked(ours: Pipeline, init: Image.Image, tmp_path: Path) -> None:
    init.save(tmp_path / "x.png")
    result = ours("sun", cfg=3, steps=2, seed=3, init_image=tmp_path / "x.png")
    assert result.parameters["init_image"] == str(tmp_path / "x.png") and result.parameters["strength"] == 0.75
    assert result.timings_ms["image_encoder"] > 0 and ours("sun", steps=1, seed=3).timings_ms["image_encoder"] == 0


# Inpainting models


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose UNet takes 9 channels: the emoji model, seeded weights for the new ones, one level and attention
    taken from it as they are.
    """
    from sdrt.export.build import BuildOptions, build

    folder = tmp_path_factory.mktemp("inpainting")
    weights = load_file(CHECKPOINT)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    old = weights[name]
    new = torch.randn(len(old), 5, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.05
    weights[name] = torch.cat([old, new.to(old.dtype)], dim=1)
    save_file(weights, folder / "inpainting.safetensors")
    return build(
        BuildOptions(
            folder / "inpainting.safetensors", precision="fp32", size=(64, 64), output=folder / "inpainting.sdrt"
        )
    ).path


def test_inpainting_models(inpainting: Path, init: Image.Image, mask: Image.Image, tmp_path: Path) -> None:
    draw = drawer(inpainting, tmp_path)
    with Pipeline.load(inpainting, threads=1) as pipe:
        assert pipe.bundle.manifest.latents.concat_channels == 5
        for sampler, strength in (("euler", 1.0), ("ddim", 0.7), ("euler_a", 1.0)):
            expected = draw("Inpaint", sampler, 16, image=init, mask_image=mask, strength=strength, height=64, width=64)
            assert (
                psnr(drawn(pipe, sampler, 16, init_image=init, mask=mask, strength=strength), expected)
                >= LIKE_DIFFUSERS_DB
            ), sampler
        masked, whole = (pipe("sun", cfg=3, steps=4, seed=1, init_image=init, mask=m).images for m in (mask, None))
        from_text = pipe("sun", cfg=3, steps=4, seed=1).images
        assert psnr(masked, whole) < 40 and from_text.std() > 5
