"""What a checkpoint is, told by the names and shapes of its tensors: the family, and the sizes of its three networks.

Owns the size dataclasses and their inference. Imports no torch, so that `sdrt inspect` reads headers only.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdrt.bundle.manifest import MAX_SIDE, MIN_SIDE, SIZE_STEP, Vector
from sdrt.errors import CheckpointError
from sdrt.export.families.family import END_TOKEN, Component, Family, Shapes
from sdrt.export.families.recognise import OPTION_OF_KIND, VAE, WITHOUT
from sdrt.export.families.table import BUILDS, FAMILIES, family_of

NORM_GROUPS = 32
PROJECTION = "text_projection.weight"
"""Of a text encoder below its prefix, `[out, in]`."""
MAX_BLOCKS = 100
"""Blocks of one kind in a row. Real models stay far below; the limit keeps a forged header from costing minutes."""


@dataclass(frozen=True)
class HypernetworkSpec:
    """Sizes of a traced hypernetwork. `layers` has one entry per width it has networks for, each the widths along one,
    ends included, such as (768, 1536, 768). `activation` is a class of torch.nn, None for none; `activate_output` puts
    one after the last layer too.
    """

    layers: tuple[tuple[int, ...], ...]
    activation: str | None
    layer_norm: bool
    activate_output: bool


@dataclass(frozen=True)
class UNetSpec:
    """Sizes of a UNet. Shapes of tensors tell all of them, except that the family tells `heads`, `head_width` and
    `upcast_attention`. Exactly one of `heads` and `head_width` is set.

    channels: of each level, finest first.
    down_depth: transformer blocks after each residual block of the way down, for each level; 0 means no attention.
    up_depth: the same of the way up, in the order that a level's blocks run. A level has one block more than down.
    middle: transformer blocks of the middle. 0 means that it is one residual block, None that there is no middle.
    vector_width: numbers of the vector that the UNet is told beside timestep and context, 0 for none.
    guidance_width: numbers of the sinusoid by which the UNet is told the guidance scale, 0 for none.
    upcast_attention: whether scores of attention overflow in half precision.
    hypernetworks: those that are traced in, in order.
    biased: input widths of keys and values with a bias, which folding hypernetworks brings.
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    down_depth: tuple[tuple[int, ...], ...]
    up_depth: tuple[tuple[int, ...], ...]
    middle: int | None
    context_width: int
    linear_projections: bool
    heads: int | None
    head_width: int | None
    vector_width: int = 0
    guidance_width: int = 0
    upcast_attention: bool = False
    hypernetworks: tuple[HypernetworkSpec, ...] = ()
    biased: tuple[int, ...] = ()

    @property
    def res_blocks(self) -> tuple[int, ...]:
        """Residual blocks of each level of the way down."""
        return tuple(map(len, self.down_depth))


@dataclass(frozen=True)
class VaeSpec:
    """Sizes of a VAE. `channels` has one entry per level, finest first; one latent covers 2 ** (levels - 1) pixels a
    side.

    `scale` multiplies latents after encoding and divides them before decoding. Where `mean` and `std` have a number for
    each channel, latents are (x - mean) / std * scale of what the encoder gives.
    """

    channels: tuple[int, ...]
    res_blocks: int
    latent_channels: int
    scale: float
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class ClipSpec:
    """Sizes of a CLIP text encoder.

    clip_skip: the layers the graph gives out, in AUTOMATIC1111's counting: 1 is the last layer, 2 the one before it.
    activation: of the MLPs; quick GELU is x * sigmoid(1.702 x).
    final_norm: whether contexts go through the norm after the last layer.
    projection: width of the vector that it gives for a whole prompt, 0 if it gives none.
    pad: id of the token that fills a chunk after its end.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    vocabulary: int
    tokens: int
    clip_skip: tuple[int, ...] = (1,)
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    final_norm: bool = True
    projection: int = 0
    pad: int = END_TOKEN


@dataclass(frozen=True)
class Architecture:
    """A whole model.

    prediction: what the UNet predicts, one of the manifest's PREDICTIONS.
    size: the default picture as (width, height).
    texts: the text encoders, in the order of their contexts.
    last_layer: the latest layer of the text encoders that contexts come from, counted as in `ClipSpec.clip_skip`.
    sizes, size_width: sizes in pixels that the UNet's vector holds after the pooled numbers, and the width of each.
    zero_snr, sigmas, sigma_data: as the manifest's Diffusion has them; `sigmas` is (lowest, highest).
    concat_scale: multiplies the latents among the channels beside the noisy latents.
    zero_empty: whether an empty negative prompt is zeros, not what the text encoders make of it.
    """

    family: str
    prediction: str
    size: tuple[int, int]
    texts: tuple[ClipSpec, ...]
    unet: UNetSpec
    vae: VaeSpec
    last_layer: int = 1
    sizes: int = 0
    size_width: int = 0
    zero_snr: bool = False
    sigmas: tuple[float, float] | None = None
    sigma_data: float = 1.0
    concat_scale: float = 1.0
    zero_empty: bool = False

    @property
    def vector(self) -> Vector:
        """The parts of the vector that the UNet is told."""
        return Vector(self.texts[-1].projection, self.sizes, self.size_width) if self.unet.vector_width else Vector()


def architecture(path: Path, shapes: Shapes, metadata: Mapping[str, str], kind: str) -> Architecture:
    """Infer the architecture of a checkpoint from canonical tensor names and shapes. `kind` is what `describe` calls
    the file. The prediction is the family's: `sdrt.export.read.diffusion` knows the file's own.

    Raises:
        CheckpointError: the file is of a family or kind that is not built, a component is missing, or shapes contradict
            each other.
    """
    family = family_of(kind)
    if family is None:
        raise _refused(path, kind)
    if family.vae.prefix + "decoder.conv_in.weight" not in shapes:
        raise CheckpointError(f"{path}: has no VAE ({family.vae.prefix}*)", "Supply one with --vae FILE.")
    for start, what in family.refused.items():
        if name := next((name for name in shapes if name.startswith(family.unet.prefix + start)), None):
            raise CheckpointError(f"{path}: {name}: {what}: not supported yet", BUILDS)
    unet, vae = unet_spec(path, shapes, family), vae_spec(path, shapes, family)
    texts = tuple(clip_spec(path, shapes, component) for component in family.text_encoders)
    context_width = sum(text.width for text in texts)
    if unet.context_width != context_width:
        gives = "text encoder gives" if len(texts) == 1 else f"{len(texts)} text encoders give"
        raise CheckpointError(
            f"{path}: the UNet attends to contexts {unet.context_width} wide, the {gives} {context_width}",
            "The components are of different models.",
        )
    if len({text.tokens for text in texts}) > 1:
        raise CheckpointError(
            f"{path}: the text encoders take {' and '.join(str(text.tokens) for text in texts)} tokens",
            "The components are of different models.",
        )
    vector = texts[-1].projection + family.sizes * family.size_width
    if unet.vector_width != vector:
        raise CheckpointError(
            f"{path}: the UNet takes a vector of {unet.vector_width} numbers, the text encoder's and the sizes' are"
            f" {vector}",
            "The components are of different models.",
        )
    if unet.out_channels != vae.latent_channels:
        raise CheckpointError(
            f"{path}: the UNet gives {unet.out_channels} channels, the VAE takes {vae.latent_channels}",
            "The components are of different models.",
        )
    return Architecture(
        family.name,
        family.prediction,
        default_size(metadata, family.size)[0],
        texts,
        unet,
        vae,
        last_layer=family.last_layer,
        sizes=family.sizes,
        size_width=family.size_width,
        zero_empty=family.zero_empty,
    )


def _refused(path: Path, kind: str) -> CheckpointError:
    """Why a file of that kind is no checkpoint that is built, and how it is given to a build if it is part of one."""
    if kind in OPTION_OF_KIND:
        of_it = "a whole checkpoint" if kind == VAE else "the checkpoint it was trained on"
        fix = f"Pass it with {OPTION_OF_KIND[kind]}, beside {of_it}."
    elif WITHOUT in kind:
        fix = "Give a whole checkpoint: no option supplies a text encoder."
    elif kind.startswith(("tensors", "an empty", "a CLIP")):
        fix = "Give a whole checkpoint in one .safetensors file."
    else:
        return CheckpointError(f"{path}: {kind}: not supported yet", BUILDS)
    return CheckpointError(
        f"{path}: expected a {' or '.join(family.title for family in FAMILIES)} checkpoint, found {kind}", fix
    )


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
    """Sizes of the UNet, walked along its blocks."""
    prefix = family.unet.prefix
    shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}

    def depth(block: str) -> int:
        return block_count(path, shapes, block + "1.transformer_blocks.{}.")

    base, in_channels = _shape(path, shapes, "input_blocks.0.0.weight", 4)[:2]
    channels, down, attentions = [base], list[list[int]]([[]]), list[str]()
    for i in range(1, block_count(path, shapes, "input_blocks.{}.")):
        block = f"input_blocks.{i}."
        if block + "0.op.weight" in shapes:
            channels.append(0)
            down.append([])
            continue
        channels[-1] = _shape(path, shapes, block + "0.in_layers.2.weight", 4)[0]
        down[-1].append(depth(block))
        attentions += [block] if down[-1][-1] else []
    if [] in down:
        raise CheckpointError(
            f"{path}: {prefix}input_blocks: level {down.index([])} has no residual block",
            "The file is incomplete; download it again.",
        )
    up, output = list[tuple[int, ...]](), itertools.count()
    for blocks in reversed(down):
        up.insert(0, tuple(depth(f"output_blocks.{next(output)}.") for _ in range(len(blocks) + 1)))
    middle = depth("middle_block.") if "middle_block.0.in_layers.2.weight" in shapes else None
    if not attentions:
        raise CheckpointError(f"{path}: {prefix}*: no cross-attention found in the UNet", BUILDS)
    width = _shape(path, shapes, attentions[-1] + "1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    parts, unit = (family.heads, "heads") if family.heads is not None else (family.head_width, "channels a head")
    for level in channels:
        if level % NORM_GROUPS or level % (parts or 1):
            raise CheckpointError(
                f"{path}: {prefix}*: {level} channels in a level, expected a multiple of {NORM_GROUPS} groups and"
                f" {parts} {unit}"
            )
    return UNetSpec(
        in_channels,
        _shape(path, shapes, "out.2.weight", 4)[0],
        tuple(channels),
        tuple(map(tuple, down)),
        tuple(up),
        middle,
        width,
        len(shapes.get(attentions[-1] + "1.proj_in.weight", ())) == 2,
        family.heads,
        family.head_width,
        _columns(path, shapes, "label_emb.0.0.weight"),
        _columns(path, shapes, "time_embed.cond_proj.weight"),
        family.upcast_attention,
    )


def _columns(path: Path, shapes: Shapes, name: str) -> int:
    """Columns of a matrix; 0 if the model has none of that name."""
    return _shape(path, shapes, name, 2)[1] if name in shapes else 0


def vae_spec(path: Path, shapes: Shapes, family: Family) -> VaeSpec:
    """Sizes of the VAE, from its decoder."""
    prefix = family.vae.prefix
    shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
    latent_channels = _shape(path, shapes, "decoder.conv_in.weight", 4)[1]
    levels = block_count(path, shapes, "decoder.up.{}.")
    channels = tuple(_shape(path, shapes, f"decoder.up.{i}.block.0.conv1.weight", 4)[0] for i in range(levels))
    res_blocks = block_count(path, shapes, "decoder.up.0.block.{}.") - 1
    if levels < 2 or res_blocks < 1 or any(c % NORM_GROUPS for c in channels):
        raise CheckpointError(
            f"{path}: {prefix}decoder: unexpected sizes: {levels} levels of {list(channels)} channels, {res_blocks + 1}"
            " blocks each"
        )
    return VaeSpec(channels, res_blocks, latent_channels, family.latent_scale)


def clip_spec(path: Path, shapes: Shapes, component: Component) -> ClipSpec:
    """Sizes of a text encoder."""
    text = component.text
    projection = _columns(path, {name: shape[::-1] for name, shape in shapes.items()}, component.prefix + PROJECTION)
    prefix = component.prefix + "text_model."
    shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
    vocabulary, width = _shape(path, shapes, "embeddings.token_embedding.weight", 2)
    tokens = _shape(path, shapes, "embeddings.position_embedding.weight", 2)[0]
    layers = min(block_count(path, shapes, "encoder.layers.{}."), text.used_layers or MAX_BLOCKS)
    mlp_width = _shape(path, shapes, "encoder.layers.0.mlp.fc1.weight", 2)[0]
    if width % text.head_width:
        raise CheckpointError(
            f"{path}: {prefix}*: text width {width}, expected a multiple of {text.head_width} channels a head"
        )
    return ClipSpec(
        width,
        layers,
        width // text.head_width,
        mlp_width,
        vocabulary,
        tokens,
        activation=text.activation,
        final_norm=text.final_norm,
        projection=projection if text.pooled else 0,
        pad=text.pad,
    )


def default_size(metadata: Mapping[str, str], size: tuple[int, int]) -> tuple[tuple[int, int], str]:
    """The picture size that a file's metadata names as (width, height), else `size`; and a remark where it names one
    that cannot be read.
    """
    text = metadata.get("modelspec.resolution")
    if text is None:
        return size, ""
    if match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, re.ASCII):
        stated = int(match[1]), int(match[2])
        if all(MIN_SIDE <= side <= MAX_SIDE and side % SIZE_STEP == 0 for side in stated):
            return stated, ""
    limits = f"WIDTHxHEIGHT in multiples of {SIZE_STEP} from {MIN_SIDE} to {MAX_SIDE}"
    return (
        size,
        f"modelspec.resolution: expected {limits}, found {text[:80]!r}; the default size is {size[0]}x{size[1]}",
    )
