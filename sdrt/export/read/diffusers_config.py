"""Reads from the JSON files of a diffusers folder what the tensors do not tell. Every setting is used, is known to
change nothing, or makes sdrt refuse the folder.

Names and defaults are those of diffusers' and transformers' configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdrt.errors import CheckpointError, printable
from sdrt.export.architecture import Architecture, UNetSpec
from sdrt.export.families.family import Family
from sdrt.export.families.table import BUILDS, FAMILIES

PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
UNET, VAE, SCHEDULER = "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"
TEXTS = ("text_encoder/config.json", "text_encoder_2/config.json")
"""Of the text encoders, in the order of a model's."""
EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
"""Classes for networks trained on every level between two (Karras et al. 2022)."""

# What sdrt's networks compute. A folder with other values would build and give wrong pictures.
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    UNET: {
        "_class_name": ("UNet2DConditionModel",),
        "act_fn": ("silu", "swish"),
        "norm_num_groups": (32,),
        "norm_eps": (1e-5,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "center_input_sample": (False,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
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
    },
    VAE: {
        "_class_name": ("AutoencoderKL",),
        "act_fn": ("silu", "swish"),
        "norm_num_groups": (32,),
        "shift_factor": (None, 0),
        "mid_block_add_attention": (True,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
    },
    **{
        name: {"model_type": ("clip_text_model",), "layer_norm_eps": (1e-5,), "use_attention_mask": (False, None)}
        for name in TEXTS
    },
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
            *EDM_SCHEDULERS,
        ),
        "trained_betas": (None,),
        "thresholding": (False,),
        "use_flow_sigmas": (False,),
        "use_dynamic_shifting": (False,),
    },
}
_USED = {
    UNET: (
        "attention_head_dim",
        "num_attention_heads",
        "sample_size",
        "mid_block_type",
        "transformer_layers_per_block",
        "reverse_transformer_layers_per_block",
    ),
    VAE: ("scaling_factor", "latents_mean", "latents_std"),
    **dict.fromkeys(TEXTS, ("num_attention_heads", "num_hidden_layers")),
    SCHEDULER: ("prediction_type", "rescale_betas_zero_snr", "sigma_min", "sigma_max", "sigma_data"),
}
# Precision, training, and settings that only act together with a setting above, which must be absent.
_HARMLESS = {
    UNET: (
        "dropout",
        "upcast_attention",
        "addition_time_embed_dim",
        "addition_embed_type_num_heads",
    ),
    VAE: ("force_upcast", "sample_size"),
    **dict.fromkeys(
        TEXTS,
        (
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
        "sigma_schedule",
        "rho",
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
    """The settings of a folder; None where the files do not say.

    prediction, zero_snr, sigmas, sigma_data: as `Architecture` has them.
    vae_scale, vae_mean, vae_std: as `VaeSpec` has them.
    sample_size: latents a side.
    text_layers: how many layers of each text encoder are used, by the name of its component.
    scaled_image: whether the image of an edit model is scaled as latents are.
    zero_empty: as `Architecture` has it.
    configs: by file name the config.json of each network, whose sizes `check_sizes` compares, and the scheduler's.
    """

    prediction: str | None = None
    zero_snr: bool | None = None
    sigmas: tuple[float, float] | None = None
    sigma_data: float = 1.0
    vae_scale: float | None = None
    vae_mean: tuple[float, ...] = ()
    vae_std: tuple[float, ...] = ()
    sample_size: int | None = None
    text_layers: Mapping[str, int] = field(default_factory=dict)
    scaled_image: bool = False
    zero_empty: bool | None = None
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def activation(self) -> str:
        """Of the first text encoder, "" where no file says."""
        return str(self.configs.get(TEXTS[0], {}).get("hidden_act") or "")


def read_settings(
    path: Path,
    configs: Mapping[str, Mapping[str, Any]],
    scheduler: Mapping[str, Any],
    index: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from each component's config.json, by component, from the scheduler's, and from model_index.json.

    Raises:
        CheckpointError: a setting that sdrt's networks do not have, that sdrt does not know, or that has the wrong
            type.
    """
    named = {f"{component}/config.json": config for component, config in configs.items()}
    for name, document in (named | {SCHEDULER: scheduler}).items():
        _check_settings(path, name, document)
    unet, vae = (named.get(name, {}) for name in (UNET, VAE))
    scale = vae.get("scaling_factor")
    if scale is not None and not _positive(scale):
        raise _refused(path, VAE, "scaling_factor", scale, "a positive number")
    size = unet.get("sample_size")
    settings = Settings(
        vae_scale=float(scale) if scale is not None else None,
        vae_mean=_numbers(path, vae, "latents_mean"),
        vae_std=_numbers(path, vae, "latents_std"),
        sample_size=size if isinstance(size, int) and not isinstance(size, bool) and 0 < size <= 1024 else None,
        text_layers={
            name.partition("/")[0]: layers
            for name in TEXTS
            if (layers := _layers(path, name, named.get(name, {}))) is not None
        },
        scaled_image=(index or {}).get("is_cosxl_edit") is True,
        zero_empty=_zero_empty(path, index or {}),
        configs=named | ({SCHEDULER: scheduler} if scheduler else {}),
    )
    return _with_schedule(path, settings, scheduler) if scheduler else settings


def _with_schedule(path: Path, settings: Settings, scheduler: Mapping[str, Any]) -> Settings:
    """What the network predicts and the levels it was trained on, by the scheduler's settings."""
    prediction = scheduler.get("prediction_type", "epsilon")
    if not (isinstance(prediction, str) and prediction in PREDICTION_TYPES):
        raise _refused(path, SCHEDULER, "prediction_type", prediction, " or ".join(PREDICTION_TYPES))
    zero_snr = scheduler.get("rescale_betas_zero_snr", False)
    if not isinstance(zero_snr, bool):
        raise _refused(path, SCHEDULER, "rescale_betas_zero_snr", zero_snr, "true or false")
    if scheduler.get("_class_name") not in EDM_SCHEDULERS:
        return replace(settings, prediction=PREDICTION_TYPES[prediction], zero_snr=zero_snr)
    numbers = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5} | {
        key: value for key, value in scheduler.items() if key.startswith("sigma_") and key != "sigma_schedule"
    }
    for key, number in numbers.items():
        if not _positive(number):
            raise _refused(path, SCHEDULER, key, number, "a positive number")
    # Diffusers' "epsilon" is F of Karras et al. 2022 there.
    said = "edm" if prediction == "epsilon" else PREDICTION_TYPES[prediction]
    sigmas = float(numbers["sigma_min"]), float(numbers["sigma_max"])
    if sigmas[0] >= sigmas[1]:
        raise _refused(path, SCHEDULER, "sigma_min", sigmas[0], f"less than sigma_max, {sigmas[1]:g}")
    return replace(settings, prediction=said, zero_snr=False, sigmas=sigmas, sigma_data=float(numbers["sigma_data"]))


def _zero_empty(path: Path, index: Mapping[str, Any]) -> bool | None:
    said = index.get("force_zeros_for_empty_prompt")
    if said is not None and not isinstance(said, bool):
        raise _refused(path, "model_index.json", "force_zeros_for_empty_prompt", said, "true or false")
    return said


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6


def _numbers(path: Path, vae: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """A number for each channel of latents; none where they are left as they are."""
    found = vae.get(key)
    if found is None:
        return ()
    numbers = isinstance(found, list) and all(isinstance(n, int | float) and abs(n) < 1e6 for n in found)
    if not numbers or found == [] or (key == "latents_std" and not all(_positive(n) for n in found)):
        raise _refused(path, VAE, key, found, "a number for each channel")
    return tuple(float(n) for n in found)


def _layers(path: Path, name: str, text: Mapping[str, Any]) -> int | None:
    layers = text.get("num_hidden_layers")
    if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 1):
        raise _refused(path, name, "num_hidden_layers", layers, "a number of layers")
    return layers


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
    for name, component in zip(TEXTS, family.text_encoders, strict=False):
        config = configs.get(name, {})
        width, heads = config.get("hidden_size"), config.get("num_attention_heads")
        head_width = component.text.head_width
        if isinstance(width, int) and isinstance(heads, int) and width != heads * head_width:
            expected = f"{width // head_width}, of {head_width} channels each"
            raise _refused(path, name, "num_attention_heads", heads, expected)


def sampling_note(scheduler: Mapping[str, Any], family: Family) -> str:
    """A remark where a folder was made for another sampling than is usual in its family, else "". A bundle stores no
    sampler.
    """
    own = family.schedulers
    chosen = [str(scheduler["_class_name"])] if scheduler.get("_class_name", own[0]) not in own else []
    if (spacing := scheduler.get("timestep_spacing", "leading")) != "leading":
        chosen.append(f"timestep_spacing {printable(str(spacing))[:40]}")
    chosen += [
        key
        for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
        if scheduler.get(key) is True
    ]
    return (
        f"{SCHEDULER}: says {', '.join(chosen)}; a bundle keeps no sampler: choose with --sampler and --schedule of"
        " sdrt generate"
        if chosen
        else ""
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
                raise _differs(path, name, key, found, expected)
    if UNET in configs:
        _check_levels(path, configs[UNET], arch.unet)


def _check_levels(path: Path, unet: Mapping[str, Any], sizes: UNetSpec) -> None:
    """Check heads, depths and the middle. What is said of a level without attention is not used."""
    # The second is the old name in diffusers for the number of heads.
    key = "num_attention_heads" if unet.get("num_attention_heads") is not None else "attention_head_dim"
    heads = [_heads(sizes, channels) for channels in sizes.channels]
    if unet.get(key) is not None and not _fits(unet[key], heads, [any(depths) for depths in sizes.down_depth]):
        raise _refused(path, UNET, key, unet[key], f"{heads[0] if len(set(heads)) == 1 else heads} heads")
    for key, depths in (
        ("transformer_layers_per_block", sizes.down_depth),
        ("reverse_transformer_layers_per_block", sizes.up_depth[::-1]),
    ):
        if unet.get(key) is not None and not _fits(unet[key], depths, [any(blocks) for blocks in depths]):
            raise _differs(path, UNET, key, unet[key], depths)
    middle = unet.get("mid_block_type", _MIDDLE[2])
    if middle != _MIDDLE[0 if sizes.middle is None else min(1 + sizes.middle, 2)]:
        raise _differs(path, UNET, "mid_block_type", middle, [f"{sizes.middle} transformer blocks in the middle"])


_MIDDLE = (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn")
"""No middle, a residual block, and one with attention."""


def _heads(unet: UNetSpec, channels: int) -> int:
    """Heads of a level, which diffusers calls `attention_head_dim`."""
    return unet.heads if unet.heads is not None else channels // (unet.head_width or channels)


def _fits(found: object, levels: Sequence[int | Sequence[int]], used: Sequence[bool]) -> bool:
    """Whether a setting, one value or one a level, each for all blocks of the level or one a block, is that of the
    tensors.
    """
    said = found if isinstance(found, list) else [found] * len(levels)
    if len(said) != len(levels):
        return False
    for one, expected, counts in zip(said, levels, used, strict=True):
        blocks = (expected,) if isinstance(expected, int) else tuple(expected)
        if counts and not (tuple(one) == blocks if isinstance(one, list) else all(_same(one, n) for n in blocks)):
            return False
    return True


def _differs(path: Path, name: str, key: str, found: object, expected: Sequence[Any]) -> CheckpointError:
    shown = expected[0] if len(set(expected)) == 1 else list(expected)
    return CheckpointError(
        f"{path}: {name}: {key}: {printable(repr(found)[:80])}, but the tensors say {shown}",
        "The folder's files belong to different models; download it again.",
    )


def _blocks(levels: Sequence[Sequence[int]], attention: str, plain: str) -> tuple[str, ...]:
    return tuple(attention if any(depths) else plain for depths in levels)


def _text_sizes(index: int) -> dict[str, Callable[[Architecture], Sequence[Any]]]:
    return {
        "hidden_size": lambda arch: [text.width for text in arch.texts[index : index + 1]],
        "intermediate_size": lambda arch: [text.mlp_width for text in arch.texts[index : index + 1]],
        "vocab_size": lambda arch: [text.vocabulary for text in arch.texts[index : index + 1]],
        "max_position_embeddings": lambda arch: [text.tokens for text in arch.texts[index : index + 1]],
    }


# The value of each size setting according to the tensors. It has one value per level if it may differ between levels.
_SIZES: dict[str, dict[str, Callable[[Architecture], Sequence[Any]]]] = {
    UNET: {
        "in_channels": lambda arch: (arch.unet.in_channels,),
        "out_channels": lambda arch: (arch.unet.out_channels,),
        "block_out_channels": lambda arch: arch.unet.channels,
        "layers_per_block": lambda arch: arch.unet.res_blocks,
        "cross_attention_dim": lambda arch: (arch.unet.context_width,) * len(arch.unet.channels),
        "use_linear_projection": lambda arch: (arch.unet.linear_projections,),
        "down_block_types": lambda arch: _blocks(arch.unet.down_depth, "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": lambda arch: _blocks(arch.unet.up_depth[::-1], "CrossAttnUpBlock2D", "UpBlock2D"),
        "time_cond_proj_dim": lambda arch: (arch.unet.guidance_width,),
        "projection_class_embeddings_input_dim": lambda arch: (arch.unet.vector_width,),
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
    TEXTS[0]: _text_sizes(0),
    TEXTS[1]: _text_sizes(1),
}


def _same(found: object, expected: object) -> bool:
    return found == expected and isinstance(found, bool) == isinstance(expected, bool)


def _refused(path: Path, name: str, key: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name}: {key}: expected {expected}, found {printable(repr(found)[:80])}: not supported yet",
        BUILDS,
    )
