"""Names of tensors without their component's prefix."""

from __future__ import annotations

from dataclasses import replace

from tiny_model import TINY

PLAIN = replace(TINY, unet=replace(TINY.unet, linear_projections=False))
