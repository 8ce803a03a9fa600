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
        assert all(family_of(kind) is family for kind in family.kinds.values())
        assert (family.heads is None) != (family.head_width is None)
        for component in family.components:
            known = component_of(component.prefix + "a.weight")
            assert component.prefix == component.prefixes[0] and known is not None
            assert (known.name, known.network) == (component.name, component.network)
            assert component_name(component.prefix + "a.weight") == component.name
        # Canonical names alone do not tell families apart: the width of contexts does.
        key = family.unet.prefix + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
        whole = {component.prefix + "a.weight": (1,) for component in family.components} | {
            key: (640, family.context_width)
        }
        for channels, kind in family.kinds.items():
            assert describe(whole | {family.unet.prefix + "input_blocks.0.0.weight": (320, channels, 3, 3)}) == kind
    assert component_of("other.weight") is None and component_name("control_model.a.weight") == "other"


def test_what_tells_families_apart() -> None:
    """No word of one family is another's, so that no file is taken for two."""
    prefixes = [component.prefix for component in COMPONENTS]
    assert not [(a, b) for a in prefixes for b in prefixes if a != b and a.startswith(b)]
    assert len(CONTEXTS) == len(FAMILIES) and len(TOKENS) == sum(len(family.tokens) for family in FAMILIES)
    built = {start for family in FAMILIES for start in family.adapters}
    assert not built.intersection(start for other in OTHERS for start in other.adapters) and built < ADAPTERS.keys()
    kinds = [kind for family in FAMILIES for kind in (*family.kinds.values(), family.alone)]
    assert len(set(kinds)) == len(kinds)
    assert not [kind for other in OTHERS for sign in other.signs for kind in [family_of(sign.kind)] if kind is not None]


def test_signs() -> None:
    assert Sign("x", ("a.", "b."))({"b.c": (1,)}) and not Sign("x", ("a.",))({"ba.": (1,)})
    assert Sign("x", holds="a")({"a": (2,)}) and Sign("x", holds="a", shape=(2,))({"a": (2,)})
    assert not Sign("x", holds="a", shape=(3,))({"a": (2,)}) and not Sign("x", holds="a")({"ab": (2,)})
    assert Sign("x", holds="a", columns=3)({"a": (2, 3)}) and not Sign("x", holds="a", columns=2)({"a": (2, 3)})
    assert Sign("x", within=".b.")({"a.b.c": (1,)}) and not Sign("x", ("b.",), within=".b.")({"a.b.c": (1,)})
    assert Sign("x", ("a.",), beside="b.")({"a.c": (1,), "b.c": (1,)}) and not Sign("x", ("a.",), beside="b.")(
        {"a.": ()}
    )
