"""The table of families: what must hold for every family that is added to it."""

from __future__ import annotations

from sdrt.export.families.family import Sign
from sdrt.export.families.others import OTHERS
from sdrt.export.families.recognise import describe
from sdrt.export.families.table import (
    ADAPTERS,
    COMPONENTS,
    CONTEXTS,
    FAMILIES,
    TOKENS,
    component_name,
    component_of,
    family_named,
    family_of,
)


def test_what_every_family_says() -> None:
    for family in FAMILIES:
        assert family_named(family.name) is family and {component.network for component in family.components} == {
            "unet",
            "vae",
            "clip",
        }
        assert all(family_of(kind) is family for kind in family.kinds.values()) and family.token_table.startswith(
            family.text_encoder.prefix
        )
        for component in family.components:
            assert (
                component.prefix == component.prefixes[0] and component_of(component.prefix + "a.weight") is component
            )
            assert component_name(component.prefix + "a.weight") == component.name
        whole = {component.prefix + "a.weight": (1,) for component in family.components}
        for channels, kind in family.kinds.items():
            assert describe(whole | {family.unet.prefix + "input_blocks.0.0.weight": (320, channels, 3, 3)}) == kind
    assert component_of("other.weight") is None and component_name("control_model.a.weight") == "other"


def test_what_tells_families_apart() -> None:
    """No word of one family is another's, so that no file is taken for two."""
    prefixes = [component.prefix for component in COMPONENTS]
    assert not [(a, b) for a in prefixes for b in prefixes if a != b and a.startswith(b)]
    assert len(CONTEXTS) == len(FAMILIES) + sum(len(other.contexts) for other in OTHERS)
    assert len(TOKENS) == len(FAMILIES) + sum(len(other.tokens) for other in OTHERS)
    assert len(ADAPTERS) == sum(len(other.adapters) for other in OTHERS)
    assert not [kind for other in OTHERS for sign in other.signs for kind in [family_of(sign.kind)] if kind is not None]


def test_signs() -> None:
    assert Sign("x", ("a.", "b."))({"b.c": (1,)}) and not Sign("x", ("a.",))({"ba.": (1,)})
    assert Sign("x", holds="a")({"a": (2,)}) and Sign("x", holds="a", shape=(2,))({"a": (2,)})
    assert not Sign("x", holds="a", shape=(3,))({"a": (2,)}) and not Sign("x", holds="a")({"ab": (2,)})
