"""`sdrt inspect`: what it says of every kind of file, and with `--for` whether the file fits a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypernetwork_files as files
import pytest
import torch
from commands import only_json, run
from conftest import CHECKPOINT, LORA
from hypernetwork_files import Settings
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sdrt.cli import app

VAE = "first_stage_model."


def asked(path: Path, exit_code: int, checkpoint: Path = CHECKPOINT) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["inspect", str(path), "--for", str(checkpoint), "--json"])
    assert result.exit_code == exit_code, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def embedding(path: Path, width: int) -> Path:
    save_file({"emb_params": torch.ones(3, width)}, path)
    return path


def vae(path: Path, **changed: torch.Tensor) -> Path:
    save_file(
        {name: tensor.contiguous() for name, tensor in load_file(CHECKPOINT).items() if name.startswith(VAE)} | changed,
        path,
    )
    return path


def test_lora() -> None:
    report = asked(LORA, 0)
    assert report["kind"] == "a LoRA" and report["fits"] is True and report["for"] == str(CHECKPOINT)
    assert report["touches"].keys() == {"unet", "text_encoder"} and sum(report["touches"].values()) == 248


def test_lora_of_another_model(tmp_path: Path) -> None:
    tensors = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 768), "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(3072, 4)}  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    report = asked(tmp_path / "x.safetensors", 1)
    assert report["fits"] is False and "lora_te_text_model_encoder_layers_0_mlp_fc1" in report["why"] and report["fix"]


def test_embedding(tmp_path: Path) -> None:
    report = asked(embedding(tmp_path / "toy.safetensors", 64), 0)
    assert (report["fits"], report["touches"], report["trigger"]) == (True, {"text_encoder": 3}, "toy")
    report = asked(embedding(tmp_path / "toy.safetensors", 768), 1)
    assert (
        report["fits"] is False
        and report["base_family"] == "Stable Diffusion 1.x"
        and "expected vectors 64 wide" in report["why"]
    )


def test_hypernetwork(tmp_path: Path) -> None:
    report = asked(files.save(tmp_path / "x.pt", Settings((64, 96)), 1), 0)
    assert (report["fits"], report["touches"], report["widths"]) == (True, {"unet": 26}, [64, 96])
    report = asked(files.save(tmp_path / "x.pt", Settings((320, 768), (1, 0.1, 1)), 1), 1)
    assert report["fits"] is False and "made for Stable Diffusion 1.x" in report["why"]


def test_hypernetwork_of_an_unknown_activation(tmp_path: Path) -> None:
    path = files.save(tmp_path / "x.pt", Settings(activation="relu"), 1, activation_func="glu")
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert result.exit_code == 3 and "activation_func: unknown activation 'glu'" in result.stderr


def test_vae(tmp_path: Path) -> None:
    report = asked(vae(tmp_path / "vae.safetensors"), 0)
    assert report["fits"] is True and report["touches"].keys() == {"vae"}
    wide = {VAE + "decoder.conv_in.weight": torch.zeros(64, 16, 3, 3)}
    report = asked(vae(tmp_path / "vae.safetensors", **wide), 1)
    assert report["fits"] is False and "16" in report["why"]


def test_checkpoint_goes_into_no_checkpoint() -> None:
    assert "goes into no checkpoint" in asked(CHECKPOINT, 2)["error"]["message"]


def test_bundle_goes_into_no_checkpoint(flat_bundle: Path) -> None:
    assert "goes into no checkpoint" in asked(flat_bundle, 2)["error"]["message"]


def test_checkpoint_that_is_none(tmp_path: Path) -> None:
    assert "found a LoRA" in asked(LORA, 3, checkpoint=LORA)["error"]["message"]


@pytest.mark.parametrize("fits", [True, False])
def test_words(tmp_path: Path, fits: bool) -> None:
    result = CliRunner().invoke(
        app, ["inspect", str(embedding(tmp_path / "toy.safetensors", 64 if fits else 1024)), "--for", str(CHECKPOINT)]
    )
    assert result.exit_code == (0 if fits else 1)
    assert f"fits: {fits}" in result.stdout and "vectors: 3" in result.stdout and "trigger: toy" in result.stdout


def test_inspect_a_checkpoint() -> None:
    report = only_json(run("inspect", CHECKPOINT, "--json"))
    assert report["kind"] == "a Stable Diffusion 1.x model"
    assert (report["buildable"], report["family"], report["size"]) == (True, "sd1", [64, 64])
    assert report["types"] == {"F16": 966, "F32": 2, "I64": 1}
    assert report["tensors"] == 969
    assert report["architecture"]["unet"]["channels"] == [64, 96, 128, 128]
    words = run("inspect", CHECKPOINT)
    assert words.exit_code == 0
    assert "kind: a Stable Diffusion 1.x model" in words.stdout
    assert "context_width" not in words.stdout and words.stderr == "all fields: sdrt inspect --all\n"
    assert "context_width: 64" in run("inspect", CHECKPOINT, "--all").stdout


def test_inspect_a_lora() -> None:
    report = only_json(run("inspect", LORA, "--json"))
    assert report["kind"] == "a LoRA"
    assert sum(report["modules"].values()) == sum(report["ranks"].values()) == 248
    assert report["ranks"].keys() == {"8", "16"}
    assert report["metadata"]["ss_output_name"] == "blindbox"


def test_inspect_a_bundle(small_bundle: Path) -> None:
    report = only_json(run("inspect", small_bundle, "--json"))
    assert report["kind"] == "a bundle"
    assert report["sources"][0]["name"] == "small.safetensors"
    words = run("inspect", small_bundle)
    assert words.exit_code == 0
    assert "family: sd1" in words.stdout


def test_inspect_shows_control_characters_escaped(tmp_path: Path) -> None:
    from conftest import RawTensor, write_raw

    path = write_raw(
        tmp_path / "x.safetensors", {"a": RawTensor("F32", (1,), bytes(4))}, {"title\x1b[31m": "\x1b]0;owned\x07"}
    )
    result = run("inspect", path)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\\x1b]0;owned\\x07" in result.stdout
