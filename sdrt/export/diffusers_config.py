"""What the JSON files of a diffusers folder say that tensors do not: settings that are taken over, and settings that must be Stable Diffusion's.

Names and defaults are those of diffusers' and transformers' configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdrt.errors import CheckpointError, printable

PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v"}

# What sdrt's networks compute. A folder that says otherwise would build and give wrong pictures.
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "unet/config.json": {
        "act_fn": ("silu", "swish"), "norm_num_groups": (32,), "norm_eps": (1e-5,), "class_embed_type": (None,), "num_class_embeds": (None,), "addition_embed_type": (None,),
        "encoder_hid_dim": (None,), "time_cond_proj_dim": (None,), "time_embedding_type": ("positional",), "time_embedding_dim": (None,), "center_input_sample": (False,),
        "flip_sin_to_cos": (True,), "freq_shift": (0,), "mid_block_scale_factor": (1,), "resnet_time_scale_shift": ("default",), "dual_cross_attention": (False,),
        "only_cross_attention": (False,), "conv_in_kernel": (3,), "conv_out_kernel": (3,), "attention_type": ("default",), "resnet_out_scale_factor": (1, None),
    },
    "vae/config.json": {
        "act_fn": ("silu", "swish"), "norm_num_groups": (32,), "latents_mean": (None,), "latents_std": (None,), "shift_factor": (None, 0), "mid_block_add_attention": (True,),
        "use_quant_conv": (True,), "use_post_quant_conv": (True,),
    },
    "text_encoder/config.json": {"hidden_act": ("quick_gelu",), "layer_norm_eps": (1e-5,)},
    "scheduler/scheduler_config.json": {
        "beta_schedule": ("scaled_linear",), "beta_start": (0.00085,), "beta_end": (0.012,), "num_train_timesteps": (1000,), "trained_betas": (None,),
        "rescale_betas_zero_snr": (False,),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """None where the files do not say. `sample_size` counts latents a side, `vae_scale` is `VaeSpec.scale`."""

    prediction: str | None = None
    vae_scale: float | None = None
    sample_size: int | None = None


def read_settings(path: Path, configs: Mapping[str, Mapping[str, Any]], scheduler: Mapping[str, Any]) -> Settings:
    """Settings from each component's config.json, by component, and the scheduler's.

    Raises:
        CheckpointError: a setting that sdrt's networks do not have, or of the wrong type.
    """
    documents = {f"{component}/config.json": config for component, config in configs.items()} | {"scheduler/scheduler_config.json": scheduler}
    for name, document in documents.items():
        for key, allowed in _FIXED[name].items():
            if key in document and not any(_same(document[key], value) for value in allowed):
                raise _refused(path, name, key, document[key], " or ".join(str(value) for value in allowed))
    unet, text, vae = (configs.get(component, {}) for component in ("unet", "text_encoder", "vae"))
    key = "num_attention_heads" if unet.get("num_attention_heads") is not None else "attention_head_dim"  # diffusers' old misnomer: the number of heads
    heads = unet.get(key, 8)
    if any(not _same(n, 8) for n in (heads if isinstance(heads, list) else [heads])):
        raise _refused(path, "unet/config.json", key, heads, "8 heads")
    width, text_heads = text.get("hidden_size"), text.get("num_attention_heads")
    if isinstance(width, int) and isinstance(text_heads, int) and width != text_heads * 64:
        raise _refused(path, "text_encoder/config.json", "num_attention_heads", text_heads, f"{width // 64}, of 64 channels each")
    prediction = scheduler.get("prediction_type", "epsilon") if scheduler else None
    if prediction is not None and not (isinstance(prediction, str) and prediction in PREDICTION_TYPES):
        raise _refused(path, "scheduler/scheduler_config.json", "prediction_type", prediction, " or ".join(PREDICTION_TYPES))
    scale = vae.get("scaling_factor")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e6):
        raise _refused(path, "vae/config.json", "scaling_factor", scale, "a positive number")
    size = unet.get("sample_size")
    return Settings(
        PREDICTION_TYPES[prediction] if prediction is not None else None,
        float(scale) if scale is not None else None,
        size if isinstance(size, int) and not isinstance(size, bool) and 0 < size <= 1024 else None,
    )


def _same(found: object, expected: object) -> bool:
    return found == expected and isinstance(found, bool) == isinstance(expected, bool)


def _refused(path: Path, name: str, key: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name}: {key}: expected {expected}, found {printable(repr(found)[:80])}: not supported yet",
        "This version of sdrt builds Stable Diffusion 1.x and its inpainting models.",
    )
