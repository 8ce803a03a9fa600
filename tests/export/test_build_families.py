"""Whole builds of families beside Stable Diffusion 1.x, from small seeded checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from family_files import TINY_SD2, open_clip
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_model import lively, whole

from sdrt.bundle.folder import open_bundle
from sdrt.bundle.manifest import WEIGHTS, Component, Latents, Vector
from sdrt.errors import UsageError
from sdrt.export.adapters.match import LoraOption
from sdrt.export.architecture import Architecture, VaeSpec
from sdrt.export.build import BuildOptions, BuildReport, build
from sdrt.export.families.sd1 import CLIP


def small(arch: Architecture, scale: float) -> Architecture:
    """With CLIP's vocabulary and a latent for every 8 pixels, and all layers that a file holds."""
    texts = tuple(replace(text, vocabulary=49408) for text in arch.texts)
    return whole(replace(arch, texts=texts, vae=VaeSpec((32, 32, 32, 32), 1, 4, scale)))


@pytest.fixture(scope="module")
def xl(small_xl_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    return build(BuildOptions(small_xl_checkpoint, output=tmp_path_factory.mktemp("xl") / "xl.sdrt"))


def test_sdxl_whole(xl: BuildReport) -> None:
    manifest = open_bundle(xl.path).manifest
    assert [(text.pad, text.width, text.last_layer, text.clip_skip) for text in manifest.text] == [
        (49407, 64, 2, (2,)),
        (0, 64, 2, (2,)),
    ]
    assert manifest.vector == Vector(pooled=32, sizes=6, size_width=256)
    assert manifest.latents == Latents(4, 8, (64, 64))
    assert manifest.architecture["vae"]["scale"] == 0.13025
    half = Component("fp16", "fp16")
    assert manifest.components == {"text_encoder": half, "unet": half, "vae": Component("fp16", "fp32")}
    assert {graph: set(by_compute) for graph, by_compute in manifest.graphs.items()} == {
        "text_encoder": {"fp32", "fp16"},
        "step": {"fp32", "fp16"},
        "vae_decoder": {"fp32"},
        "vae_encoder": {"fp32"},
    }
    assert manifest.graphs["text_encoder"]["fp32"].outputs == ("context_skip_2", "pooled")
    with safe_open(xl.path / WEIGHTS, "pt") as weights:
        kept = set(weights.keys())
    model = CLIP + "text_model."
    assert f"{model}encoder.layers.0.mlp.fc1.weight" in kept
    assert not [name for name in kept if name.startswith((f"{model}encoder.layers.1.", f"{model}final_layer_norm"))]
    assert xl.notes == ()


def test_options_of_a_family(xl: BuildReport, small_xl_checkpoint: Path, tmp_path: Path) -> None:
    """A clip skip of 1 is 2, said twice it is one output. The rest reaches the manifest."""

    def built(name: str, **options: Any) -> BuildReport:
        return build(BuildOptions(small_xl_checkpoint, output=tmp_path / name, **options))

    report = built("v.sdrt", clip_skip=(1, 2), prediction="v", zero_snr=True, vae_precision="fp16")
    manifest = report.manifest
    assert manifest.clip_skip == (2,) and set(report.cached) == set(manifest.graphs)
    assert (manifest.diffusion.prediction, manifest.diffusion.zero_snr) == ("v", True)
    assert manifest.components["vae"] == Component("fp16", "fp16") and "fp16" in manifest.graphs["vae_decoder"]
    for options, fragment in [
        ({"clip_skip": (3,)}, "clip skip 3: this text encoder has 2 layers"),
        ({"prediction": "vv"}, "prediction 'vv'"),
        ({"vae_precision": "bf16"}, "VAE precision 'bf16': expected fp32, or fp16"),
        ({"zero_snr": True}, "--zero-snr"),
    ]:
        with pytest.raises(UsageError, match=fragment):
            built("bad.sdrt", **options)


def test_a_lora_of_layers_that_contexts_skip(xl: BuildReport, small_xl_checkpoint: Path, tmp_path: Path) -> None:
    """kohya's SDXL LoRAs change every layer of both encoders. Those that no graph needs are known, and left out."""

    def lora(name: str, *modules: str) -> LoraOption:
        tensors = {}
        for module in modules:
            module = f"lora_{module}_self_attn_q_proj"
            tensors |= {f"{module}.lora_down.weight": torch.ones(2, 64), f"{module}.lora_up.weight": torch.ones(64, 2)}
        save_file(tensors, tmp_path / name)
        return LoraOption(tmp_path / name)

    layers = "text_model_encoder_layers"
    some = lora("some.safetensors", f"te1_{layers}_0", f"te1_{layers}_1", f"te2_{layers}_2")
    none = lora("none.safetensors", f"te1_{layers}_1")
    report = build(BuildOptions(small_xl_checkpoint, (some, none), output=tmp_path / "x.sdrt"))
    applied = [sum(source.applied.values()) for source in report.manifest.sources if source.kind == "lora"]
    assert applied == [2, 0]
    unused = "2 of its keys change layers of a text encoder that the model does not use"
    assert report.notes == (
        f"some.safetensors: {unused}",
        "none.safetensors: changes only layers that no output of the text encoders needs, nothing changed",
        f"none.safetensors: {unused}",
    )


def test_sd2_attends_in_float32(tmp_path: Path) -> None:
    """Scores of its UNet overflow in float16; those of its text encoder do not."""
    path = tmp_path / "sd2.safetensors"
    tensors = open_clip(lively(small(TINY_SD2, 0.18215)), CLIP, "cond_stage_model.model.")
    save_file(tensors, path, metadata={"modelspec.resolution": "64x64", "modelspec.prediction_type": "epsilon"})
    report = build(BuildOptions(path, output=tmp_path / "x.sdrt"))
    assert report.manifest.family == "sd2"
    for name, kind in (("step", onnx.TensorProto.FLOAT), ("text_encoder", onnx.TensorProto.FLOAT16)):
        graph = onnx.load(report.path / "graphs" / f"{name}.fp16.onnx", load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(graph).graph
        types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
        attended = [types[each] for node in graph.graph.node if node.op_type == "Attention" for each in node.input[:3]]
        assert attended and set(attended) == {kind}, name
