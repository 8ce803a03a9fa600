"""What a checkpoint is, told by the names and shapes of its tensors: the family, and the sizes of its three networks.

Owns the size dataclasses and their inference. Imports no torch, so that `sdrt inspect` reads headers only.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdrt.bundle import MAX_SIDE, MIN_SIDE, SIZE_STEP
from sdrt.errors import CheckpointError
from sdrt.export.lora_formats import is_adapter

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
NORM_GROUPS = 32
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v", "v_prediction": "v"}
SD1, SD1_INPAINTING = "a Stable Diffusion 1.x model", "a Stable Diffusion 1.x inpainting model"
INPAINTING_CHANNELS = 9
"""Latents 4, mask 1, latents of the masked image 4."""

MAX_BLOCKS = 100
"""Blocks of one kind in a row. Real models stay far below; the limit keeps a forged header from costing minutes."""

HYPERNETWORK_KEY = re.compile(r"(\d{1,6})\.([01])\.(linear\d?\..+)")
"""Width, 0 for keys or 1 for values, and the layer's own name."""
OPTION_OF_KIND = {"a LoRA": "--lora", "a VAE": "--vae", "a textual-inversion embedding": "--embedding", "a hypernetwork": "--hypernetwork"}
"""How `sdrt build` takes what `describe` calls by these names."""
_OTHER_UNETS = {
    "time_embed.cond_proj.": "a latent consistency model, whose UNet is told the guidance scale",
    "time_embedding.cond_proj.": "a latent consistency model, whose UNet is told the guidance scale",
    "label_emb.": "a UNet that is told a class or a size",
}
"""What a UNet is whose tensors start like this below the prefix."""
_MAX_TOKENS, _NARROWEST = 16, 64
"""Embeddings that one file may hold before it is another kind of file, and their least width: text encoders are multiples of 64 wide."""

_SIZE = (512, 512)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class HypernetworkSpec:
    """Sizes of a traced hypernetwork. `layers` has one entry per width it has networks for, each the widths along one, ends included, such as
    (768, 1536, 768). `activation` is a class of torch.nn, None for none; `activate_output` puts one after the last layer too.
    """

    layers: tuple[tuple[int, ...], ...]
    activation: str | None
    layer_norm: bool
    activate_output: bool


@dataclass(frozen=True)
class UNetSpec:
    """Sizes of a UNet, all read from tensor shapes except `heads` and `head_width`, of which exactly one is set by the family.

    `channels`, `res_blocks` and `transformer_depth` have one entry per level, finest first; depth 0 means no attention there.
    `hypernetworks` are traced in, in order; keys and values made from inputs as wide as one of `biased` have a bias, which folding brings.
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    res_blocks: tuple[int, ...]
    transformer_depth: tuple[int, ...]
    middle_depth: int
    context_width: int
    linear_projections: bool
    heads: int | None
    head_width: int | None
    hypernetworks: tuple[HypernetworkSpec, ...] = ()
    biased: tuple[int, ...] = ()


@dataclass(frozen=True)
class VaeSpec:
    """Sizes of a VAE. `channels` has one entry per level, finest first; one latent covers 2 ** (levels - 1) pixels a side.

    `scale` multiplies latents after encoding and divides them before decoding (0.18215 for SD 1.x and 2.x).
    """

    channels: tuple[int, ...]
    res_blocks: int
    latent_channels: int
    scale: float


@dataclass(frozen=True)
class ClipSpec:
    """Sizes of a CLIP text encoder; `heads` follows the family's 64 channels each.

    `clip_skip` names the layers the graph gives out, in AUTOMATIC1111's counting: 1 is the last layer, 2 the one before it.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    vocabulary: int
    tokens: int
    clip_skip: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Architecture:
    """A whole model. `size` is the default picture as (width, height); `prediction` is "epsilon" or "v"."""

    family: str
    prediction: str
    size: tuple[int, int]
    clip: ClipSpec
    unet: UNetSpec
    vae: VaeSpec


def describe(names: Shapes) -> str:
    """What a set of tensor names is, in words: a family sdrt builds, one it does not build yet, or another kind of file."""

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefix) for name in names for prefix in prefixes)

    if not names:
        return "an empty file"
    if "lora_controlnet" in names:
        return "a Control-LoRA"
    if has("ip_adapter.", "image_proj."):
        return "an IP-Adapter"
    if has("lora_unet_", "lora_te", "lycoris_") or is_adapter(names):
        return "a LoRA"
    if any(HYPERNETWORK_KEY.fullmatch(name) for name in names):
        return "a hypernetwork"
    if _are_embeddings(names):
        return "a textual-inversion embedding"
    if has("model.diffusion_model.double_blocks.", "double_blocks."):
        return "a Flux model"
    if has("model.diffusion_model.joint_blocks.", "joint_blocks."):
        return "an SD3 model"
    if "conditioner.embedders.1.model.ln_final.weight" in names:
        return "an SDXL model"
    if (width := names.get("conditioner.embedders.0.model.ln_final.weight")) is not None:
        return "an SD2 model" if width == (1024,) else "an SDXL refiner"
    if has("depth_model."):
        return "an SD2 depth model"
    if has("embedder.model."):
        return "an unCLIP model"
    if has("cond_stage_model.model."):
        return "an SD2 model"
    if has("controlnet_cond_embedding.", "controlnet_mid_block.", "input_hint_block.") or (has("control_model.") and not has(UNET)):
        return "a ControlNet"
    if has("adapter.body.", "body.0."):
        return "a T2I-Adapter"
    if any(".motion_modules." in name for name in names):
        return "a motion module of AnimateDiff"
    if has("down_blocks.", "unet.down_blocks."):
        return "a UNet in diffusers naming"
    if has(UNET):
        conv_in = names.get(UNET + "input_blocks.0.0.weight", ())
        channels = conv_in[1] if len(conv_in) == 4 else 4
        context = next((s[-1] for n, s in names.items() if n.startswith(UNET) and n.endswith("attn2.to_k.weight") and s), 0)
        special = {7: "an x4 upscaler", 8: "an instruct-pix2pix model"}
        if channels not in (4, INPAINTING_CHANNELS):
            return special.get(channels, f"a UNet of {channels} input channels")
        if not has(CLIP):
            return {1024: "an SD2 UNet without its text encoder", 2048: "an SDXL UNet without its text encoders"}.get(
                context, "a Stable Diffusion UNet without its text encoder"
            )
        return SD1_INPAINTING if channels == INPAINTING_CHANNELS else SD1
    if has(VAE, "decoder.up.", "encoder.down."):
        return "a VAE"
    if has(CLIP, "text_model."):
        return "a CLIP text encoder"
    return "tensors of no kind that sdrt knows"


def _are_embeddings(names: Shapes) -> bool:
    """AUTOMATIC1111's and SDXL's names, or a few tensors of vectors under names that are no layer's: tokens, as diffusers saves them."""
    if any(name.startswith("string_to_param.") for name in names) or names.keys() <= {"emb_params", "clip_l", "clip_g"}:
        return True
    return len(names) <= _MAX_TOKENS and all(len(s) in (1, 2) and s[-1] >= _NARROWEST and not n.endswith((".weight", ".bias")) for n, s in names.items())


def architecture(path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> Architecture:
    """Infer the architecture of a Stable Diffusion 1.x checkpoint from canonical tensor names and shapes.

    Raises:
        CheckpointError: the file is of another family or kind, a component is missing, or shapes contradict each other.
    """
    kind = describe(shapes)
    if kind not in (SD1, SD1_INPAINTING):
        _refuse_kind(path, kind)
    if VAE + "decoder.conv_in.weight" not in shapes:
        raise CheckpointError(f"{path}: has no VAE ({VAE}*)", "Supply one with --vae FILE.")
    for start, what in _OTHER_UNETS.items():
        if name := next((name for name in shapes if name.startswith(UNET + start)), None):
            raise CheckpointError(f"{path}: {name}: {what}: not supported yet", "This version of sdrt builds Stable Diffusion 1.x and its inpainting models.")
    unet, vae, clip = unet_spec(path, shapes), vae_spec(path, shapes), clip_spec(path, shapes)
    if unet.context_width != clip.width:
        raise CheckpointError(
            f"{path}: the UNet attends to contexts {unet.context_width} wide, the text encoder gives {clip.width}", "The components are of different models."
        )
    if unet.out_channels != vae.latent_channels:
        raise CheckpointError(
            f"{path}: the UNet gives {unet.out_channels} channels, the VAE takes {vae.latent_channels}", "The components are of different models."
        )
    if "ztsnr" in shapes:
        raise CheckpointError(f"{path}: ztsnr: trained to zero signal at the last step: not supported yet", "Use a checkpoint without it.")
    stated = metadata.get("modelspec.prediction_type", "v" if "v_pred" in shapes else "epsilon")
    if stated not in PREDICTIONS:
        raise CheckpointError(f"{path}: modelspec.prediction_type: {stated!r}: not supported yet", f"This version of sdrt knows {', '.join(PREDICTIONS)}.")
    prediction = PREDICTIONS[stated]
    return Architecture("sd1", prediction, default_size(metadata)[0], clip, unet, vae)


def _refuse_kind(path: Path, kind: str) -> None:
    fixes = {
        "a LoRA": "Pass it with --lora, and the checkpoint it was trained on with --checkpoint.",
        "a VAE": "Pass it with --vae, and a whole checkpoint with --checkpoint.",
        "a textual-inversion embedding": "Pass it with --embedding, and the checkpoint it was trained on with --checkpoint.",
        "a hypernetwork": "Pass it with --hypernetwork, and the checkpoint it was trained on with --checkpoint.",
        "a Stable Diffusion UNet without its text encoder": "Give a whole checkpoint: no option supplies the text encoder.",
    }
    if "not supported yet" in fixes.get(kind, "") or kind in fixes or kind.startswith(("tensors", "an empty", "a CLIP")):
        raise CheckpointError(
            f"{path}: expected a Stable Diffusion 1.x checkpoint, found {kind}", fixes.get(kind, "Give a whole checkpoint in one .safetensors file.")
        )
    raise CheckpointError(f"{path}: {kind}: not supported yet", "This version of sdrt builds Stable Diffusion 1.x and its inpainting models.")


def _shape(path: Path, shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None:
        raise CheckpointError(f"{path}: {name}: missing", "The file is incomplete; download it again.")
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{path}: {name}: expected {rank} dimensions, found shape {list(shape)}")
    return shape


def block_count(path: Path, shapes: Shapes, pattern: str) -> int:
    """How many of `pattern`, which ends in `{}.`, with {} = 0, 1, 2, ... are prefixes of some name."""
    prefix = pattern.removesuffix("{}.")
    numbers = {name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)}
    count = next(n for n in itertools.count() if str(n) not in numbers)
    if count > MAX_BLOCKS:
        raise CheckpointError(f"{path}: {prefix}*: {count:,} blocks, more than the limit of {MAX_BLOCKS}")
    return count


def unet_spec(path: Path, shapes: Shapes) -> UNetSpec:
    """Sizes of the UNet below `model.diffusion_model.`, walked along its input blocks."""
    shapes = {name[len(UNET) :]: shape for name, shape in shapes.items() if name.startswith(UNET)}
    base, in_channels = _shape(path, shapes, "input_blocks.0.0.weight", 4)[:2]
    channels, res_blocks, depths, width, linear = [base], [0], [0], 0, False
    for i in range(1, block_count(path, shapes, "input_blocks.{}.")):
        block = f"input_blocks.{i}."
        if block + "0.op.weight" in shapes:
            channels.append(0)
            res_blocks.append(0)
            depths.append(0)
            continue
        channels[-1] = _shape(path, shapes, block + "0.in_layers.2.weight", 4)[0]
        res_blocks[-1] += 1
        depths[-1] = block_count(path, shapes, block + "1.transformer_blocks.{}.")
        if depths[-1]:
            width = _shape(path, shapes, block + "1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
            linear = len(shapes.get(block + "1.proj_in.weight", ())) == 2
    middle = block_count(path, shapes, "middle_block.1.transformer_blocks.{}.")
    if not width or not middle:
        raise CheckpointError(f"{path}: {UNET}*: no cross-attention found in the UNet", "This version of sdrt builds Stable Diffusion 1.x.")
    if 0 in res_blocks:
        raise CheckpointError(f"{path}: {UNET}input_blocks: level {res_blocks.index(0)} has no residual block", "The file is incomplete; download it again.")
    heads = 8
    for level in channels:
        if level % NORM_GROUPS or level % heads:
            raise CheckpointError(f"{path}: {UNET}*: {level} channels in a level, expected a multiple of {NORM_GROUPS} groups and {heads} heads")
    out_channels = _shape(path, shapes, "out.2.weight", 4)[0]
    return UNetSpec(in_channels, out_channels, tuple(channels), tuple(res_blocks), tuple(depths), middle, width, linear, heads, None)


def vae_spec(path: Path, shapes: Shapes) -> VaeSpec:
    """Sizes of the VAE below `first_stage_model.`, from its decoder."""
    shapes = {name[len(VAE) :]: shape for name, shape in shapes.items() if name.startswith(VAE)}
    latent_channels = _shape(path, shapes, "decoder.conv_in.weight", 4)[1]
    levels = block_count(path, shapes, "decoder.up.{}.")
    channels = tuple(_shape(path, shapes, f"decoder.up.{i}.block.0.conv1.weight", 4)[0] for i in range(levels))
    res_blocks = block_count(path, shapes, "decoder.up.0.block.{}.") - 1
    if levels < 2 or res_blocks < 1 or any(c % NORM_GROUPS for c in channels):
        raise CheckpointError(f"{path}: {VAE}decoder: unexpected sizes: {levels} levels of {list(channels)} channels, {res_blocks + 1} blocks each")
    return VaeSpec(channels, res_blocks, latent_channels, 0.18215)


def clip_spec(path: Path, shapes: Shapes) -> ClipSpec:
    """Sizes of the text encoder below `cond_stage_model.transformer.`."""
    shapes = {name[len(CLIP + "text_model.") :]: shape for name, shape in shapes.items() if name.startswith(CLIP + "text_model.")}
    vocabulary, width = _shape(path, shapes, "embeddings.token_embedding.weight", 2)
    tokens = _shape(path, shapes, "embeddings.position_embedding.weight", 2)[0]
    layers = block_count(path, shapes, "encoder.layers.{}.")
    mlp_width = _shape(path, shapes, "encoder.layers.0.mlp.fc1.weight", 2)[0]
    if width % 64:
        raise CheckpointError(f"{path}: {CLIP}*: text width {width}, expected a multiple of 64 channels a head")
    return ClipSpec(width, layers, width // 64, mlp_width, vocabulary, tokens)


def default_size(metadata: Mapping[str, str]) -> tuple[tuple[int, int], str]:
    """The picture size that a file's metadata names as (width, height), else 512x512; and a remark where it names one that cannot be read."""
    text = metadata.get("modelspec.resolution")
    if text is None:
        return _SIZE, ""
    if match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, re.ASCII):
        size = int(match[1]), int(match[2])
        if all(MIN_SIDE <= side <= MAX_SIDE and side % SIZE_STEP == 0 for side in size):
            return size, ""
    limits = f"WIDTHxHEIGHT in multiples of {SIZE_STEP} from {MIN_SIDE} to {MAX_SIDE}"
    return _SIZE, f"modelspec.resolution: expected {limits}, found {text[:80]!r}; the default size is {_SIZE[0]}x{_SIZE[1]}"
