"""A picture to start from and what to repaint of it. `ours` is each file's own pipeline."""

from __future__ import annotations

import pytest
from PIL import Image, ImageDraw

from sdrt.runtime import Pipeline


@pytest.fixture(scope="module")
def init(ours: Pipeline) -> Image.Image:
    """A picture of the model's own world."""
    return Image.fromarray(ours("cat face", cfg=3, steps=12, seed=5).images[0])


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((0, 24, 64, 64), fill=255)
    return mask
