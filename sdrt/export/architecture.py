"""What a checkpoint is, told by the names and shapes of its tensors: the family, and the sizes of its three networks.

Owns the size dataclasses and their inference. Imports no torch, so that `sdrt inspect` reads headers only.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdrt.bundle.manifest import MAX_SIDE, MIN_SIDE, SIZE_STEP
from sdrt.errors import CheckpointError
from sdrt.export.families.family import Family, Shapes
from sdrt.export.families.recognise import OPTION_OF_KIND, UNET_ALONE, VAE, describe
from sdrt.export.families.table import BUILDS, FAMILIES, family_of

NORM_GROUPS = 32
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v", "v_prediction": "v"}

MAX_BLOCKS = 100
"""Blocks of one kind in a row. Real models stay far below; the limit keeps a forged header from costing minutes."""


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

    `scale` multiplies latents after encoding and divides them before decoding .
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


def architecture(path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> Architecture:
    """Infer the architecture of a checkpoint from canonical tensor names and shapes.

    Raises:
        CheckpointError: the file is of a family or kind that is not built, a component is missing, or shapes contradict each other.
    """
    kind = describe(shapes)
    family = family_of(kind)
    if family is None:
        raise _refused(path, kind)
    if family.vae.prefix + "decoder.conv_in.weight" not in shapes:
        raise CheckpointError(f"{path}: has no VAE ({family.vae.prefix}*)", "Supply one with --vae FILE.")
    for start, what in family.refused.items():
        if name := next((name for name in shapes if name.startswith(family.unet.prefix + start)), None):
            raise CheckpointError(f"{path}: {name}: {what}: not supported yet", BUILDS)
    unet, vae, clip = unet_spec(path, shapes, family), vae_spec(path, shapes, family), clip_spec(path, shapes, family)
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
    stated = metadata.get("modelspec.prediction_type", "v" if "v_pred" in shapes else family.prediction)
    if stated not in PREDICTIONS:
        raise CheckpointError(f"{path}: modelspec.prediction_type: {stated!r}: not supported yet", f"This version of sdrt knows {', '.join(PREDICTIONS)}.")
    return Architecture(family.name, PREDICTIONS[stated], default_size(metadata, family)[0], clip, unet, vae)


def _refused(path: Path, kind: str) -> CheckpointError:
    """Why a file of that kind is no checkpoint that is built, and how it is given to a build if it is part of one."""
    if kind in OPTION_OF_KIND:
        of_it = "a whole checkpoint" if kind == VAE else "the checkpoint it was trained on"
        fix = f"Pass it with {OPTION_OF_KIND[kind]}, and {of_it} with --checkpoint."
    elif kind == UNET_ALONE:
        fix = "Give a whole checkpoint: no option supplies the text encoder."
    elif kind.startswith(("tensors", "an empty", "a CLIP")):
        fix = "Give a whole checkpoint in one .safetensors file."
    else:
        return CheckpointError(f"{path}: {kind}: not supported yet", BUILDS)
    return CheckpointError(f"{path}: expected a {' or '.join(family.title for family in FAMILIES)} checkpoint, found {kind}", fix)


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


def unet_spec(path: Path, shapes: Shapes, family: Family) -> UNetSpec:
    """Sizes of the UNet, walked along its input blocks."""
    prefix = family.unet.prefix
    shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
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
        raise CheckpointError(f"{path}: {prefix}*: no cross-attention found in the UNet", BUILDS)
    if 0 in res_blocks:
        raise CheckpointError(f"{path}: {prefix}input_blocks: level {res_blocks.index(0)} has no residual block", "The file is incomplete; download it again.")
    heads = family.heads
    for level in channels:
        if level % NORM_GROUPS or level % heads:
            raise CheckpointError(f"{path}: {prefix}*: {level} channels in a level, expected a multiple of {NORM_GROUPS} groups and {heads} heads")
    out_channels = _shape(path, shapes, "out.2.weight", 4)[0]
    return UNetSpec(in_channels, out_channels, tuple(channels), tuple(res_blocks), tuple(depths), middle, width, linear, heads, None)


def vae_spec(path: Path, shapes: Shapes, family: Family) -> VaeSpec:
    """Sizes of the VAE, from its decoder."""
    prefix = family.vae.prefix
    shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
    latent_channels = _shape(path, shapes, "decoder.conv_in.weight", 4)[1]
    levels = block_count(path, shapes, "decoder.up.{}.")
    channels = tuple(_shape(path, shapes, f"decoder.up.{i}.block.0.conv1.weight", 4)[0] for i in range(levels))
    res_blocks = block_count(path, shapes, "decoder.up.0.block.{}.") - 1
    if levels < 2 or res_blocks < 1 or any(c % NORM_GROUPS for c in channels):
        raise CheckpointError(f"{path}: {prefix}decoder: unexpected sizes: {levels} levels of {list(channels)} channels, {res_blocks + 1} blocks each")
    return VaeSpec(channels, res_blocks, latent_channels, family.latent_scale)


def clip_spec(path: Path, shapes: Shapes, family: Family) -> ClipSpec:
    """Sizes of the text encoder."""
    prefix = family.text_encoder.prefix + "text_model."
    shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
    vocabulary, width = _shape(path, shapes, "embeddings.token_embedding.weight", 2)
    tokens = _shape(path, shapes, "embeddings.position_embedding.weight", 2)[0]
    layers = block_count(path, shapes, "encoder.layers.{}.")
    mlp_width = _shape(path, shapes, "encoder.layers.0.mlp.fc1.weight", 2)[0]
    if width % family.text_head_width:
        raise CheckpointError(f"{path}: {prefix}*: text width {width}, expected a multiple of {family.text_head_width} channels a head")
    return ClipSpec(width, layers, width // family.text_head_width, mlp_width, vocabulary, tokens)


def default_size(metadata: Mapping[str, str], family: Family) -> tuple[tuple[int, int], str]:
    """The picture size that a file's metadata names as (width, height), else the family's; and a remark where it names one that cannot be read."""
    text = metadata.get("modelspec.resolution")
    if text is None:
        return family.size, ""
    if match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, re.ASCII):
        size = int(match[1]), int(match[2])
        if all(MIN_SIDE <= side <= MAX_SIDE and side % SIZE_STEP == 0 for side in size):
            return size, ""
    limits = f"WIDTHxHEIGHT in multiples of {SIZE_STEP} from {MIN_SIDE} to {MAX_SIDE}"
    return family.size, f"modelspec.resolution: expected {limits}, found {text[:80]!r}; the default size is {family.size[0]}x{family.size[1]}"
