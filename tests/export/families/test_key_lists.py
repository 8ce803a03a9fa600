"""Published checkpoints as headers without data: each opens as its family with every tensor in its place, or is refused
by name. Nothing of the weights is read.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import key_lists
import pytest
from tiny_model import Shapes, expected_shapes, header_only

from sdrt.errors import CheckpointError
from sdrt.export.architecture import Architecture
from sdrt.export.families.ldm import UNET
from sdrt.export.inspect import inspect_file
from sdrt.export.read.checkpoint import open_checkpoint, select


def opened(path: Path) -> tuple[Architecture, tuple[str, ...]]:
    """The architecture and the notes of a file whose every tensor sdrt's networks take, or need not take."""
    with closing(open_checkpoint(path)) as checkpoint:
        expected = expected_shapes(checkpoint.architecture)
        chosen, unknown = select(checkpoint, expected)
        assert not unknown and {name: tensor.shape for name, tensor in chosen.items()} == expected
        return checkpoint.architecture, checkpoint.notes


SD1_DOWN, SD1_UP = ((1, 1), (1, 1), (1, 1), (0, 0)), ((1,) * 3, (1,) * 3, (1,) * 3, (0,) * 3)
WHOLE: dict[str, tuple[Shapes, str, dict[str, Any]]] = {
    "SD 1.5": (key_lists.sd1(), "sd1", {"heads": 8, "down_depth": SD1_DOWN, "up_depth": SD1_UP, "middle": 1}),
    "SD 1.5 inpainting": (key_lists.sd1(9), "sd1", {"in_channels": 9}),
    "SD 1.5 edit": (key_lists.sd1(8), "sd1", {"in_channels": 8}),
    "SD 1.5 LCM": (key_lists.sd1(guidance=256), "sd1", {"guidance_width": 256}),
    "SD 2.x": (
        key_lists.sd2(),
        "sd2",
        {"heads": None, "head_width": 64, "linear_projections": True, "upcast_attention": True, "context_width": 1024},
    ),
    "SD 2.x inpainting": (key_lists.sd2(9), "sd2", {"in_channels": 9}),
    "SD-Turbo in sgm's layout": (key_lists.sd2(prefix="conditioner.embedders.0.model."), "sd2", {"middle": 1}),
    "SDXL": (
        key_lists.sdxl(),
        "sdxl",
        {"down_depth": ((0, 0), (2, 2), (10, 10)), "middle": 10, "vector_width": 2816, "head_width": 64},
    ),
    "SDXL inpainting": (key_lists.sdxl(9), "sdxl", {"in_channels": 9}),
    "SDXL edit": (key_lists.sdxl(8), "sdxl", {"in_channels": 8}),
    "SSD-1B": (
        key_lists.RELATIVES["SSD-1B"],
        "sdxl",
        {"down_depth": ((0, 0), (2, 2), (4, 4)), "up_depth": ((0, 0, 0), (2, 1, 1), (4, 4, 10)), "middle": 0},
    ),
    "Vega": (key_lists.RELATIVES["Vega"], "sdxl", {"up_depth": ((0, 0, 0), (1, 1, 1), (2, 2, 2)), "middle": 0}),
    "KOALA 1B": (key_lists.RELATIVES["KOALA 1B"], "sdxl", {"down_depth": ((0,), (2,), (6,)), "middle": 6}),
    "KOALA 700M": (key_lists.RELATIVES["KOALA 700M"], "sdxl", {"up_depth": ((0, 0), (2, 2), (5, 5)), "middle": None}),
    "BK-SDM small": (key_lists.RELATIVES["BK-SDM small"], "sd1", {"res_blocks": (1, 1, 1, 1), "middle": None}),
    "BK-SDM tiny": (key_lists.RELATIVES["BK-SDM tiny"], "sd1", {"channels": (320, 640, 1280), "middle": None}),
}
TEXTS = {
    "sd1": [(768, 12, 0, "quick_gelu", True, 49407)],
    "sd2": [(1024, 23, 0, "gelu", True, 0)],
    "sdxl": [(768, 12, 0, "quick_gelu", False, 49407), (1280, 32, 1280, "gelu", False, 0)],
}
"""Width, layers, projection, activation, final norm and padding of each family's text encoders."""


@pytest.mark.parametrize(("shapes", "family", "sizes"), WHOLE.values(), ids=WHOLE.keys())
def test_a_published_checkpoint(tmp_path: Path, shapes: Shapes, family: str, sizes: dict[str, Any]) -> None:
    path = header_only(tmp_path / "x.safetensors", key_lists.with_vae(shapes))
    arch, _ = opened(path)
    assert arch.family == family
    assert {key: getattr(arch.unet, key) for key in sizes} == sizes
    texts = [(t.width, t.layers, t.projection, t.activation, t.final_norm, t.pad) for t in arch.texts]
    assert texts == TEXTS[family]
    assert (arch.vae.scale, arch.last_layer, arch.vector.numbers) == (
        (0.13025, 2, 2816) if family == "sdxl" else (0.18215, 1, 0)
    )
    report = inspect_file(path)
    assert report["buildable"] is True and report["family"] == family and "other" not in report["components"]


def test_counts_of_published_checkpoints() -> None:
    """The rules above give the published number of tensors of each network."""
    assert len(key_lists.unet((320, 640, 1280, 1280), SD1_DOWN, SD1_UP, 1, 768, linear=False)) == 686
    assert len([name for name in key_lists.sdxl() if name.startswith(UNET)]) == 1680
    assert (len(key_lists.clip("", 12, 768)), len(key_lists.open_clip("", 24, 1024))) == (196, 294)


_UNET = {name: shape for name, shape in key_lists.sdxl().items() if name.startswith(UNET)}
_FIRST = key_lists.clip("conditioner.embedders.0.transformer.", 12, 768)
_SECOND = key_lists.open_clip("conditioner.embedders.1.model.", 32, 1280)
_TURBO = key_lists.sd2(prefix="conditioner.embedders.0.model.")
REFUSED: dict[str, tuple[Shapes, str]] = {
    "SDXL refiner": (key_lists.refiner(), "an SDXL refiner: not supported yet"),
    "SDXL refiner's UNet": (
        {name: shape for name, shape in key_lists.refiner().items() if name.startswith(UNET)},
        "an SDXL refiner: not supported yet",
    ),
    "unCLIP": (
        key_lists.sd2() | {"embedder.model.ln_final.weight": (1024,), UNET + "label_emb.0.0.weight": (1280, 2048)},
        "an unCLIP model: not supported yet",
    ),
    "depth": (key_lists.sd2(5), "an SD2 depth model: not supported yet"),
    "x4 upscaler": (key_lists.sd2(7), "an x4 upscaler: not supported yet"),
    "Stable Video Diffusion": (
        _TURBO | {UNET + "input_blocks.1.1.time_stack.0.attn1.to_q.weight": (320, 320)},
        "a Stable Video Diffusion model: not supported yet",
    ),
    "AnimateDiff": (
        {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,)},
        "a motion module of AnimateDiff: not supported yet",
    ),
    "Stable Cascade": ({UNET + "clf.1.weight": (64, 1536, 1, 1)}, "a Stable Cascade model: not supported yet"),
    "PixArt": ({"adaln_single.linear.weight": (6912, 1152)}, "a PixArt model: not supported yet"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "a Flux model: not supported yet"),
    "SD3": ({UNET + "joint_blocks.0.context_block.attn.qkv.weight": (4608, 1536)}, "an SD3 model: not supported yet"),
    "SDXL UNet alone": (_UNET, "found an SDXL UNet without its text encoders"),
    "SDXL UNet, bare": (
        {name.removeprefix(UNET): shape for name, shape in _UNET.items()},
        "found an SDXL UNet without its text encoders",
    ),
    "SDXL without its first encoder": (_UNET | _SECOND, "found an SDXL model without its first text encoder"),
    "SDXL without its second encoder": (_UNET | _FIRST, "found an SDXL model without its second text encoder"),
    "SD 2.x UNet alone": (
        {name: shape for name, shape in key_lists.sd2().items() if name.startswith(UNET)},
        "found a Stable Diffusion 2.x UNet without its text encoder",
    ),
}


@pytest.mark.parametrize(("shapes", "what"), REFUSED.values(), ids=REFUSED.keys())
def test_c16_another_kind_of_model_is_refused_by_name(tmp_path: Path, shapes: Shapes, what: str) -> None:
    path = header_only(tmp_path / "x.safetensors", shapes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert what in caught.value.message and caught.value.message.startswith(f"{path}: ")
    assert caught.value.fix and caught.value.exit_code == 3
    assert inspect_file(path)["buildable"] is False
