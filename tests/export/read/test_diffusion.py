"""What files say of prediction, levels of noise and latents, and what is asked for instead."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import key_lists
import pytest
import torch
from family_files import TINY_XL, sgm
from safetensors.torch import save_file
from tiny_model import TINY, Shapes, expected_shapes, header_only, seeded, whole

from sdrt.errors import CheckpointError, SdrtError, UsageError
from sdrt.export.architecture import Architecture
from sdrt.export.families.ldm import UNET
from sdrt.export.inspect import inspect_file
from sdrt.export.read.checkpoint import open_checkpoint, select
from sdrt.export.read.diffusers_config import Settings, read_settings

NORM = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"


def opened(path: Path, **options: Any) -> tuple[Architecture, tuple[str, ...]]:
    with closing(open_checkpoint(path, **options)) as checkpoint:
        assert select(checkpoint, expected_shapes(checkpoint.architecture))[1] == []
        return checkpoint.architecture, checkpoint.notes


def saved(path: Path, **keys: Any) -> Path:
    """The tiny SDXL with keys beside its weights. A dot in a key is written as two underscores."""
    extra = {key.replace("__", "."): torch.tensor(value) for key, value in keys.items()}
    save_file(sgm(seeded(whole(TINY_XL))) | extra, path)
    return path


# Keys


@pytest.mark.parametrize(
    ("keys", "expected", "note"),
    [
        ({}, {"prediction": "epsilon"}, ""),
        ({"v_pred": []}, {"prediction": "v", "zero_snr": False}, "predicts v, by v_pred"),
        (
            {"v_pred": [], "ztsnr": []},
            {"prediction": "v", "zero_snr": True},
            "predicts v with no signal at the last step, by v_pred",
        ),
        ({"ztsnr": []}, {"prediction": "epsilon", "zero_snr": False}, "zero SNR changes nothing"),
        (
            {"edm_vpred__sigma_max": 120.0, "edm_vpred__sigma_min": 0.002},
            {"prediction": "v", "sigmas": (pytest.approx(0.002), 120.0), "sigma_data": 1.0},
            "predicts v on levels of noise from 0.002 to 120, by edm_vpred.sigma_max",
        ),
        (
            {"edm_mean": [1.0, 2.0, -3.0, 4.0], "edm_std": [[[[8.0]], [[7.0]], [[6.0]], [[5.0]]]]},
            {
                "prediction": "edm",
                "sigmas": (0.002, 80.0),
                "sigma_data": 0.5,
                "vae": replace(TINY_XL.vae, scale=0.5, mean=(1.0, 2.0, -3.0, 4.0), std=(8.0, 7.0, 6.0, 5.0)),
            },
            "predicts edm on levels of noise from 0.002 to 80, by edm_mean",
        ),
    ],
)
def test_keys_of_a_file(tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any], note: str) -> None:
    path = saved(tmp_path / "x.safetensors", **keys)
    arch, notes = opened(path)
    assert {field: getattr(arch, field) for field in expected} == expected
    assert (len(notes) == 1 and note in notes[0]) if note else notes == ()
    assert inspect_file(path)["prediction"] == expected["prediction"]


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"edm_mean": [0.0, 0.0], "edm_std": [1.0, 1.0]}, "edm_mean: expected numbers for 4 channels, found shape [2]"),
        ({"edm_mean": [0.0] * 4, "edm_std": [1.0, 1.0, 1.0, 0.0]}, "edm_std: expected deviations above 0"),
        ({"edm_mean": [0.0] * 4, "edm_std": [1.0, 1.0, 1.0, float("nan")]}, "edm_std: expected finite numbers"),
        ({"edm_vpred__sigma_max": 0.001}, "edm_vpred: expected levels of noise that rise between 0 and"),
        ({"edm_vpred__sigma_max": [1.0, 2.0]}, "edm_vpred.sigma_max: expected one number, found shape [2]"),
        ({"edm_vpred__sigma_max": 3}, "edm_vpred.sigma_max: expected one of F64, F32, F16, BF16, found I64"),
    ],
)
def test_keys_that_cannot_be_true(tmp_path: Path, keys: dict[str, Any], what: str) -> None:
    path = saved(tmp_path / "x.safetensors", **keys)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.message.startswith(f"{path}: ") and what in caught.value.message


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_of_every_type_of_file(tmp_path: Path, kind: torch.dtype) -> None:
    tensors = sgm(seeded(whole(TINY_XL)))
    tensors["edm_mean"] = torch.tensor([1.5, 9.0, -0.25, 9.0, 3.0, 9.0, 4.0, 9.0], dtype=kind)[::2]
    tensors["edm_std"] = torch.ones(4, dtype=kind)
    torch.save(tensors, tmp_path / "x.ckpt")
    assert opened(tmp_path / "x.ckpt")[0].vae.mean == (1.5, -0.25, 3.0, 4.0)


@pytest.mark.parametrize(
    ("text", "prediction"), [("epsilon", "epsilon"), ("v", "v"), ("v_prediction", "v"), ("x0", "x0")]
)
def test_prediction_from_the_metadata(tmp_path: Path, text: str, prediction: str) -> None:
    metadata = {"modelspec.prediction_type": text}
    path = header_only(tmp_path / "x.safetensors", expected_shapes(TINY), metadata=metadata)
    assert opened(path)[0].prediction == prediction
    # A merge may carry old metadata along; its key says what it is.
    path = header_only(path, expected_shapes(TINY) | {"v_pred": (0,)}, metadata=metadata)
    assert opened(path)[0].prediction == "v"


def test_unknown_prediction_is_refused(tmp_path: Path) -> None:
    metadata = {"modelspec.prediction_type": "rectified_flow"}
    path = header_only(tmp_path / "x.safetensors", expected_shapes(TINY), metadata=metadata)
    with pytest.raises(CheckpointError, match="'rectified_flow': not supported yet"):
        open_checkpoint(path)


# Weights


@pytest.mark.parametrize(("deviation", "prediction", "size"), [(0.03, "epsilon", 512), (0.15, "v", 768)])
def test_sd_2_by_its_weights(tmp_path: Path, deviation: float, prediction: str, size: int) -> None:
    shapes = key_lists.with_vae(key_lists.sd2())
    order = {NORM: shapes[NORM]} | shapes
    path = header_only(tmp_path / "x.safetensors", order)
    values = (torch.arange(320) % 2 * 2 - 1).half() * deviation
    data = path.read_bytes()[:8]
    with path.open("r+b") as stream:  # the tensor is the first after the header
        stream.seek(8 + int.from_bytes(data, "little"))
        stream.write(values.numpy().tobytes())
    arch, notes = opened(path)
    assert (arch.prediction, arch.size) == (prediction, (size, size))
    assert (
        f"predicts {prediction}, by the deviation of output_blocks.11.1" in notes[0] and f"{deviation:.3f}" in notes[0]
    )
    assert f"--prediction {'eps' if prediction == 'v' else 'v'}" in notes[0]
    other = "eps" if prediction == "v" else "v"
    assert opened(path, prediction=other)[0].prediction == ("v" if other == "v" else "epsilon")


def test_inpainting_models_of_sd_2_predict_epsilon(tmp_path: Path) -> None:
    path = header_only(tmp_path / "x.safetensors", key_lists.with_vae(key_lists.sd2(9)))
    arch, notes = opened(path)
    assert (arch.prediction, notes) == ("epsilon", ())


# What is asked for


def test_options_go_before_the_file(tmp_path: Path) -> None:
    plain, says_v = saved(tmp_path / "x.safetensors"), saved(tmp_path / "v.safetensors", v_pred=[], ztsnr=[])
    arch, notes = opened(plain, prediction="v", zero_snr=True)
    assert (arch.prediction, arch.zero_snr, notes) == ("v", True, ())
    arch, notes = opened(says_v, prediction="eps")
    assert (arch.prediction, arch.zero_snr) == ("epsilon", False)
    assert notes[0] == "v.safetensors: taken to predict epsilon, as --prediction says; v_pred says v"
    arch, notes = opened(says_v, zero_snr=False)
    assert (arch.prediction, arch.zero_snr) == ("v", False) and "against what it says" in notes[-1]


@pytest.mark.parametrize(
    ("keys", "options", "what"),
    [
        ({}, {"zero_snr": True}, "--zero-snr: x.safetensors predicts epsilon"),
        ({"edm_vpred__sigma_max": 120.0}, {"prediction": "eps"}, "--prediction eps: x.safetensors was trained on"),
        ({"edm_vpred__sigma_max": 120.0}, {"zero_snr": True}, "--zero-snr: x.safetensors was trained on continuous"),
    ],
)
def test_options_that_cannot_be_true(tmp_path: Path, keys: dict[str, Any], options: dict[str, Any], what: str) -> None:
    path = saved(tmp_path / "x.safetensors", **keys)
    with pytest.raises(UsageError) as caught:
        open_checkpoint(path, **options)
    assert what in caught.value.message and caught.value.fix


# Edit models


@pytest.mark.parametrize(
    ("shapes", "scale"),
    [
        (key_lists.sdxl(8), 1 / 0.13025),
        (key_lists.sd1(8), 1 / 0.18215),
        (key_lists.sdxl(9), 1.0),
    ],
    ids=["SDXL", "SD 1.5", "inpainting"],
)
def test_latents_of_the_image_to_edit(tmp_path: Path, shapes: Shapes, scale: float) -> None:
    path = header_only(tmp_path / "x.safetensors", key_lists.with_vae(shapes))
    assert opened(path)[0].concat_scale == pytest.approx(scale)


def test_latents_of_the_image_that_cosxl_edits(tmp_path: Path) -> None:
    arch = replace(TINY_XL, unet=replace(TINY_XL.unet, in_channels=8))
    save_file(
        sgm(seeded(whole(arch))) | {"edm_vpred.sigma_max": torch.tensor(120.0)}, tmp_path / "cosxl-edit.safetensors"
    )
    assert opened(tmp_path / "cosxl-edit.safetensors")[0].concat_scale == 1.0


# Folders


SCHEDULERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "epsilon": ({"_class_name": "EulerDiscreteScheduler"}, {"prediction": "epsilon", "zero_snr": False}),
    "one step": ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "sample"}, {"prediction": "x0"}),
    "zero SNR": (
        {"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction": "v", "zero_snr": True, "sigmas": None},
    ),
    "CosXL": (
        {
            "_class_name": "EDMEulerScheduler",
            "prediction_type": "v_prediction",
            "sigma_data": 1.0,
            "sigma_max": 120.0,
            "sigma_min": 0.002,
            "sigma_schedule": "exponential",
        },
        {"prediction": "v", "sigmas": (0.002, 120.0), "sigma_data": 1.0},
    ),
    "Playground": (
        {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon", "rho": 7.0},
        {"prediction": "edm", "sigmas": (0.002, 80.0), "sigma_data": 0.5},
    ),
}


@pytest.mark.parametrize(("scheduler", "expected"), SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_of_folders(scheduler: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = read_settings(Path("folder"), {}, scheduler)
    assert {field: getattr(settings, field) for field in expected} == expected


def test_latents_of_folders() -> None:
    config = {"scaling_factor": 0.5, "latents_mean": [1, 2, 3, 4], "latents_std": [4, 3, 2, 1]}
    settings = read_settings(Path("folder"), {"vae": config}, {})
    assert (settings.vae_scale, settings.vae_mean, settings.vae_std) == (0.5, (1, 2, 3, 4), (4, 3, 2, 1))


@pytest.mark.parametrize(
    ("scheduler", "what"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_max": -1}, "sigma_max: expected a positive number"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": "1"}, "sigma_data: expected a positive number"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 90}, "sigma_min: expected less than sigma_max"),
    ],
)
def test_schedulers_that_cannot_be_true(scheduler: dict[str, Any], what: str) -> None:
    with pytest.raises(SdrtError, match=what):
        read_settings(Path("folder"), {}, scheduler)


def test_default_settings_say_nothing() -> None:
    assert read_settings(Path("folder"), {}, {}) == Settings()
