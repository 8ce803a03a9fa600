"""Every kind of adapter in one build, those that examples/emoji/train.py made, against diffusers with each of them
applied there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypernetwork_files as files
import numpy as np
import pytest
import reference
import torch
from conftest import CHECKPOINT, EMOJI, LORA
from hypernetwork_files import Settings
from reference import TRAINING, Graphs, psnr, relative

from sdrt.bundle.folder import open_bundle
from sdrt.errors import AdapterError
from sdrt.export import trace as trace_module
from sdrt.export.adapters.embedding import EmbeddingOption
from sdrt.export.adapters.hypernetwork import HypernetworkOption
from sdrt.export.adapters.match import LoraOption
from sdrt.export.build import BuildOptions, BuildReport, build
from sdrt.runtime import Pipeline

FROST, VIOLET, GOLD = EMOJI / "frost.safetensors", EMOJI / "violet.safetensors", EMOJI / "gold.pt"
TRAINED, LINEAR = Settings((64, 96, 128), (1, 1, 1), "swish", activate_output=False), Settings((64, 128), (1, 2, 1))
LORAS = ((LORA, 1.0), (FROST, 0.5))
SCALES = (0.4, 0.8)
PROMPT = "red apple, toy"


@dataclass(frozen=True)
class Adapters:
    """The files, and what the hypernetworks among them hold."""

    embedding: Path
    hypernetworks: tuple[HypernetworkOption, ...]
    chain: files.Chain

    def options(self, output: Path, precision: str) -> BuildOptions:
        return BuildOptions(
            CHECKPOINT,
            tuple(LoraOption(path, scale, scale) for path, scale in LORAS),
            precision=precision,
            output=output,
            embeddings=(EmbeddingOption(self.embedding, "toy"),),
            hypernetworks=self.hypernetworks,
        )


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    linear = files.save(tmp_path_factory.mktemp("adapters") / "linear.pt", LINEAR, 1)
    chain = [(TRAINED, torch.load(GOLD, weights_only=True), SCALES[0]), (LINEAR, files.content(LINEAR, 1), SCALES[1])]
    return Adapters(VIOLET, tuple(HypernetworkOption(p, s) for p, s in zip((GOLD, linear), SCALES, strict=True)), chain)


@pytest.fixture(scope="module")
def stacked(adapters: Adapters, flat_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    """The emoji checkpoint with two LoRAs, an embedding and two hypernetworks, the second of which is random and
    folded; weights in float32.
    """
    return build(adapters.options(tmp_path_factory.mktemp("stacked") / "stacked.sdrt", "fp32"))


@pytest.fixture(scope="module")
def half(adapters: Adapters, stacked: BuildReport, tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    """The same in float16, from the same traces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_module, "trace", lambda recipe: pytest.fail(f"{recipe.graph} was traced again"))
        return build(adapters.options(tmp_path_factory.mktemp("half") / "half.sdrt", "fp16"))


@pytest.fixture(scope="module")
def diffusers_pipeline(flat_bundle: Path, adapters: Adapters, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline of diffusers over the checkpoint's own weights, to which it adds the LoRAs and the embedding by
    itself.
    """
    from diffusers import EulerDiscreteScheduler

    pipeline = reference.diffusers_pipeline(flat_bundle, reference.clip_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    for path, scale in LORAS:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    pipeline.load_textual_inversion(
        str(adapters.embedding), token="<toy>", local_files_only=True
    )  # it refuses a word of the vocabulary
    pipeline.unet.set_attn_processor(files.Processor(adapters.chain))
    pipeline.scheduler = EulerDiscreteScheduler(**TRAINING, timestep_spacing="linspace")
    return pipeline


@pytest.mark.parametrize(("h", "w"), [(8, 8), (8, 16)])
def test_h5_step_graph_is_diffusers_with_everything_applied(
    flat_bundle: Path, stacked: BuildReport, half: BuildReport, diffusers_pipeline: Any, h: int, w: int
) -> None:
    inputs = reference.identity_step(
        2, h, w, 1, np.random.RandomState(1).standard_normal((2, 1, 77, 64)).astype(np.float32)
    )
    inputs["registers"][:, 0] = np.random.RandomState(2).standard_normal((2, 4, h, w))
    latents, context = (torch.from_numpy(x) for x in (inputs["registers"][:, 0], inputs["context"][:, 0]))
    expected = diffusers_pipeline.unet(latents, torch.tensor(500.0), encoder_hidden_states=context).sample.numpy()
    assert relative(Graphs(stacked.path).run("step", **inputs)["denoised"], expected) < 1e-5
    assert 0 < relative(Graphs(half.path).run("step", "fp16", **inputs)["denoised"], expected) < 1e-2
    assert relative(Graphs(flat_bundle).run("step", **inputs)["denoised"], expected) > 0.1


def test_picture_is_that_of_diffusers_with_everything_applied(
    flat_bundle: Path, blindbox_bundle: Path, stacked: BuildReport, diffusers_pipeline: Any
) -> None:
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch tensors under numpy 2, inside diffusers
        image = diffusers_pipeline(
            PROMPT.replace("toy", "<toy>"),
            latents=latents,
            guidance_scale=3.0,
            num_inference_steps=6,
            height=64,
            width=64,
            output_type="np",
        ).images
    expected = np.round(image * 255).astype(np.uint8)
    for path in (blindbox_bundle, flat_bundle):
        with Pipeline.load(path, threads=1) as pipeline:
            assert psnr(pipeline(PROMPT, cfg=3, steps=6, seed=3, compat="diffusers").images, expected) < 28
    with Pipeline.load(stacked.path, threads=1) as pipeline:
        assert psnr(pipeline(PROMPT, cfg=3, steps=6, seed=3, compat="diffusers").images, expected) >= 45
        assert (
            psnr(pipeline(PROMPT.replace("toy", "cup"), cfg=3, steps=6, seed=3, compat="diffusers").images, expected)
            < 40
        )
        negative = [
            pipeline("red apple", negative=text, cfg=3, steps=6, seed=3, compat="diffusers").images
            for text in ("toy", "")
        ]
    assert psnr(negative[0], negative[1]) < 40


def test_manifest_records_what_went_in_and_what_it_touched(stacked: BuildReport) -> None:
    manifest = open_bundle(stacked.path).manifest
    found = {
        source.name: (source.kind, source.scale, source.trigger, source.applied) for source in manifest.sources[3:]
    }
    assert found == {
        "violet.safetensors": ("embedding", None, "toy", {"text_encoder": 2}),
        "gold.pt": ("hypernetwork", 0.4, None, {"unet": 32}),
        "linear.pt": ("hypernetwork", 0.8, None, {"unet": 27}),
    }
    assert all(len(source.sha256) == 64 for source in manifest.sources)
    unet = manifest.architecture["unet"]
    assert unet["biased"] == [64, 128] and [h["activation"] for h in unet["hypernetworks"]] == ["Hardswish"]


def test_scale_zero_is_the_plain_bundle(flat_bundle: Path, adapters: Adapters, tmp_path: Path) -> None:
    options = BuildOptions(
        CHECKPOINT,
        output=tmp_path / "flat.sdrt",
        hypernetworks=(HypernetworkOption(adapters.hypernetworks[0].path, 0.0),),
    )
    report = build(options)
    assert report.notes == ("gold.pt: scale 0, nothing changed",)
    for name in ("graphs/weights.safetensors", "graphs/step.fp32.onnx"):
        assert (report.path / name).read_bytes() == (flat_bundle / name).read_bytes()


def test_value_too_large_for_half_precision(tmp_path: Path) -> None:
    path = files.save(tmp_path / "huge.pt", LINEAR, 1)
    content = torch.load(path)
    for part in content[64]:
        part["linear.1.bias"] *= 1e6
    torch.save(content, path)
    with pytest.raises(AdapterError, match=r"huge.pt: .*to_k.bias: .* is too large for fp16") as caught:
        build(BuildOptions(CHECKPOINT, output=tmp_path / "x.sdrt", hypernetworks=(HypernetworkOption(path, 1.0),)))
    assert "Lower the scale" in caught.value.fix and not (tmp_path / "x.sdrt").exists()
