"""What a file is, told by the names and shapes of its tensors: a checkpoint of some family, a part of one, or an
adapter. Imports no torch.
"""

from __future__ import annotations

import re

from sdrt.export.adapters.spelling import is_adapter
from sdrt.export.families.family import Shapes, Sign
from sdrt.export.families.others import OTHERS
from sdrt.export.families.table import COMPONENTS, FAMILIES

LORA, VAE, EMBEDDING, HYPERNETWORK = "a LoRA", "a VAE", "a textual-inversion embedding", "a hypernetwork"
ADAPTERS = (LORA, HYPERNETWORK, EMBEDDING)
"""Kinds whose names are not those of a checkpoint."""
OPTION_OF_KIND = {LORA: "--lora", VAE: "--vae", EMBEDDING: "--embedding", HYPERNETWORK: "--hypernetwork"}
"""How `sdrt build` takes what `describe` calls by these names."""
UNET_ALONE = "a Stable Diffusion UNet without its text encoder"
HYPERNETWORK_KEY = re.compile(r"(\d{1,6})\.([01])\.(linear\d?\..+)")
"""Width, 0 for keys or 1 for values, and the layer's own name."""
_MAX_TOKENS, _NARROWEST = 16, 64
"""Embeddings that one file may hold before it is another kind of file, and their least width: text encoders are
multiples of 64 wide.
"""
_CHANNELS = {7: "an x4 upscaler", 8: "an instruct-pix2pix model"}
"""What a UNet of so many input channels is, in any family."""

_CONTROL = (
    Sign("a ControlNet", ("controlnet_cond_embedding.", "controlnet_mid_block.", "input_hint_block.")),
    Sign("a T2I-Adapter", ("adapter.body.", "body.0.")),
)


def describe(names: Shapes) -> str:
    """What a set of tensor names is, in words: a family sdrt builds, one it does not build yet, or another kind of
    file.
    """
    return (
        _adapter(names)
        or next((sign.kind for other in OTHERS for sign in other.signs if sign(names)), "")
        or _control(names)
        or _checkpoint(names)
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
    if any(name.startswith("string_to_param.") for name in names) or names.keys() <= {"emb_params", "clip_l", "clip_g"}:
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
    return "a UNet in diffusers naming" if _has(names, "down_blocks.", "unet.down_blocks.") else ""


def _checkpoint(names: Shapes) -> str:
    """A whole checkpoint of a family that is built, or one network of it."""
    for family in FAMILIES:
        unet = family.unet.prefix
        if not _has(names, unet):
            continue
        conv_in = names.get(unet + "input_blocks.0.0.weight", ())
        channels = conv_in[1] if len(conv_in) == 4 else 4
        if channels not in family.kinds:
            return _CHANNELS.get(channels, f"a UNet of {channels} input channels")
        if _has(names, family.text_encoder.prefix):
            return family.kinds[channels]
        width = next(
            (s[-1] for n, s in names.items() if n.startswith(unet) and n.endswith("attn2.to_k.weight") and s), 0
        )
        return next((other.contexts[width] for other in OTHERS if width in other.contexts), UNET_ALONE)
    for component in COMPONENTS:
        if component.network == "vae" and _has(names, component.prefix, "decoder.up.", "encoder.down."):
            return VAE
        if component.network == "clip" and _has(names, component.prefix, "text_model."):
            return "a CLIP text encoder"
    return ""


def _has(names: Shapes, *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in names)
