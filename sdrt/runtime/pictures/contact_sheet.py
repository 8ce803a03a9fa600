"""The way from noise to picture in one image. The upper row has the latents as they are, the lower row the network's
estimate of the finished picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdrt.runtime.engine import Pixels

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = 8
_GAP, _CAPTION, _MARGIN = 6, 18, 10
_PAPER, _INK = (250, 250, 250), (40, 40, 40)


@dataclass(frozen=True)
class Frame:
    """One moment: pixels uint8 `[H, W, 3]` of the latents and of the estimate, and the text below them."""

    noisy: Pixels
    denoised: Pixels
    caption: str


def shown_calls(count: int) -> set[int]:
    """Which of `count` model calls (from 1) a sheet shows: at most `COLUMNS`, evenly spaced, with the first and the
    last.
    """
    if count <= COLUMNS:
        return set(range(1, count + 1))
    return {1 + round(i * (count - 1) / (COLUMNS - 1)) for i in range(COLUMNS)}


def contact_sheet(frames: Sequence[Frame], side: int = 160) -> Image.Image:
    """One RGB image of all frames, left to right. Pictures are drawn at most `side` pixels wide; small ones are
    enlarged by a whole factor.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = frames[0].noisy.shape[:2]
    scale = max(1, side // width) if width <= side else side / width
    cell = (round(width * scale), round(height * scale))
    sheet = Image.new(
        "RGB",
        (2 * _MARGIN + len(frames) * (cell[0] + _GAP) - _GAP, 2 * _MARGIN + 2 * cell[1] + _GAP + _CAPTION),
        _PAPER,
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, frame in enumerate(frames):
        left = _MARGIN + column * (cell[0] + _GAP)
        for row, pixels in enumerate((frame.noisy, frame.denoised)):
            method = Image.Resampling.NEAREST if width <= side else Image.Resampling.LANCZOS
            sheet.paste(Image.fromarray(pixels).resize(cell, method), (left, _MARGIN + row * (cell[1] + _GAP)))
        draw.text(
            (left + cell[0] / 2, _MARGIN + 2 * cell[1] + _GAP + _CAPTION / 2), frame.caption, _INK, font, anchor="mm"
        )
    return sheet
