"""What a file is, told by the names and shapes of its tensors: a checkpoint of some family, a part of one, or an
adapter. Imports no torch.
"""

from __future__ import annotations

import re

from sdrt.export.adapters.spelling import is_adapter
from sdrt.export.families.family import Family, Shapes, Sign
from sdrt.export.families.ldm import UNET_COMPONENT, VAE_COMPONENT
from sdrt.export.families.others import CHANNELS, OTHERS
from sdrt.export.families.table import COMPONENTS, FAMILIES, VECTORS

LORA, VAE, EMBEDDING, HYPERNETWORK = "a LoRA", "a VAE", "a textual-inversion embedding", "a hypernetwork"
ADAPTERS = (LORA, HYPERNETWORK, EMBEDDING)
"""Kinds whose names are not those of a checkpoint."""
OPTION_OF_KIND = {LORA: "--lora", VAE: "--vae", EMBEDDING: "--embedding", HYPERNETWORK: "--hypernetwork"}
"""How `sdrt build` takes what `describe` calls by these names."""
WITHOUT = " without its "
"""In the kinds of files that lack a text encoder."""
HYPERNETWORK_KEY = re.compile(r"(\d{1,6})\.([01])\.(linear\d?\..+)")
"""Width, 0 for keys or 1 for values, and the layer's own name."""
_MAX_TOKENS, _NARROWEST = 16, 64
"""Embeddings that one file may hold before it is another kind of file, and their least width: text encoders are
multiples of 64 wide.
"""
_CONTROL = (
    Sign("a ControlNet", ("controlnet_cond_embedding.", "controlnet_mid_block.", "input_hint_block.")),
    Sign("a T2I-Adapter", ("adapter.body.", "body.0.")),
)


def describe(names: Shapes, activation: str = "") -> str:
    """What a set of tensor names is, in words: a family sdrt builds, one it does not build, or another kind of file.

    The names are those of the file, before they are made canonical: some families only differ there. `activation` is
    what a diffusers folder says of its text encoder, "" for a file.
    """
    return (
        _adapter(names)
        or next((sign.kind for other in OTHERS for sign in other.signs if sign(names)), "")
        or _control(names)
        or _checkpoint(names, activation)
        or "tensors of no kind that sdrt knows"
    )


def _adapter(names: Shapes) -> str:
    if not names:
        return "an empty file"
    if "lora_controlnet" in names:
        return "a Control-LoRA"
    if _has(names, "ip_adapter.", "image_proj."):
        return "an IP-Adapter"
    if _has(names, "lora_unet_", "lora_te", "lycoris_") or is_adapter(names):
        return LORA
    if any(HYPERNETWORK_KEY.fullmatch(name) for name in names):
        return HYPERNETWORK
    return EMBEDDING if _are_embeddings(names) else ""


def _are_embeddings(names: Shapes) -> bool:
    """AUTOMATIC1111's and SDXL's names, or a few tensors of vectors under names that are no layer's: tokens, as
    diffusers saves them.
    """
    if any(name.startswith("string_to_param.") for name in names) or names.keys() <= set(VECTORS):
        return True
    return len(names) <= _MAX_TOKENS and all(
        len(s) in (1, 2) and s[-1] >= _NARROWEST and not n.endswith((".weight", ".bias")) for n, s in names.items()
    )


def _control(names: Shapes) -> str:
    if sign := next((sign for sign in _CONTROL if sign(names)), None):
        return sign.kind
    if _has(names, "control_model.") and not any(_has(names, component.prefix) for component in COMPONENTS):
        return "a ControlNet"
    if any(".motion_modules." in name for name in names):
        return "a motion module of AnimateDiff"
    return ""


def _checkpoint(names: Shapes, activation: str) -> str:
    """A whole checkpoint of a family that is built, or a part of one."""
    unet = {rest: names[name] for name, rest in UNET_COMPONENT.below(names).items()}
    if not unet:
        if VAE_COMPONENT.below(names) or _has(names, "decoder.up.", "encoder.down."):
            return VAE
        clip = any(component.below(names) for component in COMPONENTS if component.network == "clip")
        return "a CLIP text encoder" if clip else ""
    family = _family(names, unet, activation)
    conv_in = unet.get("input_blocks.0.0.weight", unet.get("conv_in.weight", ()))
    channels = conv_in[1] if len(conv_in) == 4 else 4
    if channels not in family.kinds:
        return CHANNELS.get(channels, f"a UNet of {channels} input channels")
    lacking = [component for component in family.text_encoders if not component.below(names)]
    if len(lacking) == len(family.text_encoders):
        return family.alone
    return family.kinds[channels] + (WITHOUT + lacking[0].title if lacking else "")


def _family(names: Shapes, unet: Shapes, activation: str) -> Family:
    """The family of a UNet, in a file of these names: by its signs, by the activation of its text encoder, by the width
    of its contexts; the first of all where nothing tells.
    """
    signed = next((family for family in FAMILIES if any(sign(names) for sign in family.signs)), None)
    if signed is not None:
        return signed
    for family in FAMILIES:
        if [component.text.activation for component in family.text_encoders] == [activation]:
            return family
    widths = (shape[-1] for name, shape in unet.items() if name.endswith("attn2.to_k.weight") and shape)
    width = next(widths, 0)
    return next((family for family in FAMILIES if family.context_width == width), FAMILIES[0])


def _has(names: Shapes, *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in names)
