"""Every family: those that are built, and words for the others. To add a family, add its value to `FAMILIES`."""

from __future__ import annotations

from sdrt.export.families.family import Component, Family
from sdrt.export.families.ldm import UNET_COMPONENT
from sdrt.export.families.others import OTHERS
from sdrt.export.families.sd1 import SD1
from sdrt.export.families.sd2 import SD2
from sdrt.export.families.sdxl import SDXL

FAMILIES: tuple[Family, ...] = (SD1, SD2, SDXL)
BUILDS = f"This version of sdrt builds {', '.join(family.builds for family in FAMILIES)}."
COMPONENTS: tuple[Component, ...] = tuple(
    {component.prefix: component for family in reversed(FAMILIES) for component in family.components[::-1]}.values()
)[::-1]
"""One for each prefix of canonical names. Families share the prefixes, so this is the first family's component."""
CONTEXTS = {family.context_width: family.title for family in FAMILIES}
"""Whose text contexts are that wide."""
TOKENS = {width: words for family in FAMILIES for width, words in family.tokens.items()}
"""Whose token vectors are that wide."""
TEXTS = {
    width: tuple(family.title for family in FAMILIES if width in family.text_widths)
    for family in FAMILIES
    for width in family.text_widths
}
"""Whose text encoders are that wide."""
_OWN = [(family.title, family.adapters) for family in FAMILIES] + [(other.title, other.adapters) for other in OTHERS]
ADAPTERS = {start: tuple(title for title, starts in _OWN if start in starts) for _, starts in _OWN for start in starts}
"""How modules begin that show a LoRA of some families, to these families' titles."""
TEXT_MODULES = dict.fromkeys(
    ("lora_te", "text_encoder", "lycoris_text", "lycoris_encoder_layers", "text_model.", "encoder.layers."),
    SD1.text_encoder.name,
) | {
    prefix: component.name
    for family in FAMILIES
    for component in family.text_encoders
    for prefix in (*component.adapters_flat, *component.adapters_dotted)
    if prefix not in ("", *UNET_COMPONENT.adapters_flat)
}
"""How the modules of text encoders begin in any family's LoRAs, to the component's name. The longest that fits counts.
"""
_VECTORS = [(component.vectors, family.title) for family in FAMILIES for component in family.text_encoders]
VECTORS = ("emb_params", *dict(_VECTORS))
"""What tools call an embedding's vectors."""
EMBEDDINGS = {name: title for name, title in _VECTORS if [known for known, _ in _VECTORS].count(name) == 1}
"""Tensors that only one family's embeddings hold."""


def family_named(name: str) -> Family:
    """The family of that name in manifests and architectures. KeyError if there is none."""
    return {family.name: family for family in FAMILIES}[name]


def family_of(kind: str) -> Family | None:
    """The family whose whole checkpoints are called that; None for any other kind of file."""
    return next((family for family in FAMILIES if kind in family.kinds.values()), None)


def component_name(name: str) -> str:
    """The component that a tensor of that canonical name belongs to, as reports name it: "other" for one of none."""
    component = component_of(name)
    return component.name if component is not None else "other"


def component_of(name: str) -> Component | None:
    """The component that a tensor of that canonical name belongs to; None if it belongs to none."""
    return next((component for component in COMPONENTS if name.startswith(component.prefix)), None)
