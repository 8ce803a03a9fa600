"""Pictures of the emoji model with an adapter of each kind in the bundle, against diffusers' networks with LyCORIS's
modules at work in their layers.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from adapter_files import LINEAR
from conftest import CHECKPOINT
from numpy.typing import NDArray
from reference import TRAINING, psnr
from safetensors.torch import load_file, save_file

from sdrt.export.adapters.match import LoraOption
from sdrt.export.build import BuildOptions, build
from sdrt.runtime import Pipeline

SETTINGS: dict[str, Any] = {"steps": 4, "cfg": 3.0, "seed": 7}
PROMPT = "red apple"
KINDS: dict[str, tuple[float, dict[str, Any]]] = {
    "LoCon with mid": (0.15, {"algo": "locon", "use_tucker": True}),
    "LoHa": (0.25, {"algo": "loha", "use_tucker": True}),
    "LoKr": (0.3, {"algo": "lokr", "factor": 4}),
    "DoRA": (0.1, {"algo": "locon", "dora_wd": True}),
}


@pytest.fixture(scope="module")
def theirs(flat_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers' pipeline over the checkpoint's stored weights."""
    from diffusers import EulerDiscreteScheduler

    pipeline = reference.diffusers_pipeline(flat_bundle, reference.clip_tokenizer(tmp_path_factory.mktemp("clip")))
    pipeline.scheduler = EulerDiscreteScheduler(**TRAINING, timestep_spacing="linspace", steps_offset=1)
    return pipeline


@pytest.fixture(scope="module")
def without(flat_bundle: Path) -> NDArray[np.uint8]:
    with Pipeline.load(flat_bundle, threads=1) as pipeline:
        return pipeline(PROMPT, compat="diffusers", **SETTINGS).images


def draw(pipeline: Any) -> NDArray[np.uint8]:
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(SETTINGS["seed"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch tensors under numpy 2, inside diffusers
        images = pipeline(
            PROMPT,
            latents=latents,
            guidance_scale=SETTINGS["cfg"],
            num_inference_steps=SETTINGS["steps"],
            height=64,
            width=64,
            output_type="np",
        ).images
    return np.round(images * 255).astype(np.uint8)


@contextmanager
def adapted(pipeline: Any, path: Path, size: float, options: dict[str, Any]) -> Iterator[None]:
    """Put a seeded adapter of every linear layer and convolution of both networks to work, and its file in the world's
    format at `path`.
    """
    import lycoris

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    generator = torch.Generator().manual_seed(1)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"]})
    networks, tensors = [], {}
    for module in (pipeline.unet, pipeline.text_encoder):
        network = lycoris.create_lycoris(module, 1.0, linear_dim=4, linear_alpha=2, conv_dim=4, conv_alpha=2, **options)
        network.apply_to()
        networks.append(network)
        with torch.no_grad():
            for name, value in network.requires_grad_(False).named_parameters():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(value * (1 + 0.1 * noise) if name.endswith("dora_scale") else size * noise)
        tensors |= {name: value.detach().float().contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, path)
    try:
        yield
    finally:
        for network in networks:
            network.restore()


@pytest.mark.parametrize("kind", KINDS)
def test_picture_is_that_of_the_layers_with_the_adapter(
    kind: str, theirs: Any, without: NDArray[np.uint8], tmp_path: Path
) -> None:
    size, options = KINDS[kind]
    path = tmp_path / "style.safetensors"
    with torch.no_grad(), adapted(theirs, path, size, options):
        expected = draw(theirs)
    report = build(BuildOptions(CHECKPOINT, (LoraOption(path),), precision="fp32", output=tmp_path / "style.sdrt"))
    with Pipeline.load(report.path, threads=1) as pipeline:
        found = pipeline(PROMPT, compat="diffusers", **SETTINGS).images
    assert report.manifest.sources[-1].applied == {"text_encoder": 12, "unet": 282}
    assert psnr(found, expected) >= 45
    assert psnr(found, without) < 30 and found.std() > 20


def test_build_says_what_it_took(tmp_path: Path) -> None:
    """peft's settings are a source of their own, a guessed alpha and a file given twice are remarks."""
    ones = {
        f"base_model.model.{LINEAR[2]}.lora_B.weight": torch.ones(96, 2) / 100,
        f"base_model.model.{LINEAR[2]}.lora_A.weight": torch.ones(2, 64) / 100,
    }
    stack = []
    for name in ("with", "guessed"):
        (tmp_path / name).mkdir()
        save_file(ones, tmp_path / name / f"{name}.safetensors")
        stack.append(LoraOption(tmp_path / name / f"{name}.safetensors", 0.5, 0.5))
    settings = b'{"peft_type": "LORA", "r": 2, "lora_alpha": 8}'
    (tmp_path / "with" / "adapter_config.json").write_bytes(settings)
    report = build(BuildOptions(CHECKPOINT, tuple(stack), precision="fp32", output=tmp_path / "a.sdrt"))
    kinds = [(source.kind, source.name) for source in report.manifest.sources]
    assert kinds[1:] == [
        ("lora", "with.safetensors"),
        ("lora-config", "adapter_config.json"),
        ("lora", "guessed.safetensors"),
    ]
    assert report.manifest.sources[2].sha256 == hashlib.sha256(settings).hexdigest()
    assert report.notes == (
        "with.safetensors: given more than once; its changes add up",
        "guessed.safetensors: given more than once; its changes add up",
        "guessed.safetensors: adapter_config.json is not beside it, so alpha is taken to be the rank",
    )
    name = f"{LINEAR[0]}.weight"
    change = load_file(report.path / "graphs" / "weights.safetensors")[name] - load_file(CHECKPOINT)[name].float()
    torch.testing.assert_close(change, torch.full((96, 64), 0.5 * (4 + 1) * 2e-4), rtol=1e-3, atol=1e-7)
