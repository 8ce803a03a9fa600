"""Text encoders in every spelling: the same values arrive under the canonical names. Folders are saved by diffusers and
transformers themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from family_files import TINY_SD2, TINY_XL, Tensors, open_clip, renamed, sgm
from safetensors.torch import save_file
from tiny_model import expected_shapes, seeded, whole

from sdrt.errors import CheckpointError
from sdrt.export.architecture import Architecture
from sdrt.export.families.sd1 import CLIP
from sdrt.export.families.sdxl import CLIP_2
from sdrt.export.inspect import inspect_file
from sdrt.export.read.checkpoint import open_checkpoint, select


def read(path: Path) -> tuple[Architecture, dict[str, torch.Tensor]]:
    with closing(open_checkpoint(path)) as checkpoint:
        chosen, unknown = select(checkpoint, expected_shapes(whole(checkpoint.architecture)))
        assert not unknown
        return checkpoint.architecture, {name: torch.from_numpy(tensor.read()) for name, tensor in chosen.items()}


def same(found: Tensors, expected: Tensors) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def playground(tensors: Tensors) -> Tensors:
    spelled = sgm(tensors)
    projection = spelled.pop("conditioner.embedders.1.model.text_projection")
    return spelled | {"conditioner.embedders.1.model.text_projection.weight.weight": projection.T.contiguous()}


def with_position_ids(tensors: Tensors) -> Tensors:
    ids = torch.arange(77)[None]
    return sgm(tensors) | {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": ids}


COMFY = {CLIP: "text_encoders.clip_l.transformer.", CLIP_2: "text_encoders.clip_g.transformer."}
XL: dict[str, Callable[[Tensors], Tensors]] = {
    "canonical": dict,
    "sgm": sgm,
    "sgm with position ids": with_position_ids,
    "transformers' names in sgm's layout": lambda t: renamed(
        t, {CLIP: "conditioner.embedders.0.transformer.", CLIP_2: "conditioner.embedders.1.model."}
    ),
    "ComfyUI": lambda t: renamed(t, COMFY),
    "ComfyUI, OpenCLIP's names": lambda t: renamed(open_clip(t, CLIP_2, "text_encoders.clip_g."), COMFY),
    "Playground": playground,
    "diffusers' prefixes": lambda t: renamed(t, {CLIP: "text_encoder.", CLIP_2: "text_encoder_2."}),
}
SD2: dict[str, Callable[[Tensors], Tensors]] = {
    "LDM": lambda t: open_clip(t, CLIP, "cond_stage_model.model."),
    "sgm": lambda t: open_clip(t, CLIP, "conditioner.embedders.0.model."),
    "ComfyUI": lambda t: renamed(t, {CLIP: "text_encoders.clip_h.transformer."}),
}


@pytest.mark.parametrize(
    ("arch", "spelled"),
    [*((TINY_XL, spelled) for spelled in XL.values()), *((TINY_SD2, spelled) for spelled in SD2.values())],
    ids=[*(f"SDXL, {name}" for name in XL), *(f"SD 2.x, {name}" for name in SD2)],
)
def test_every_spelling_holds_the_same_weights(
    tmp_path: Path, arch: Architecture, spelled: Callable[[Tensors], Tensors]
) -> None:
    weights = seeded(whole(arch))
    save_file(dict(spelled(weights)), tmp_path / "x.safetensors")
    found, values = read(tmp_path / "x.safetensors")
    assert found == arch and same(values, weights)


def test_the_last_of_24_layers_is_no_tensor_too_many(tmp_path: Path) -> None:
    text = TINY_SD2.texts[0]
    full = replace(TINY_SD2, texts=(replace(text, layers=24),))
    save_file(open_clip(seeded(full), CLIP, "cond_stage_model.model."), tmp_path / "x.safetensors")
    found, values = read(tmp_path / "x.safetensors")
    assert found.texts[0].layers == 23 and not any(".layers.23." in name for name in values)


def test_the_trained_sdxl_file() -> None:
    path = ROOT / "examples" / "emoji" / "emoji-xl.safetensors"
    arch, values = read(path)
    assert arch.family == "sdxl" and [text.width for text in arch.texts] == [64, 64] and arch.vector.numbers == 1600
    assert inspect_file(path)["kind"] == "an SDXL model" and all(bool(t.isfinite().all()) for t in values.values())


# Folders


def _saved(folder: Path, arch: Architecture, kind: str, **unet_options: Any) -> Path:
    """The model as diffusers saves a pipeline of that class."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from reference import TRAINING, text_model, vae

    weights, spec = seeded(whole(arch)), arch.unet
    unet = UNet2DConditionModel(
        block_out_channels=spec.channels,
        layers_per_block=1,
        cross_attention_dim=spec.context_width,
        attention_head_dim=[channels // 64 for channels in spec.channels],
        down_block_types=["CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in spec.down_depth],
        up_block_types=["CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in reversed(spec.up_depth)],
        use_linear_projection=True,
        **unet_options,
    )
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(weights), dict(unet.config)))
    parts = {"unet": unet, "vae": vae(weights, asdict(arch.vae)), "scheduler": DDIMScheduler(**TRAINING)}
    parts |= {
        name: text_model(weights, asdict(text), prefix)
        for name, prefix, text in zip(("text_encoder", "text_encoder_2"), (CLIP, CLIP_2), arch.texts, strict=False)
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {"_class_name": kind, "_diffusers_version": "0.35.0", "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


XL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 32 + 6 * 256,
    "transformer_layers_per_block": [1, 2],
}


def changed(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_of_sdxl(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "xl", TINY_XL, "StableDiffusionXLPipeline", **XL_UNET)
    changed(
        folder / "model_index.json",
        tokenizer_2=["transformers", "CLIPTokenizer"],
        force_zeros_for_empty_prompt=True,
        add_watermarker=None,
        image_encoder=[None, None],
        feature_extractor=[None, None],
    )
    changed(folder / "vae" / "config.json", force_upcast=True)
    changed(folder / "unet" / "config.json", sample_size=None)
    changed(folder / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler")
    found, values = read(folder)
    assert found == TINY_XL and same(values, seeded(whole(TINY_XL)))
    assert inspect_file(folder)["kind"] == "an SDXL model" and "notes" not in inspect_file(folder)

    changed(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    assert read(folder)[0] == replace(TINY_XL, zero_empty=False)
    changed(folder / "text_encoder_2" / "config.json", hidden_act="quick_gelu")
    with pytest.raises(CheckpointError, match=r"text_encoder_2.config.json: hidden_act: expected gelu"):
        open_checkpoint(folder)


def test_a_folder_of_sd_2(tmp_path: Path) -> None:
    """Nothing but the activation of its text encoder and the heads of its UNet tell it from SD 1.x at these sizes."""
    folder = _saved(tmp_path / "sd2", TINY_SD2, "StableDiffusionPipeline")
    changed(folder / "unet" / "config.json", sample_size=None)
    found, values = read(folder)
    assert found == TINY_SD2 and same(values, seeded(whole(TINY_SD2)))
