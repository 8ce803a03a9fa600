"""Reads from the JSON files of a diffusers folder what the tensors do not tell. Every setting is used, is known to
change nothing, or makes sdrt refuse the folder.

Names and defaults are those of diffusers' and transformers' configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdrt.errors import CheckpointError, printable
from sdrt.export.architecture import Architecture
from sdrt.export.families.family import Family
from sdrt.export.families.table import BUILDS, FAMILIES

PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v"}
UNET, VAE, TEXT, SCHEDULER = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)

# What sdrt's networks compute. A folder with other values would build and give wrong pictures.
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    UNET: {
        "_class_name": ("UNet2DConditionModel",),
        "act_fn": ("silu", "swish"),
        "norm_num_groups": (32,),
        "norm_eps": (1e-5,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "center_input_sample": (False,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "mid_block_only_cross_attention": (None, False),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1, None),
        "dual_cross_attention": (False,),
        "only_cross_attention": (False,),
        "cross_attention_norm": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "reverse_transformer_layers_per_block": (None,),
    },
    VAE: {
        "_class_name": ("AutoencoderKL",),
        "act_fn": ("silu", "swish"),
        "norm_num_groups": (32,),
        "latents_mean": (None,),
        "latents_std": (None,),
        "shift_factor": (None, 0),
        "mid_block_add_attention": (True,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
    },
    TEXT: {"model_type": ("clip_text_model",), "layer_norm_eps": (1e-5,), "use_attention_mask": (False, None)},
    SCHEDULER: {
        "_class_name": (
            "DDIMScheduler",
            "DDPMScheduler",
            "PNDMScheduler",
            "LMSDiscreteScheduler",
            "EulerDiscreteScheduler",
            "EulerAncestralDiscreteScheduler",
            "HeunDiscreteScheduler",
            "KDPM2DiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "DPMSolverSDEScheduler",
            "DEISMultistepScheduler",
            "UniPCMultistepScheduler",
            "LCMScheduler",
            "TCDScheduler",
        ),
        "trained_betas": (None,),
        "rescale_betas_zero_snr": (False,),
        "thresholding": (False,),
        "use_flow_sigmas": (False,),
        "use_dynamic_shifting": (False,),
    },
}
_USED = {
    UNET: ("attention_head_dim", "num_attention_heads", "sample_size"),
    VAE: ("scaling_factor",),
    TEXT: ("num_attention_heads", "num_hidden_layers"),
    SCHEDULER: ("prediction_type",),
}
# Precision, training, and settings that only act together with a setting above, which must be absent.
_HARMLESS = {
    UNET: (
        "dropout",
        "upcast_attention",
        "addition_time_embed_dim",
        "addition_embed_type_num_heads",
        "projection_class_embeddings_input_dim",
    ),
    VAE: ("force_upcast", "sample_size"),
    TEXT: (
        "architectures",
        "attention_dropout",
        "dropout",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "projection_dim",
        "initializer_range",
        "initializer_factor",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "gradient_checkpointing",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "torchscript",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "is_decoder",
        "id2label",
        "label2id",
        "problem_type",
        "tie_word_embeddings",
        "use_cache",
    ),
    # How a picture is sampled, which `sdrt generate` chooses for each picture.
    SCHEDULER: (
        "timestep_spacing",
        "steps_offset",
        "skip_prk_steps",
        "set_alpha_to_one",
        "clip_sample",
        "clip_sample_range",
        "sample_max_value",
        "dynamic_thresholding_ratio",
        "variance_type",
        "solver_order",
        "solver_type",
        "solver_p",
        "algorithm_type",
        "lower_order_final",
        "euler_at_final",
        "predict_x0",
        "disable_corrector",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_lu_lambdas",
        "final_sigmas_type",
        "lambda_min_clipped",
        "interpolation_type",
        "timestep_type",
        "sigma_min",
        "sigma_max",
        "noise_sampler_seed",
        "original_inference_steps",
        "timestep_scaling",
        "flow_shift",
        "time_shift_type",
        "shift_terminal",
    ),
}


@dataclass(frozen=True)
class Settings:
    """The settings of a folder; None where the files do not say. `sample_size` counts latents a side. `vae_scale` is
    `VaeSpec.scale`. `text_layers` is how many layers of the text encoder are used.

    `configs` holds, by file name, the config.json of each network, whose sizes `check_sizes` compares, and the
    scheduler's. `notes` are for the user.
    """

    prediction: str | None = None
    vae_scale: float | None = None
    sample_size: int | None = None
    text_layers: int | None = None
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_settings(path: Path, configs: Mapping[str, Mapping[str, Any]], scheduler: Mapping[str, Any]) -> Settings:
    """Settings from each component's config.json, by component, and from the scheduler's.

    Raises:
        CheckpointError: a setting that sdrt's networks do not have, that sdrt does not know, or that has the wrong
            type.
    """
    named = {f"{component}/config.json": config for component, config in configs.items()}
    for name, document in (named | {SCHEDULER: scheduler}).items():
        _check_settings(path, name, document)
    unet, text, vae = (named.get(name, {}) for name in (UNET, TEXT, VAE))
    prediction = scheduler.get("prediction_type", "epsilon") if scheduler else None
    if prediction is not None and not (isinstance(prediction, str) and prediction in PREDICTION_TYPES):
        raise _refused(path, SCHEDULER, "prediction_type", prediction, " or ".join(PREDICTION_TYPES))
    scale = vae.get("scaling_factor")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e6):
        raise _refused(path, VAE, "scaling_factor", scale, "a positive number")
    layers = text.get("num_hidden_layers")
    if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 1):
        raise _refused(path, TEXT, "num_hidden_layers", layers, "a number of layers")
    size = unet.get("sample_size")
    return Settings(
        PREDICTION_TYPES[prediction] if prediction is not None else None,
        float(scale) if scale is not None else None,
        size if isinstance(size, int) and not isinstance(size, bool) and 0 < size <= 1024 else None,
        layers,
        named | ({SCHEDULER: scheduler} if scheduler else {}),
        tuple(_sampling(scheduler)),
    )


def _check_settings(path: Path, name: str, document: Mapping[str, Any]) -> None:
    known = {
        *_USED[name],
        *_HARMLESS[name],
        *_SIZES.get(name, {}),
        *(key for family in FAMILIES for key in family.settings.get(name, {})),
    }
    _check_fixed(path, name, document, _FIXED[name])
    for key, value in document.items():
        # names with a leading _ are the tool's own; null means not set
        if key not in known and key not in _FIXED[name] and not key.startswith("_") and value is not None:
            raise _refused(path, name, key, value, "no such setting")


def _check_fixed(path: Path, name: str, document: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, allowed in fixed.items():
        values = document[key] if isinstance(document.get(key), list) else [document.get(key, allowed[0])]
        if not all(any(_same(value, good) for good in allowed) for value in values):
            raise _refused(
                path,
                name,
                key,
                document[key],
                " or ".join(str(good) for good in allowed[:4]) + (" or another of its kind" if allowed[4:] else ""),
            )


def check_family(path: Path, configs: Mapping[str, Mapping[str, Any]], family: Family) -> None:
    """Check the settings that differ between families, by file name, once the family is known.

    Raises:
        CheckpointError: a setting belongs to another family.
    """
    for name, fixed in family.settings.items():
        _check_fixed(path, name, configs.get(name, {}), fixed)
    unet, text = configs.get(UNET, {}), configs.get(TEXT, {})
    key = (
        "num_attention_heads" if unet.get("num_attention_heads") is not None else "attention_head_dim"
    )  # the old name in diffusers for the number of heads
    heads = unet.get(key, family.heads)
    if any(not _same(n, family.heads) for n in (heads if isinstance(heads, list) else [heads])):
        raise _refused(path, UNET, key, heads, f"{family.heads} heads")
    width, text_heads = text.get("hidden_size"), text.get("num_attention_heads")
    head_width = family.text_encoder.text.head_width
    if isinstance(width, int) and isinstance(text_heads, int) and width != text_heads * head_width:
        raise _refused(
            path,
            TEXT,
            "num_attention_heads",
            text_heads,
            f"{width // head_width}, of {head_width} channels each",
        )


def _sampling(scheduler: Mapping[str, Any]) -> list[str]:
    """Remarks where a folder was made for another sampling than is usual in its family. A bundle stores no sampler."""
    own = [name for family in FAMILIES for name in family.schedulers]
    chosen = [str(scheduler["_class_name"])] if scheduler.get("_class_name", own[0]) not in own else []
    if (spacing := scheduler.get("timestep_spacing", "leading")) != "leading":
        chosen.append(f"timestep_spacing {printable(str(spacing))[:40]}")
    chosen += [
        key
        for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
        if scheduler.get(key) is True
    ]
    return (
        [
            f"{SCHEDULER}: says {', '.join(chosen)}; a bundle keeps no sampler: choose with --sampler and --schedule of"
            " sdrt generate"
        ]
        if chosen
        else []
    )


def check_sizes(path: Path, configs: Mapping[str, Mapping[str, Any]], arch: Architecture) -> None:
    """Check that the sizes in config.json files are those of the tensors. diffusers would not load the folder
    otherwise.

    Raises:
        CheckpointError: a size differs.
    """
    for name, config in configs.items():
        for key, read in _SIZES.get(name, {}).items():
            found, expected = config.get(key), read(arch)
            if found is not None and not (
                list(found) == list(expected)
                if isinstance(found, list)
                else all(_same(found, size) for size in expected)
            ):
                shown = expected[0] if len(set(expected)) == 1 else list(expected)
                raise CheckpointError(
                    f"{path}: {name}: {key}: {printable(repr(found)[:80])}, but the tensors say {shown}",
                    "The folder's files belong to different models; download it again.",
                )


def _blocks(levels: Sequence[Sequence[int]], attention: str, plain: str) -> tuple[str, ...]:
    return tuple(attention if any(depths) else plain for depths in levels)


# The value of each size setting according to the tensors. It has one value per level if it may differ between levels.
_SIZES: dict[str, dict[str, Callable[[Architecture], Sequence[Any]]]] = {
    UNET: {
        "in_channels": lambda arch: (arch.unet.in_channels,),
        "out_channels": lambda arch: (arch.unet.out_channels,),
        "block_out_channels": lambda arch: arch.unet.channels,
        "layers_per_block": lambda arch: arch.unet.res_blocks,
        "cross_attention_dim": lambda arch: (arch.unet.context_width,) * len(arch.unet.channels),
        "transformer_layers_per_block": lambda arch: [depths[0] or arch.unet.middle for depths in arch.unet.down_depth],
        "use_linear_projection": lambda arch: (arch.unet.linear_projections,),
        "down_block_types": lambda arch: _blocks(arch.unet.down_depth, "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": lambda arch: _blocks(arch.unet.up_depth[::-1], "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    VAE: {
        "in_channels": lambda arch: (3,),
        "out_channels": lambda arch: (3,),
        "latent_channels": lambda arch: (arch.vae.latent_channels,),
        "block_out_channels": lambda arch: arch.vae.channels,
        "layers_per_block": lambda arch: (arch.vae.res_blocks,),
        "down_block_types": lambda arch: ("DownEncoderBlock2D",) * len(arch.vae.channels),
        "up_block_types": lambda arch: ("UpDecoderBlock2D",) * len(arch.vae.channels),
    },
    TEXT: {
        "hidden_size": lambda arch: (arch.texts[0].width,),
        "intermediate_size": lambda arch: (arch.texts[0].mlp_width,),
        "vocab_size": lambda arch: (arch.texts[0].vocabulary,),
        "max_position_embeddings": lambda arch: (arch.texts[0].tokens,),
    },
}


def _same(found: object, expected: object) -> bool:
    return found == expected and isinstance(found, bool) == isinstance(expected, bool)


def _refused(path: Path, name: str, key: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name}: {key}: expected {expected}, found {printable(repr(found)[:80])}: not supported yet",
        BUILDS,
    )
