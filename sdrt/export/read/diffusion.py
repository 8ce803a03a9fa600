"""What a file says of its training: what the network predicts, at which levels of noise, in which latents. Keys that
hold nothing else, metadata, a folder's scheduler and a few weights say it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.manifest import MAX_SIGMA
from sdrt.errors import CheckpointError, UsageError, printable
from sdrt.export.architecture import Architecture
from sdrt.export.families.family import Family
from sdrt.export.families.table import BUILDS
from sdrt.export.read.diffusers_config import SCHEDULER
from sdrt.export.read.model_files import ModelFiles, Stored

PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v", "v_prediction": "v", "x0": "x0", "sample": "x0"}
STATED = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.")
"""How the keys begin that say it in a file of tensors."""
_FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of numbers that are read. 8-bit floats are none: another tensor has their scale."""
_MAX_VALUES = 1 << 16
"""More than any weight has that is read."""
_EDM_SCALE, _EDM_SIGMAS, _EDM_DATA = 0.5, (0.002, 80.0), 0.5
"""Of Playground v2.5, the only model of its kind. It stores its latents' mean and deviation and nothing else."""
_SIGMA_MIN = 0.002
"""Of CosXL, where a file has no other."""
_Latents = tuple[float, tuple[float, ...], tuple[float, ...]]
"""Scale, mean and deviation, as `VaeSpec` has them."""


@dataclass(frozen=True)
class _Said:
    """What was found, and where: the name of a key, or words for another place. "" for the family's default."""

    prediction: str
    by: str
    sigmas: tuple[float, float] | None = None
    sigma_data: float = 1.0
    zero_snr: bool = False
    latents: _Latents | None = None


def with_diffusion(
    arch: Architecture,
    model: ModelFiles,
    weights: Mapping[str, Stored],
    family: Family,
    *,
    prediction: str | None = None,
    zero_snr: bool | None = None,
) -> tuple[Architecture, list[str]]:
    """The architecture as a model's files were trained, and what to tell the user about it. `weights` are tensors by
    canonical name. `prediction` (one of `PREDICTIONS`) and `zero_snr` go before what the files say.

    Raises:
        CheckpointError: a value is unknown or out of range.
        UsageError: `prediction` or `zero_snr` cannot be true of the model.
    """
    said = _said(arch, model, weights, family)
    chosen = PREDICTIONS[prediction] if prediction is not None else said.prediction
    notes = list(_notes(model, said, chosen, asked=prediction is not None))
    if said.zero_snr and zero_snr is False:
        notes.append(f"{model.name}: taken to have signal at its last step, against what it says")
    if said.sigmas is not None and chosen != said.prediction:
        raise UsageError(
            f"--prediction {prediction}: {model.name} was trained on continuous levels of noise, by {said.by}",
            "Leave out --prediction.",
        )
    last_is_noise = said.zero_snr if zero_snr is None else zero_snr
    if last_is_noise and chosen != "v":
        if zero_snr:
            raise UsageError(
                f"--zero-snr: {model.name} predicts {chosen}, which says nothing of a picture where no signal is left",
                "Leave it out, or add --prediction v if the model was trained so.",
            )
        notes.append(f"{model.name}: zero SNR changes nothing in a model that predicts {chosen}")
        last_is_noise = False
    if last_is_noise and said.sigmas is not None:
        raise UsageError(
            f"--zero-snr: {model.name} was trained on continuous levels of noise, by {said.by}",
            "Leave out --zero-snr.",
        )
    if (latents := said.latents or _stated_latents(arch, model)) is not None:
        scale, mean, std = latents
        arch = replace(arch, vae=replace(arch.vae, scale=scale, mean=mean, std=std))
    if arch.unet.in_channels == 2 * arch.vae.latent_channels:
        # Edit models take the image's latents as the encoder gives them, those trained on continuous levels scaled.
        scaled = said.sigmas is not None or model.settings.scaled_image
        arch = replace(arch, concat_scale=1.0 if scaled else 1 / arch.vae.scale)
    if chosen == "v" and family.size_of_v is not None and "modelspec.resolution" not in model.metadata:
        arch = replace(arch, size=family.size_of_v)
    return replace(
        arch, prediction=chosen, zero_snr=last_is_noise, sigmas=said.sigmas, sigma_data=said.sigma_data
    ), notes


def _said(arch: Architecture, model: ModelFiles, weights: Mapping[str, Stored], family: Family) -> _Said:
    stated, keys = model.settings, model.tensors
    if stated.prediction is not None:
        return _Said(stated.prediction, SCHEDULER, stated.sigmas, stated.sigma_data, stated.zero_snr is True)
    if "edm_mean" in keys and "edm_std" in keys:
        channels = arch.vae.latent_channels
        mean, std = (tuple(_values(model, key, channels).tolist()) for key in ("edm_mean", "edm_std"))
        if min(std) <= 0:
            raise CheckpointError(f"{model.path}: edm_std: expected deviations above 0, found {list(std)}")
        return _Said("edm", "edm_mean", _EDM_SIGMAS, _EDM_DATA, latents=(_EDM_SCALE, mean, std))
    if "edm_vpred.sigma_max" in keys:
        low, high = (
            float(_values(model, key, 1)[0]) if key in keys else _SIGMA_MIN
            for key in ("edm_vpred.sigma_min", "edm_vpred.sigma_max")
        )
        if not 0 < low < high <= MAX_SIGMA:
            raise CheckpointError(
                f"{model.path}: edm_vpred: expected levels of noise that rise between 0 and {MAX_SIGMA}, found {low} to"
                f" {high}"
            )
        return _Said("v", "edm_vpred.sigma_max", (low, high))
    zero_snr = "ztsnr" in keys
    if "v_pred" in keys:
        return _Said("v", "v_pred", zero_snr=zero_snr)
    if (text := model.metadata.get("modelspec.prediction_type")) is not None:
        if text not in PREDICTIONS:
            raise CheckpointError(
                f"{model.path}: modelspec.prediction_type: {printable(repr(text)[:80])}: not supported yet",
                f"{BUILDS} It knows the predictions {', '.join(PREDICTIONS)}.",
            )
        return _Said(PREDICTIONS[text], "modelspec.prediction_type", zero_snr=zero_snr)
    if family.shows_v is not None and arch.unet.in_channels == arch.vae.latent_channels:
        below, limit = family.shows_v
        stored = weights.get(family.unet.prefix + below)
        if stored is not None and math.prod(stored.entry.shape) <= _MAX_VALUES:
            spread = float(_floats(stored).std())
            found = f"the deviation of {below}, {spread:.3f}; models that predict v have more than {limit}"
            return _Said("v" if spread > limit else "epsilon", found, zero_snr=zero_snr)
    return _Said(family.prediction, "", zero_snr=zero_snr)


def _stated_latents(arch: Architecture, model: ModelFiles) -> _Latents | None:
    """What a folder says of the latents' mean and deviation."""
    mean, std, channels = model.settings.vae_mean, model.settings.vae_std, arch.vae.latent_channels
    if not mean and not std:
        return None
    if not len(mean) == len(std) == channels:
        raise CheckpointError(
            f"{model.path}: vae/config.json: latents_mean and latents_std: expected {channels} numbers each, found"
            f" {len(mean)} and {len(std)}",
            "Download the folder again.",
        )
    return (model.settings.vae_scale or arch.vae.scale, mean, std)


def _notes(model: ModelFiles, said: _Said, chosen: str, *, asked: bool) -> list[str]:
    if asked and said.by and chosen != said.prediction:
        return [f"{model.name}: taken to predict {chosen}, as --prediction says; {said.by} says {said.prediction}"]
    if asked or not said.by or (said.prediction == "epsilon" and said.by in (SCHEDULER, "modelspec.prediction_type")):
        return []
    zero = " with no signal at the last step" if said.zero_snr and said.prediction == "v" else ""
    levels = f" on levels of noise from {said.sigmas[0]:g} to {said.sigmas[1]:g}" if said.sigmas else ""
    other = "" if said.sigmas else f"; if that is wrong: --prediction {'v' if chosen == 'epsilon' else 'eps'}"
    return [f"{model.name}: predicts {chosen}{zero}{levels}, by {said.by}{other}"]


def _values(model: ModelFiles, key: str, count: int) -> NDArray[np.float64]:
    """The numbers of a tensor of `count` numbers, in any shape."""
    stored = model.tensors[key]
    shape = stored.entry.shape
    if math.prod(shape) != count:
        raise CheckpointError(
            f"{stored.file.path}: {printable(key)}: expected numbers for {count} channels, found shape {list(shape)}"
            if count > 1
            else f"{stored.file.path}: {printable(key)}: expected one number, found shape {list(shape)}"
        )
    values = _floats(stored)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{stored.file.path}: {printable(key)}: expected finite numbers, found {values.tolist()}")
    return values


def _floats(stored: Stored) -> NDArray[np.float64]:
    """A small tensor's numbers, flat."""
    file, entry = stored.file, stored.entry
    if entry.dtype not in _FLOATS:
        raise CheckpointError(
            f"{file.path}: {printable(entry.name)}: expected one of {', '.join(_FLOATS)}, found {entry.dtype}"
        )
    return file.read(entry.name).astype(np.float64).ravel()
