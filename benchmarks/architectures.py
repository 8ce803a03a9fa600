"""The sizes of published models, and of this project's own small ones. The traces that come with sdrt are theirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sdrt.export.architecture import Architecture, ClipSpec, UNetSpec, VaeSpec
from sdrt.export.graph import Recipe, recipes
from sdrt.export.read.checkpoint import open_checkpoint

DOWN, UP = ((1, 1), (1, 1), (1, 1), (0, 0)), ((1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0))
SD15 = Architecture(
    "sd1",
    "epsilon",
    (512, 512),
    (ClipSpec(width=768, layers=12, heads=12, mlp_width=3072, vocabulary=49408, tokens=77),),
    UNetSpec(4, 4, (320, 640, 1280, 1280), DOWN, UP, 1, 768, False, 8, None),
    VaeSpec((128, 256, 512, 512), 2, 4, 0.18215),
)
TINY = Architecture(
    "sd1",
    "epsilon",
    (64, 64),
    (ClipSpec(width=64, layers=2, heads=1, mlp_width=256, vocabulary=49408, tokens=77),),
    UNetSpec(4, 4, (64, 96, 128, 128), DOWN, UP, 1, 64, False, 8, None),
    VaeSpec((32, 32, 64, 64), 2, 4, 0.18215),
)
SD2 = Architecture(
    "sd2",
    "v",
    (768, 768),
    (ClipSpec(1024, 23, 16, 4096, 49408, 77, activation="gelu", pad=0),),
    UNetSpec(4, 4, (320, 640, 1280, 1280), DOWN, UP, 1, 1024, True, None, 64, upcast_attention=True),
    VaeSpec((128, 256, 512, 512), 2, 4, 0.18215),
)
SDXL = Architecture(
    "sdxl",
    "epsilon",
    (1024, 1024),
    (
        ClipSpec(768, 12, 12, 3072, 49408, 77, (2,), final_norm=False),
        ClipSpec(1280, 32, 20, 5120, 49408, 77, (2,), activation="gelu", final_norm=False, projection=1280, pad=0),
    ),
    UNetSpec(
        *(4, 4, (320, 640, 1280), ((0, 0), (2, 2), (10, 10)), ((0, 0, 0), (2, 2, 2), (10, 10, 10)), 10, 2048, True),
        *(None, 64),
        vector_width=2816,
    ),
    VaeSpec((128, 256, 512, 512), 2, 4, 0.13025),
    last_layer=2,
    sizes=6,
    size_width=256,
)
ARCHITECTURES = {"sd15": SD15, "sd2": SD2, "sdxl": SDXL, "tiny": TINY}

_XL = (320, 640, 1280)
_SD1_UNETS = {
    "sd1-inpaint": replace(SD15.unet, in_channels=9),
    "sd1-edit": replace(SD15.unet, in_channels=8),
    "sd1-lcm": replace(SD15.unet, guidance_width=256),
    "sd1-folded-hypernetwork": replace(SD15.unet, biased=(320, 640, 768, 1280)),
    "bk-sdm-small": replace(
        SD15.unet,
        down_depth=((1,), (1,), (1,), (0,)),
        up_depth=((1, 1), (1, 1), (1, 1), (0, 0)),
        middle=None,
    ),
    "bk-sdm-tiny": replace(SD15.unet, channels=_XL, down_depth=((1,),) * 3, up_depth=((1, 1),) * 3, middle=None),
}
_SDXL_UNETS = {
    "sdxl-inpaint": replace(SDXL.unet, in_channels=9),
    "sdxl-edit": replace(SDXL.unet, in_channels=8),
    "sdxl-lcm": replace(SDXL.unet, guidance_width=256),
    "ssd-1b": replace(
        SDXL.unet, down_depth=((0, 0), (2, 2), (4, 4)), up_depth=((0, 0, 0), (2, 1, 1), (4, 4, 10)), middle=0
    ),
    "vega": replace(
        SDXL.unet, down_depth=((0, 0), (1, 1), (2, 2)), up_depth=((0, 0, 0), (1, 1, 1), (2, 2, 2)), middle=0
    ),
    "koala-1b": replace(SDXL.unet, down_depth=((0,), (2,), (6,)), up_depth=((0, 0), (2, 2), (6, 6)), middle=6),
    "koala-700m": replace(SDXL.unet, down_depth=((0,), (2,), (5,)), up_depth=((0, 0), (2, 2), (5, 5)), middle=None),
}
_CLIP_SKIPS = ((2,), (1, 2), (2, 1))


def published() -> Iterator[tuple[str, Architecture]]:
    """Every model whose traces come with sdrt, by name."""
    yield from {"sd1": SD15, "sd2": SD2, "sdxl": SDXL}.items()
    emoji = Path(__file__).parents[1] / "examples" / "emoji"
    for name in ("emoji", "emoji-xl"):
        checkpoint = open_checkpoint(emoji / f"{name}.safetensors")
        checkpoint.close()
        arch = checkpoint.architecture
        yield name, replace(arch, texts=tuple(replace(text, clip_skip=(arch.last_layer,)) for text in arch.texts))
        if arch.last_layer == 1:
            yield from _skipping(name, arch)
    yield from _skipping("sd1", SD15)
    yield from ((name, replace(SD15, unet=unet)) for name, unet in _SD1_UNETS.items())
    yield "sd2-inpaint", replace(SD2, unet=replace(SD2.unet, in_channels=9))
    yield from ((name, replace(SDXL, unet=unet)) for name, unet in _SDXL_UNETS.items())


def _skipping(name: str, arch: Architecture) -> Iterator[tuple[str, Architecture]]:
    for skip in _CLIP_SKIPS:
        texts = tuple(replace(text, clip_skip=skip) for text in arch.texts)
        yield f"{name}-skip-{'-'.join(map(str, skip))}", replace(arch, texts=texts)


def traced() -> Iterator[tuple[str, Recipe]]:
    """Every different trace of these models, under the name of the first that has it."""
    known = list[object]()
    for name, arch in published():
        for graph, recipe in recipes(arch).items():
            if recipe.key() not in known:
                known.append(recipe.key())
                yield f"{name}-{graph.replace('_', '-')}", recipe
