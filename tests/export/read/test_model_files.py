"""Models as files and as diffusers folders: which files are read, their hash, and every folder that is incomplete or
lies.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from plain_names import PLAIN
from safetensors.torch import load_file, save_file
from tiny_model import expected_shapes, seeded

from sdrt.errors import CheckpointError, InputFileError, SdrtError, UnsafeError
from sdrt.export.families.sd1 import CLIP, SD1, VAE
from sdrt.export.inspect import inspect_file
from sdrt.export.read.checkpoint import open_checkpoint, select
from sdrt.export.read.diffusers_config import read_settings, sampling_note
from sdrt.export.read.model_files import open_model, open_vae
from sdrt.export.weights import write_weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as diffusers saves a pipeline, without its tokenizer."""
    from diffusers import DDIMScheduler

    folder, weights = tmp_path_factory.mktemp("pipeline") / "tiny.v1", seeded(PLAIN)
    networks = {
        "unet": reference.unet(weights, asdict(PLAIN.unet)),
        "vae": reference.vae(weights, asdict(PLAIN.vae)),
        "text_encoder": reference.text_model(weights, asdict(PLAIN.texts[0])),
        "scheduler": DDIMScheduler(**reference.TRAINING, steps_offset=1, clip_sample=False),
    }
    for name, network in networks.items():
        network.save_pretrained(folder / name)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.0",
        "safety_checker": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    index |= {name: ["diffusers", type(network).__name__] for name, network in networks.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(saved, tmp_path / "tiny.v1"))


def values(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    """What a checkpoint's tensors read as, by canonical name."""
    checkpoint = open_checkpoint(path, **options)
    try:
        return {
            name: torch.from_numpy(tensor.read())
            for name, tensor in select(checkpoint, expected_shapes(checkpoint.architecture))[0].items()
        }
    finally:
        checkpoint.close()


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    assert found.keys() == expected.keys()
    return all(
        bool(((found[name].float() - tensor).abs() <= tolerance * (tensor.abs() + 0.01)).all())
        for name, tensor in expected.items()
    )


def refused(
    path: Path,
    *fragments: str,
    kind: type[SdrtError] = InputFileError,
    opening: Callable[[Path], Any] = open_checkpoint,
) -> SdrtError:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(SdrtError) as caught:
        opening(path)
    error = caught.value
    assert type(error) is kind, error
    assert error.exit_code == (4 if kind is UnsafeError else 3)
    assert error.message.startswith(str(path)) and error.message.isprintable()
    for fragment in fragments:
        assert fragment in error.message, error.message
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "a file stayed open"
    return error


def changed(path: Path, **changes: Any) -> None:
    """Change a JSON file's settings; None as in JSON, `...` to leave one out."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


# What is read


def test_a_pipeline_folder(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    checkpoint.close()
    assert (
        checkpoint.architecture.unet == PLAIN.unet
        and checkpoint.architecture.vae == PLAIN.vae
        and checkpoint.architecture.texts == PLAIN.texts
    )
    assert checkpoint.architecture.size == (16, 16)  # its sample_size is 8 latents, its VAE has two levels
    assert checkpoint.notes == ()
    assert equal(values(folder), seeded(PLAIN))


def as_bin(path: Path) -> None:
    torch.save(
        load_file(path),
        path.with_name(
            path.name.replace("model.safetensors", "pytorch_model.bin") if "text" in str(path) else path.stem + ".bin"
        ),
    )
    path.unlink()


def as_shards(path: Path, form: str = "safetensors") -> None:
    tensors = load_file(path)
    names, stem = sorted(tensors), path.name.removesuffix(".safetensors")
    parts = {f"{stem}-0000{i + 1}-of-00003.{form}": names[i::3] for i in range(3)}
    for shard, chosen in parts.items():
        part = {name: tensors[name] for name in chosen}
        save_file(part, path.with_name(shard)) if form == "safetensors" else torch.save(part, path.with_name(shard))
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: shard for shard, chosen in parts.items() for name in chosen},
    }
    path.with_name(f"{stem}.{form}.index.json").write_text(json.dumps(index))
    path.unlink()


def as_half(path: Path) -> None:
    save_file(
        {name: tensor.half() for name, tensor in load_file(path).items()},
        path.with_name(path.stem + ".fp16.safetensors"),
    )
    path.unlink()


FORMS: dict[str, tuple[Callable[[Path], None], float]] = {
    "bin": (as_bin, 0.0),
    "shards": (as_shards, 0.0),
    "bin shards": (lambda path: as_shards(path, "bin") if "text" not in str(path) else as_bin(path), 0.0),
    "fp16 variant": (as_half, 2.0**-10),
}


def weight_files(folder: Path) -> list[Path]:
    return [
        folder / "unet" / "diffusion_pytorch_model.safetensors",
        folder / "vae" / "diffusion_pytorch_model.safetensors",
        folder / "text_encoder" / "model.safetensors",
    ]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_folder_holds_the_same_weights(folder: Path, form: str) -> None:
    convert, tolerance = FORMS[form]
    for path in weight_files(folder):
        convert(path)
    assert equal(values(folder), seeded(PLAIN), tolerance)
    with open_model(folder) as model:
        assert len(model.notes) == (3 if form == "fp16 variant" else 0)
        assert all("is the fp16 variant" in note for note in model.notes)


def test_a_folder_gives_the_bundle_weights_that_a_file_gives(folder: Path, tmp_path: Path) -> None:
    save_file(seeded(PLAIN), tmp_path / "file.safetensors")
    for path, target in ((folder, "a"), (tmp_path / "file.safetensors", "b")):
        checkpoint = open_checkpoint(path)
        with closing(checkpoint):
            write_weights(
                tmp_path / target, select(checkpoint, expected_shapes(PLAIN))[0], [], "fp16", lambda done: None
            )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_diffusers_own_shards_and_variants(folder: Path) -> None:
    network = reference.unet(seeded(PLAIN), asdict(PLAIN.unet))
    weight_files(folder)[0].unlink()
    network.save_pretrained(folder / "unet", max_shard_size="300KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    assert equal(values(folder), seeded(PLAIN))
    shutil.rmtree(folder / "unet")
    network.half().save_pretrained(folder / "unet", max_shard_size="150KB", variant="fp16")
    assert equal(values(folder), seeded(PLAIN), 2.0**-10)


def test_full_precision_goes_before_fp16_and_safetensors_before_bin(folder: Path) -> None:
    path = weight_files(folder)[0]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}
    torch.save(zeros, path.with_suffix(".bin"))
    save_file(zeros, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert equal(values(folder), seeded(PLAIN))
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    assert equal(values(folder), seeded(PLAIN))


def test_the_hash_of_a_folder_is_that_of_its_sha256sum(folder: Path) -> None:
    used = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    (folder / "README.md").write_text("not used")
    listing = subprocess.run(["sha256sum", *used], cwd=folder, capture_output=True, check=True).stdout
    with open_model(folder) as model:
        assert model.name == "tiny.v1"
        assert model.sha256() == hashlib.sha256(listing).hexdigest()
        os.utime(folder / used[3])
        with pytest.raises(InputFileError, match="changed during the build"):
            model.check_unchanged()


def test_the_name_of_the_folder_one_is_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with open_model(Path()) as model:
        assert model.name == "tiny.v1"


def test_c21_linked_files(folder: Path, tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub."""
    for path in weight_files(folder):
        blob = tmp_path / hashlib.sha256(str(path).encode()).hexdigest()
        path.rename(blob)
        path.symlink_to(blob)
    assert equal(values(folder), seeded(PLAIN))


def test_inspecting_a_folder(folder: Path) -> None:
    report = inspect_file(folder)
    assert report["buildable"] is True
    assert report["kind"] == "a Stable Diffusion 1.x model"
    assert report["tensors"] == len(seeded(PLAIN))
    assert report["size_bytes"] == sum(path.stat().st_size for path in weight_files(folder))


# What the JSON files say


def test_settings_are_taken_over(folder: Path) -> None:
    changed(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    changed(folder / "vae" / "config.json", scaling_factor=0.5)
    changed(folder / "unet" / "config.json", sample_size=32)
    checkpoint = open_checkpoint(folder)
    checkpoint.close()
    assert (checkpoint.architecture.prediction, checkpoint.architecture.vae.scale, checkpoint.architecture.size) == (
        "v",
        0.5,
        (64, 64),
    )
    assert checkpoint.notes == (
        "tiny.v1: predicts v, by scheduler/scheduler_config.json; if that is wrong: --prediction eps",
    )


def test_settings_that_are_left_out_are_stable_diffusions(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")
    changed(folder / "vae" / "config.json", scaling_factor=...)
    changed(folder / "unet" / "config.json", sample_size=..., attention_head_dim=...)
    checkpoint = open_checkpoint(folder)
    checkpoint.close()
    assert checkpoint.architecture == PLAIN


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "prediction_type", "flow_prediction"),
        ("scheduler/scheduler_config.json", "prediction_type", ["epsilon"]),
        ("scheduler/scheduler_config.json", "beta_schedule", "linear"),
        ("scheduler/scheduler_config.json", "beta_end", 0.02),
        ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", 1),
        ("unet/config.json", "attention_head_dim", [5, 10, 20, 20]),
        ("unet/config.json", "attention_head_dim", 64),
        ("unet/config.json", "num_attention_heads", 4),
        ("unet/config.json", "addition_embed_type", "text_time"),
        ("unet/config.json", "act_fn", "gelu"),
        ("unet/config.json", "flip_sin_to_cos", False),
        ("unet/config.json", "_class_name", "UNet3DConditionModel"),
        ("unet/config.json", "downsample_padding", 0),
        ("unet/config.json", "resnet_skip_time_act", True),
        ("unet/config.json", "time_embedding_act_fn", "gelu"),
        ("unet/config.json", "timestep_post_act", "silu"),
        ("unet/config.json", "cross_attention_norm", "layer_norm"),
        ("unet/config.json", "encoder_hid_dim_type", "text_proj"),
        ("unet/config.json", "only_cross_attention", [False, True]),
        ("unet/config.json", "something_new", 1),
        ("scheduler/scheduler_config.json", "_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("scheduler/scheduler_config.json", "thresholding", True),
        ("text_encoder/config.json", "num_hidden_layers", 0),
        ("text_encoder/config.json", "use_attention_mask", True),
        ("vae/config.json", "scaling_factor", 0),
        ("vae/config.json", "scaling_factor", "0.18"),
        ("vae/config.json", "scaling_factor", 10**400),
        ("vae/config.json", "scaling_factor", float("nan")),
        ("vae/config.json", "latents_mean", 0.1),
        ("vae/config.json", "latents_std", [1, 1, 1, 0]),
        ("text_encoder/config.json", "hidden_act", "relu"),
        ("text_encoder/config.json", "num_attention_heads", 12),
    ],
)
def test_settings_that_sdrt_does_not_compute(folder: Path, file: str, key: str, value: object) -> None:
    changed(folder / file, **{key: value})
    refused(folder, f"{file}: {key}: expected ", "not supported yet", kind=CheckpointError)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("text_encoder/config.json", "max_position_embeddings", 50),
        ("text_encoder/config.json", "num_hidden_layers", 9),
        ("text_encoder/config.json", "vocab_size", 51),
        ("unet/config.json", "layers_per_block", 2),
        ("unet/config.json", "time_cond_proj_dim", 256),
        ("unet/config.json", "mid_block_type", "UNetMidBlock2D"),
        ("unet/config.json", "mid_block_type", None),
        ("unet/config.json", "transformer_layers_per_block", [2, 1]),
        ("unet/config.json", "reverse_transformer_layers_per_block", [1, [1, 2]]),
        ("unet/config.json", "block_out_channels", [32, 32]),
        ("unet/config.json", "down_block_types", ["DownBlock2D", "DownBlock2D"]),
        ("unet/config.json", "use_linear_projection", not PLAIN.unet.linear_projections),
        ("vae/config.json", "layers_per_block", 3),
        ("vae/config.json", "latent_channels", 16),
    ],
)
def test_sizes_that_contradict_the_tensors(folder: Path, file: str, key: str, value: object) -> None:
    changed(folder / file, **{key: value})
    refused(folder, f"{file}: {key}: ", "but the tensors say", kind=CheckpointError)


def test_fewer_layers_of_the_text_encoder_than_the_file_has(tmp_path: Path, saved: Path) -> None:
    """How folders bake clip skip in. transformers then loads as many layers as the settings say."""
    from transformers import CLIPTextModel

    folder, arch = (
        Path(shutil.copytree(saved, tmp_path / "skip")),
        replace(PLAIN, texts=(replace(PLAIN.texts[0], layers=3),)),
    )
    reference.text_model(seeded(arch), asdict(arch.texts[0])).save_pretrained(folder / "text_encoder")
    changed(folder / "text_encoder" / "config.json", num_hidden_layers=2)
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint):
        assert checkpoint.architecture.texts[0].layers == 2 and "2 layers of the text encoder" in checkpoint.notes[0]
        chosen, unknown = select(checkpoint, expected_shapes(checkpoint.architecture))
        theirs = CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
        ours = {name.partition("text_model.")[2]: tensor for name, tensor in chosen.items() if name.startswith(CLIP)}
        assert not unknown and ours.keys() == {
            name.removeprefix("text_model.") for name in theirs if "position_ids" not in name
        }
        assert all(
            np.array_equal(ours[name.removeprefix("text_model.")].read(), value) for name, value in theirs.items()
        )


def test_schedulers() -> None:
    """Every scheduler that diffusers takes for Stable Diffusion is read, and noted where the folder was made for
    another than its own.
    """
    import diffusers
    from diffusers.schedulers import KarrasDiffusionSchedulers

    def note(name: str, **more: Any) -> str:
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
        written = (
            {p.name: p.default for p in parameters if p.default is not p.empty}
            | reference.TRAINING
            | {"_class_name": name}
        )
        settings = read_settings(Path("folder"), {}, written | more)
        return sampling_note(settings.configs["scheduler/scheduler_config.json"], SD1)

    names = {kind.name for kind in KarrasDiffusionSchedulers}
    for name in (*names, "LCMScheduler", "TCDScheduler", "EDMDPMSolverMultistepScheduler"):
        assert (note(name) == "") == (name in ("DDIMScheduler", "PNDMScheduler")) and name in (note(name) or name)
    assert note("DDIMScheduler", timestep_spacing="trailing") == (
        "scheduler/scheduler_config.json: says timestep_spacing trailing; a bundle keeps no sampler: choose with"
        " --sampler and --schedule of sdrt generate"
    )
    with pytest.raises(CheckpointError, match="_class_name: expected DDIMScheduler or"):
        note("FlowMatchHeunDiscreteScheduler")


def test_folders_that_are_no_pipeline(folder: Path, small_bundle: Path) -> None:
    assert "sdrt generate" in refused(small_bundle, "expected a checkpoint, found a bundle", kind=CheckpointError).fix
    assert "the folder above" in refused(folder / "unet", "found one network of it", kind=CheckpointError).fix


def test_pipelines_of_other_families(folder: Path) -> None:
    changed(
        folder / "model_index.json",
        _class_name="StableDiffusionXLPipeline",
        text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
    )
    refused(folder, "text_encoder_2: cannot open")
    changed(folder / "model_index.json", requires_aesthetics_score=True)
    refused(folder, "a StableDiffusionXLPipeline with a requires_aesthetics_score: not supported", kind=CheckpointError)
    changed(folder / "model_index.json", requires_aesthetics_score=False, text_encoder=[None, None])
    refused(folder, "names no text_encoder, found StableDiffusionXLPipeline", kind=CheckpointError)
    changed(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    changed(
        folder / "model_index.json",
        _class_name="FluxPipeline",
        text_encoder_2=...,
        unet=...,
        transformer=["diffusers", "FluxTransformer2DModel"],
    )
    refused(folder, "a FluxPipeline with a transformer: not supported yet", kind=CheckpointError)
    changed(folder / "model_index.json", transformer=[None, None])
    refused(folder, "a FluxPipeline: not supported yet", kind=CheckpointError)
    changed(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    shutil.rmtree(folder / "unet")
    refused(folder, "names no unet", kind=CheckpointError)


# Folders that are incomplete or lie


def test_folder_of_something_else(tmp_path: Path) -> None:
    error = refused(tmp_path, "model_index.json: cannot open")
    assert "diffusers" in error.fix
    assert "config.json" in refused(tmp_path, "config.json: cannot open", opening=open_vae).fix


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_c18_missing_parts(folder: Path, component: str) -> None:
    (folder / component / "config.json").rename(folder / "config.json")
    refused(folder, f"{component}/config.json: cannot open")
    next(path for path in weight_files(folder) if path.parent.name == component).unlink()
    refused(folder, f"{component}: no weights, expected one of", ".safetensors")
    shutil.rmtree(folder / component)
    refused(folder, f"{component}: cannot open")


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1, "a": 2}', b"\xff", b"[" * 100_000])
def test_bad_json(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    refused(folder, name)


def test_json_files_that_are_no_files(folder: Path) -> None:
    index = folder / "model_index.json"
    index.unlink()
    os.mkfifo(index)
    refused(folder, "model_index.json: expected a file, found a device, pipe or socket")
    index.unlink()
    index.symlink_to("/dev/zero")
    refused(folder, "model_index.json: expected a file, found a device, pipe or socket")
    index.unlink()
    index.write_bytes(b"")
    os.truncate(index, 17 << 20)
    refused(folder, "17,825,792 bytes, more than the limit of 16,777,216 bytes")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a\\b", "..", "", "a/b"])
def test_c18_shard_outside_its_folder(folder: Path, shard: str) -> None:
    path = weight_files(folder)[0]
    as_shards(path)
    index = path.with_name("diffusion_pytorch_model.safetensors.index.json")
    weight_map = json.loads(index.read_text())["weight_map"]
    changed(index, weight_map=weight_map | {"conv_in.weight": shard})
    refused(folder, "a shard outside its folder", kind=UnsafeError)


def test_c18_indices_that_lie(folder: Path) -> None:
    path = weight_files(folder)[0]
    as_shards(path)
    index = path.with_name("diffusion_pytorch_model.safetensors.index.json")
    weight_map = json.loads(index.read_text())["weight_map"]
    changed(index, weight_map={name: shard for name, shard in weight_map.items() if name != "conv_in.weight"})
    refused(folder, "conv_in.weight: in the index or in the shard, but not in both")
    changed(index, weight_map=weight_map | {"extra": weight_map["conv_in.weight"]})
    refused(folder, "extra: in the index or in the shard, but not in both")
    for bad in ({}, [], "x", {"a": 1}):
        changed(index, weight_map=bad)
        refused(folder, "weight_map: expected names")
    changed(index, weight_map=weight_map | {"conv_in.weight": "gone.safetensors"})
    refused(folder, "names the shard gone.safetensors, which is not there")


def test_a_pickle_with_code_in_a_folder(folder: Path) -> None:
    path = weight_files(folder)[1]
    path.unlink()
    path.with_suffix(".bin").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    refused(folder, "os.system", kind=UnsafeError)


# A VAE of its own


@pytest.mark.parametrize(
    "spelling",
    [
        "pipeline",
        "its vae",
        "bin",
        "LDM",
        "LDM below vae",
        "bare LDM",
        "bare diffusers",
        "lightning .ckpt",
        "legacy .pt",
        "whole checkpoint",
    ],
)
def test_a_vae_in_every_spelling(folder: Path, tmp_path: Path, spelling: str) -> None:
    other = {name: tensor for name, tensor in seeded(PLAIN, seed=1).items() if name.startswith(VAE)}
    bare = {name.removeprefix(VAE): tensor for name, tensor in other.items()}
    network = reference.vae(seeded(PLAIN, seed=1), asdict(PLAIN.vae))
    path = tmp_path / "vae.safetensors"
    if spelling in ("pipeline", "its vae", "bin"):
        shutil.rmtree(folder / "vae")
        network.save_pretrained(folder / "vae", safe_serialization=spelling != "bin")
        path = folder if spelling == "pipeline" else folder / "vae"
    elif spelling == "bare diffusers":
        save_file(network.state_dict(), path)
    elif spelling == "lightning .ckpt":
        loss = {
            "loss.logvar": torch.zeros(()),
            "loss.discriminator.main.0.weight": torch.zeros(4),
            "model_ema.decay": torch.zeros(()),
            "model_ema.num_updates": torch.zeros(()),
        }
        torch.save({"epoch": 1, "optimizer_states": [{}], "state_dict": bare | loss}, path := tmp_path / "vae.ckpt")
    elif spelling == "legacy .pt":
        torch.save({"state_dict": bare}, path := tmp_path / "vae.pt", _use_new_zipfile_serialization=False)
    elif spelling == "whole checkpoint":
        save_file(seeded(PLAIN, seed=1), path)
    else:
        prefix = {"LDM": VAE, "LDM below vae": "vae.", "bare LDM": ""}[spelling]
        save_file({prefix + name: tensor for name, tensor in bare.items()}, path)
    save_file(seeded(PLAIN), tmp_path / "base.safetensors")
    assert equal(values(tmp_path / "base.safetensors", vae=path), seeded(PLAIN) | other)


def test_a_vaes_own_scale_goes_with_it(folder: Path, tmp_path: Path) -> None:
    changed(folder / "vae" / "config.json", scaling_factor=0.25)
    save_file(seeded(PLAIN), tmp_path / "base.safetensors")
    checkpoint = open_checkpoint(tmp_path / "base.safetensors", folder / "vae")
    checkpoint.close()
    assert checkpoint.architecture.vae.scale == 0.25
    checkpoint = open_checkpoint(folder, tmp_path / "base.safetensors")
    checkpoint.close()
    assert checkpoint.architecture.vae.scale == 0.18215


def test_folder_of_another_network_given_as_the_vae(folder: Path) -> None:
    refused(
        folder / "unet", "expected an AutoencoderKL, found UNet2DConditionModel", kind=CheckpointError, opening=open_vae
    )
