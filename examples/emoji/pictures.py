"""The pictures to learn from: Fluent Emoji out of two npm packages, or a folder of your own, in one of several looks.
Downloads nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdrt.errors import InputFileError, MachineError, UsageError, nearest, printable

FLAT, TOYS = "@iconify-json/fluent-emoji-flat", "@lobehub/fluent-emoji-3d"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SIDE = 64

Pixels = NDArray[np.uint8]
Captioned = list[tuple[str, Pixels]]
"""Captions, and pictures uint8 `[H, W, 3]`."""


def _recoloured(picture: Image.Image, matrix: NDArray[np.float64], offset: NDArray[np.float64]) -> Image.Image:
    """Colours `[3]` in 0..255 through an affine map, transparency kept."""
    rgba = np.asarray(picture).astype(np.float64)
    rgba[..., :3] = (rgba[..., :3] @ matrix.T + offset).clip(0, 255)
    return Image.fromarray(rgba.round().astype(np.uint8))


def plain(picture: Image.Image) -> Pixels:
    """The picture as it is, on white."""
    return np.array(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def _toned(picture: Image.Image, dark: tuple[int, int, int], light: tuple[int, int, int]) -> Pixels:
    """Colours replaced by a shade between two, as bright as they were."""
    grey = np.array((0.299, 0.587, 0.114)) / 255
    return plain(_recoloured(picture, np.outer(np.subtract(light, dark), grey), np.array(dark)))


def frozen(picture: Image.Image) -> Pixels:
    """As if of ice: shades of blue."""
    return _toned(picture, (0, 20, 110), (200, 240, 255))


def golden(picture: Image.Image) -> Pixels:
    """As if of gold."""
    return _toned(picture, (120, 50, 0), (255, 225, 80))


def drawn(picture: Image.Image) -> Pixels:
    """A page of a colouring book: dark lines where colours meet, nothing between."""
    smooth = np.asarray(plain(picture)).astype(np.float64)
    steps = [np.abs(np.roll(smooth, shift, axis) - smooth).max(axis=-1) for axis in (0, 1) for shift in (1, -1)]
    lines = np.clip(np.max(steps, axis=0) * 3, 0, 255)
    return np.repeat((255 - 0.85 * lines).astype(np.uint8)[..., None], 3, axis=-1)


LOOKS: dict[str, Callable[[Image.Image], Pixels]] = {
    "flat": plain,
    "toy": plain,
    "frozen": frozen,
    "golden": golden,
    "drawn": drawn,
}
"""What is made of each picture; `toy` is the emoji's other drawing, in 3D. All are on white, the only background that
the model's autoencoder knows.
"""


def from_folder(folder: Path, look: str) -> Captioned:
    """Every picture of a folder, captioned by its file name with spaces for underscores.

    Raises:
        InputFileError: the folder has no picture, or one cannot be read.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputFileError(
            f"{folder}: expected pictures ({', '.join(SUFFIXES)}), found none",
            "Name each picture after what it shows: red_apple.png.",
        )
    return [(path.stem.replace("_", " "), LOOKS[look](_opened(path))) for path in paths]


def _opened(path: Path, data: bytes | None = None) -> Image.Image:
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as picture:
            return picture.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputFileError(
            f"{path}: expected a picture, found none that can be read: {printable(str(error))}",
            "Leave it out, or save it again.",
        ) from error


def from_packages(node_modules: Path, names: Sequence[str], look: str) -> Captioned:
    """Fluent Emoji by name ("red apple"), captioned by it, from the packages below `node_modules`.

    Raises:
        MachineError: a package, or resvg, which draws the flat ones, is not there.
        UsageError: there is no emoji of that name.
    """
    package = node_modules / (TOYS if look == "toy" else FLAT)
    flat = node_modules / FLAT
    for folder in (flat, package):
        if not (folder / "package.json").is_file():
            raise MachineError(
                f"{folder}: the emoji are not there",
                f"Get them with npm install --prefix {node_modules.parent} {FLAT} {TOYS}, or name your own pictures"
                " with --pictures DIR.",
            )
    icons = json.loads((flat / "icons.json").read_text())["icons"]
    for name in names:
        if name.replace(" ", "-") not in icons:
            raise UsageError(
                f"{printable(name)}: no emoji is called that{nearest(name.replace(' ', '-'), icons)}",
                f"{flat}/icons.json lists the names.",
            )
    if look == "toy":
        code = {name: code for code, name in json.loads((flat / "chars.json").read_text()).items()}
        paths = {name: package / "assets" / f"{code[name.replace(' ', '-')]}.webp" for name in names}
        return [
            (name, LOOKS[look](_opened(path))) for name, path in paths.items() if path.is_file()
        ]  # a few were never drawn in 3D
    return [(name, LOOKS[look](_drawn(icons[name.replace(" ", "-")]["body"], flat))) for name in names]


def _drawn(body: str, package: Path) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise MachineError(
            "resvg-py, which draws the flat emoji, is not installed",
            "Install it with pip install resvg-py, or use --pictures DIR.",
        ) from error
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
    return _opened(
        package / "icons.json", bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * SIDE, height=4 * SIDE))
    )


def varied(pictures: Captioned) -> Captioned:
    """Each picture eight times: both ways round, and moved by a few pixels, for a subject of which there are too few
    pictures.
    """
    found = []
    for caption, pixels in pictures:
        for mirrored in (pixels, pixels[:, ::-1]):
            for x, y in ((0, 0), (4, 2), (-4, -2), (0, -4)):
                padded = np.pad(mirrored, ((4, 4), (4, 4), (0, 0)), mode="edge")
                found.append((caption, np.ascontiguousarray(padded[4 + y : 4 + y + SIDE, 4 + x : 4 + x + SIDE])))
    return found
