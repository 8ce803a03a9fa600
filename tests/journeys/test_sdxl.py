"""Whole pictures of a small SDXL against diffusers' own pipelines: from text, from an image, under a mask, and edited.

The reference reads the checkpoint itself; prompts go through transformers' tokenizers, noise through torch's generator.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import EMOJI_XL
from PIL import Image
from reference import TRAINING, psnr
from safetensors.torch import load_file, save_file

from sdrt.export.build import BuildOptions, build
from sdrt.runtime import Pipeline
from sdrt.runtime.engine import Pixels

LIKE_DIFFUSERS_DB = 55.0
"""Sizes change this model's pictures by 46 dB: a lower limit would not see them."""
STEPS = 6
SIZES = {"original_size": (1024, 768), "crop_top_left": (300, 200), "target_size": (512, 1024)}

Draw = Callable[..., Pixels]


def drawer(checkpoint: Path, bundle: Path, folder: Path) -> Draw:
    """Draws with diffusers: `kind` is StableDiffusionXL...Pipeline; the rest are its arguments."""
    import diffusers

    base = reference.sdxl_pipeline(checkpoint, reference.sizes(bundle), folder)

    def draw(kind: str, scheduler: Any, seed: int, **arguments: Any) -> Pixels:
        made = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")
        taken = inspect.signature(made.__init__).parameters
        components = {name: component for name, component in base.components.items() if name in taken}
        pipeline = made(**components, add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = scheduler
        arguments = {"num_inference_steps": STEPS, "guidance_scale": 3.0} | arguments
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of diffusers, about itself
            image = pipeline(
                **arguments, generator=torch.Generator("cpu").manual_seed(seed), output_type="np"
            ).images  # fmt: skip
        return np.round(image * 255).astype(np.uint8)

    return draw


def euler(spacing: str = "linspace") -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(**TRAINING, timestep_spacing=spacing, steps_offset=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("xl") / "xl.sdrt"
    return build(BuildOptions(EMOJI_XL, output=output, size=(64, 64))).path


@pytest.fixture(scope="module")
def ours(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, backend="onnxruntime", threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def draw(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Draw:
    return drawer(EMOJI_XL, bundle, tmp_path_factory.mktemp("clip"))


def drawn(pipe: Pipeline, seed: int, **settings: Any) -> Pixels:
    settings = {"cfg": 3.0, "steps": STEPS, "sampler": "euler"} | settings
    return pipe(settings.pop("prompt", "red apple"), seed=seed, compat="diffusers", **settings).images


@pytest.mark.parametrize(
    ("theirs", "settings"),
    [
        ({}, {}),
        ({"negative_prompt": ""}, {"negative": ""}),
        ({"negative_prompt": "blue"}, {"negative": "blue"}),
        (
            {"prompt_2": "green pear", "negative_prompt": "blue", "negative_prompt_2": "heart"},
            {"prompt_2": "green pear", "negative": "blue", "negative_2": "heart"},
        ),
        (
            {"original_size": (768, 1024), "crops_coords_top_left": (300, 200), "target_size": (1024, 512)},
            SIZES,
        ),
        ({"width": 96}, {"size": (96, 64)}),
        ({"guidance_scale": 0.0}, {"cfg": 0}),
    ],
    ids=["no negative", "empty negative", "negative", "second prompts", "sizes", "wide", "unguided"],
)
def test_text_to_image(ours: Pipeline, draw: Draw, theirs: dict[str, Any], settings: dict[str, Any]) -> None:
    expected = draw("", euler(), 11, **{"prompt": "red apple", "height": 64, "width": 64} | theirs)
    found = drawn(ours, 11, **settings)
    assert psnr(found, expected) >= LIKE_DIFFUSERS_DB and found.std() > 20


def test_what_is_told_is_seen(ours: Pipeline) -> None:
    """Each setting of the tests above changes the picture by more than their limit."""
    plain = drawn(ours, 11)
    several: list[dict[str, Any]] = [{"negative": ""}, {"prompt_2": "green pear"}, SIZES]
    for settings in several:
        assert psnr(drawn(ours, 11, **settings), plain) < LIKE_DIFFUSERS_DB, settings


def test_turbo(ours: Pipeline, draw: Draw) -> None:
    """Few steps, trailing, no guidance."""
    expected = draw(
        "", euler("trailing"), 12, prompt="rocket", height=64, width=64, num_inference_steps=2, guidance_scale=0.0
    )
    found = drawn(ours, 12, prompt="rocket", steps=2, cfg=0, schedule="trailing")
    assert psnr(found, expected) >= LIKE_DIFFUSERS_DB


def test_image_to_image(ours: Pipeline, draw: Draw, init: Image.Image) -> None:
    expected = draw("Img2Img", euler(), 13, prompt="red apple", image=init, strength=0.6)
    found = drawn(ours, 13, init_image=init, strength=0.6)
    assert psnr(found, expected) >= LIKE_DIFFUSERS_DB
    assert psnr(found, np.asarray(init)[None]) < 30  # it was repainted


@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_inpainting(ours: Pipeline, draw: Draw, init: Image.Image, mask: Image.Image, strength: float) -> None:
    expected = draw(
        "Inpaint", euler(), 14, prompt="red apple", image=init, mask_image=mask, strength=strength, height=64, width=64
    )
    assert psnr(drawn(ours, 14, init_image=init, mask=mask, strength=strength), expected) >= LIKE_DIFFUSERS_DB


def with_inputs(folder: Path, channels: int) -> Path:
    """The checkpoint with a UNet that sees further channels: seeded, as no such model was trained."""
    stored = load_file(EMOJI_XL)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    first = stored[name].float()
    more = torch.randn((len(first), channels, 3, 3), generator=torch.Generator().manual_seed(channels)) * 0.1
    stored[name] = torch.cat([first, more], dim=1).half()
    path = folder / f"{channels}.safetensors"
    save_file(stored, path, metadata={"modelspec.resolution": "64x64"})
    return path


@pytest.mark.parametrize("kind", ["Inpaint", "InstructPix2Pix"])
def test_models_that_see_more(
    kind: str, init: Image.Image, mask: Image.Image, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp(kind)
    checkpoint = with_inputs(folder, 5 if kind == "Inpaint" else 4)
    built = build(BuildOptions(checkpoint, output=folder / "x.sdrt")).path
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [({"image_guidance_scale": 1.8}, {"image_cfg": 1.8})]
    if kind == "Inpaint":
        cases = [
            ({"mask_image": mask, "strength": strength}, {"mask": mask, "strength": strength})
            for strength in (0.7, 1.0)
        ]
    draw = drawer(checkpoint, built, folder)
    with Pipeline.load(built, backend="onnxruntime", threads=1) as pipeline:
        for theirs, settings in cases:
            expected = draw(
                kind, euler(), 15, prompt="red apple", negative_prompt="blue", image=init, height=64, width=64, **theirs
            )
            found = drawn(pipeline, 15, init_image=init, negative="blue", **settings)
            assert psnr(found, expected) >= LIKE_DIFFUSERS_DB, settings
            assert psnr(found, np.asarray(init)[None]) < 30
