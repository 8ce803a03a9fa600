"""A tiny Stable Diffusion 1.x, seeded: its architecture, its tensors, and headers of any architecture without data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sdrt.export.architecture import Architecture, ClipSpec, UNetSpec, VaeSpec
from sdrt.export.graph import recipes
from sdrt.export.skeletons import weights_of

Shapes = dict[str, tuple[int, ...]]


def levels(res_blocks: Sequence[int], depth: Sequence[int]) -> dict[str, Any]:
    """The depths of a UNet whose blocks of a level are all alike: residual blocks and transformer depth of each level,
    finest first.
    """
    pairs = list(zip(depth, res_blocks, strict=True))
    return {
        "down_depth": tuple((depth,) * blocks for depth, blocks in pairs),
        "up_depth": tuple((depth,) * (blocks + 1) for depth, blocks in pairs),
    }


def regular_unet(
    channels: tuple[int, ...],
    res_blocks: Sequence[int],
    depth: Sequence[int],
    middle: int,
    context_width: int,
    *,
    linear: bool,
) -> UNetSpec:
    """Sizes of a UNet as Stable Diffusion 1.x has it: 4 channels, 8 heads."""
    depths = levels(res_blocks, depth)
    return UNetSpec(4, 4, channels, *depths.values(), middle, context_width, linear, 8, None)


TINY = Architecture(
    "sd1",
    "epsilon",
    (512, 512),
    (ClipSpec(64, 1, 1, 96, 50, 77),),
    regular_unet((32, 64), (1, 1), (1, 0), 1, 64, linear=True),
    VaeSpec((32, 64), 1, 4, 0.18215),
)

SMALL = Architecture(
    "sd1",
    "epsilon",
    (64, 64),
    (ClipSpec(64, 1, 1, 256, 49408, 77),),
    regular_unet((32, 64), (1, 1), (1, 0), 1, 64, linear=False),
    VaeSpec((32, 32, 32, 32), 1, 4, 0.18215),
)
"""With CLIP's whole vocabulary and a latent for every 8 pixels, so that it can be built: in half a second once it is
traced.
"""


def whole(arch: Architecture) -> Architecture:
    """The same model with every layer that its files hold, also those that no output of `arch` needs: later layers of a
    text encoder than its contexts come from, and the norm after them.
    """
    return replace(arch, texts=tuple(replace(text, clip_skip=(1,), final_norm=True) for text in arch.texts))


@cache
def expected_shapes(arch: Architecture) -> Shapes:
    return {name: shape for recipe in recipes(arch).values() for name, shape in weights_of(recipe).items()}


@cache
def seeded(arch: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, normal at a small scale, float32."""
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) * 0.05 for name, shape in sorted(expected_shapes(arch).items())}


@cache
def lively(arch: Architecture) -> dict[str, torch.Tensor]:
    """Seeded tensors that keep the size of what goes through them, so that prompt, guidance, steps and sampler all show
    in the picture's pixels.
    """
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in sorted(expected_shapes(arch).items()):
        noise = torch.randn(shape, generator=random)
        if "embedding" in name:
            tensors[name] = 0.3 * noise
        elif len(shape) > 1:
            tensors[name] = noise / math.sqrt(math.prod(shape[1:]))
        else:
            tensors[name] = 0.1 * noise + (1 if name.endswith("weight") else 0)
    return tensors


def header_only(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16", metadata: Mapping[str, str] | None = None
) -> Path:
    """A safetensors file of these shapes whose data is a hole in the file system."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * {"F16": 2, "F32": 4, "I64": 8, "F8_E4M3": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + offset)
    return path
