"""Every spelling of a checkpoint's tensor names, and the canonical one: LDM names for UNet and VAE, Hugging Face's CLIP
names for the text encoder.

Three things differ between tools: the prefix of a component (the family says which), the names below it (LDM's or
diffusers'), and a few leaves (the VAE's attention has three spellings). Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdrt.export.architecture import block_count
from sdrt.export.families.family import Component, Shapes
from sdrt.export.families.keys import OPEN_CLIP, OPEN_CLIP_LAYER, OUTER, RESNET, diffusers_prefixes
from sdrt.export.families.recognise import ADAPTERS
from sdrt.export.families.table import COMPONENTS, component_of, family_of

EMA = "model_ema."
MIN_EMA_KEYS = 100
"""A checkpoint has EMA weights if more than this many names start with `model_ema.`; pruned files keep a few counters
of theirs.
"""

_VAE_ATTENTION = {
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "group_norm": "norm",
}
_NUMBER = r"([0-9]{1,4})"


@dataclass(frozen=True)
class _Levels:
    down_depth: tuple[tuple[int, ...], ...]
    up_depth: tuple[tuple[int, ...], ...]


def components_of(kind: str) -> Sequence[Component]:
    """The components of a file of that kind, as `describe` calls it: those of its family, or of any."""
    family = family_of(kind)
    return COMPONENTS if family is None else family.components


def canonical_names(path: Path, shapes: Shapes, kind: str) -> dict[str, str]:
    """Each name of a file to its canonical name; names of no known component stay as they are, and so do those of
    adapters. `kind` is what `describe` calls the file.

    Raises:
        CheckpointError: a forged number of blocks.
    """
    names = {name: name for name in shapes}
    if kind in ADAPTERS:
        return names
    for component in components_of(kind):
        below = component.below(shapes)
        spelled = _SPELLED[component.network](path, {rest: shapes[name] for name, rest in below.items()})
        names |= {name: component.prefix + spelled[rest] for name, rest in below.items()}
    return names


def ema_name(name: str) -> str:
    """The name of a UNet weight's exponential moving average: `model.diffusion_model.a.b` is
    `model_ema.diffusion_modelab` (LitEma in CompVis' LDM).
    """
    return EMA + name.partition(".")[2].replace(".", "")


def has_ema(names: Iterable[str]) -> bool:
    """Whether a file holds averaged weights, as against a few of their counters."""
    return sum(name.startswith(EMA) for name in names) > MIN_EMA_KEYS


def is_vae_attention(name: str) -> bool:
    """Whether a canonical name is a weight that some tools store as a matrix and LDM as a 1x1 convolution."""
    component = component_of(name)
    return (
        component is not None
        and component.network == "vae"
        and re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", name) is not None
    )


def _ldm_unet(path: Path, shapes: Shapes) -> dict[str, str]:
    names = {name: name for name in shapes}
    if "conv_in.weight" not in shapes:
        return names

    def depths(block: str) -> tuple[int, ...]:
        blocks = range(block_count(path, shapes, f"{block}.resnets.{{}}."))
        return tuple(block_count(path, shapes, f"{block}.attentions.{i}.transformer_blocks.{{}}.") for i in blocks)

    levels = range(block_count(path, shapes, "down_blocks.{}."))
    down = tuple(depths(f"down_blocks.{level}") for level in levels)
    table = diffusers_prefixes(_Levels(down, tuple(depths(f"up_blocks.{level}") for level in reversed(levels))))
    modules = {diffusers + ".": ldm + "." for ldm, diffusers in OUTER.items()}
    for ldm, diffusers in table.items():
        modules[diffusers] = ldm
        if ".resnets." in diffusers:
            modules |= {f"{diffusers}{theirs}.": f"{ldm}{ours}." for ours, theirs in RESNET.items()}
    for name in shapes:
        # The longest prefix that is in the table: `down_blocks.0.resnets.0.norm1.` before `down_blocks.0.resnets.0.`.
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if (prefix := ".".join(parts[:end]) + ".") in modules:
                names[name] = modules[prefix] + name[len(prefix) :]
                break
    return names


def _ldm_vae(path: Path, shapes: Shapes) -> dict[str, str]:
    levels = block_count(path, shapes, "decoder.up_blocks.{}.")

    def ldm(name: str) -> str:
        name = re.sub(rf"^encoder\.down_blocks\.{_NUMBER}\.resnets\.", r"encoder.down.\1.block.", name)
        name = re.sub(rf"^encoder\.down_blocks\.{_NUMBER}\.downsamplers\.0\.", r"encoder.down.\1.downsample.", name)
        if match := re.match(rf"decoder\.up_blocks\.{_NUMBER}\.(resnets|upsamplers\.0)\.", name):
            part = "block" if match[2] == "resnets" else "upsample"
            name = f"decoder.up.{levels - 1 - int(match[1])}.{part}.{name[match.end() :]}"
        if match := re.match(rf"(encoder|decoder)\.mid_block\.resnets\.{_NUMBER}\.", name):
            name = f"{match[1]}.mid.block_{int(match[2]) + 1}.{name[match.end() :]}"
        name = re.sub(r"^(encoder|decoder)\.mid_block\.attentions\.0\.", r"\1.mid.attn_1.", name)
        name = re.sub(r"^(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out.", name)
        if match := re.fullmatch(r"((?:encoder|decoder)\.mid\.attn_1\.)(.+)\.(weight|bias)", name):
            name = f"{match[1]}{_VAE_ATTENTION.get(match[2], match[2])}.{match[3]}"
        return name.replace(".conv_shortcut.", ".nin_shortcut.")

    return {name: ldm(name) for name in shapes}


_OPEN_CLIP = (
    (rf"^(?:transformer\.)?resblocks\.{_NUMBER}\.", r"text_model.encoder.layers.\1."),
    *((rf"^{theirs}\.", f"{ours}.") for ours, theirs in OPEN_CLIP.items()),
    *((rf"\.{re.escape(theirs)}\.", f".{ours}.") for ours, theirs in OPEN_CLIP_LAYER.items()),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^text_projection\.weight\.weight$", "text_projection.weight"),  # in Playground 2
)


def _text_model(path: Path, shapes: Shapes) -> dict[str, str]:
    """OpenCLIP's names to transformers'. Files of 2022, and what transformers 5 saves, lack `text_model.`."""
    old = ("embeddings.", "encoder.", "final_layer_norm.")

    def transformers(name: str) -> str:
        for pattern, new in _OPEN_CLIP:
            name = re.sub(pattern, new, name)
        return "text_model." + name if name.startswith(old) else name

    return {name: transformers(name) for name in shapes}


_SPELLED = {"unet": _ldm_unet, "vae": _ldm_vae, "clip": _text_model}
"""How each network's names below its prefix are made canonical."""
