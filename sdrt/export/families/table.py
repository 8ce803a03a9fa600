"""Every family: those that are built, and words for the others. To add a family, add its value to `FAMILIES`."""

from __future__ import annotations

from sdrt.export.families.family import Component, Family
from sdrt.export.families.others import OTHERS
from sdrt.export.families.sd1 import SD1

FAMILIES: tuple[Family, ...] = (SD1,)
BUILDS = f"This version of sdrt builds {', '.join(family.builds for family in FAMILIES)}."
COMPONENTS: tuple[Component, ...] = tuple(component for family in FAMILIES for component in family.components)
CONTEXTS = {family.context_width: family.title for family in FAMILIES} | {
    width: other.title for other in OTHERS for width in other.contexts
}
"""Whose text contexts are that wide."""
TOKENS = {family.token_width: family.title for family in FAMILIES} | {
    width: words for other in OTHERS for width, words in other.tokens.items()
}
"""Whose token vectors are that wide."""
TEXTS = {family.token_width: family.title for family in FAMILIES} | {
    width: other.title for other in OTHERS for width in other.tokens
}
"""Whose text encoders are that wide."""
ADAPTERS = {start: other.title for other in OTHERS for start in other.adapters}
"""How the modules of other families' LoRAs begin."""
TEXT_MODULES = (
    "lora_te",
    "lycoris_te",
    "lycoris_text",
    "lycoris_encoder_layers",
    "text_encoder",
    "text_model.",
    "encoder.layers.",
    "cond_stage_model.",
    "conditioner.",
)
"""How the modules of text encoders begin in any family's LoRAs."""
EMBEDDINGS = {name: other.title for other in OTHERS for name in other.embeddings}
"""Tensors that only other families' embeddings hold."""


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
