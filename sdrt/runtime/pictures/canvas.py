"""Pictures as input: an init image is fitted to the size asked for, and a mask is brought to the latents. The
arithmetic of the denoising is not here.

Formulas: AUTOMATIC1111's modules/processing.py and modules/images.py, diffusers' image_processor.py, in our own words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdrt.errors import UsageError
from sdrt.runtime.engine import Float, Pixels
from sdrt.runtime.pictures.input import MAX_PIXELS, open_picture

if TYPE_CHECKING:
    from PIL import Image

    from sdrt.runtime.request import ImageInput

_STRIP = 1 << 20
"""How many pixels of a mask are softened at a time."""


@dataclass(frozen=True)
class Canvas:
    """The start of a picture of W x H pixels.

    pixels: uint8 `[H, W, 3]`.
    keep: float32 `[1, h, w]`: 1 where the latents stay the image's, 0 where they are repainted. All 0 without a mask.
    masked_pixels: uint8 `[H, W, 3]`, the image with grey where it is repainted, as inpainting models see it; None
        without a mask.
    overlay: float32 `[H, W, 1]`, how much of the image is laid over the finished picture, 0 to 1; None where the tool
        lays nothing over it.
    sha256: hashes of the sources of `init_image` and `mask`: of the bytes of a file, or of the pixels of an image in
        memory.
    """

    pixels: Pixels
    keep: Float
    masked_pixels: Pixels | None = None
    overlay: Float | None = None
    sha256: dict[str, str] = field(default_factory=dict)


def blank_canvas(size: tuple[int, int], factor: int) -> Canvas:
    """A canvas with nothing on it: grey, all of it repainted. Inpainting models see it when they draw from text."""
    width, height = size
    grey = np.full((height, width, 3), 128, np.uint8)
    return Canvas(grey, np.zeros((1, height // factor, width // factor), np.float32), grey)


def canvas(
    init: ImageInput,
    mask: ImageInput | None,
    size: tuple[int, int],
    *,
    resize: str,
    blur: int,
    compat: str,
    factor: int,
) -> Canvas:
    """Bring an init image and its mask to `size` and to the latents. White parts of the mask are repainted.

    Raises:
        InputFileError: one of them cannot be read as a picture, or is larger than the limits.
        UsageError: the mask has another size than the image, or an array is no picture.
    """
    sha256: dict[str, str] = {}
    given = open_picture("init_image", init)
    sha256["init_image"] = given.sha256
    image = _flattened(given.image)
    fitted = RESIZES[resize](image, size)
    pixels = np.asarray(fitted, np.uint8)
    shape = (1, size[1] // factor, size[0] // factor)
    if mask is None:
        return Canvas(pixels, np.zeros(shape, np.float32), sha256=sha256)
    drawn = open_picture("mask", mask)
    sha256["mask"], opened = drawn.sha256, drawn.image
    if opened.size != image.size:
        raise UsageError(
            f"mask: {opened.width}x{opened.height} pixels, the init image has {image.width}x{image.height}",
            "Draw the mask on a copy of the image.",
        )
    masked = _diffusers_mask if compat == "diffusers" else _a1111_mask
    return replace(masked(pixels, opened, size, resize, blur, factor), sha256=sha256)


def _diffusers_mask(
    pixels: Pixels, mask: Image.Image, size: tuple[int, int], resize: str, blur: int, factor: int
) -> Canvas:
    """Repaint where the mask is at least half white, at the resolution of pixels. The nearest pixel decides for a
    latent. Nothing is laid over the result.
    """
    from PIL import ImageFilter

    if blur:
        mask = mask.filter(ImageFilter.GaussianBlur(blur))
    repaint = np.asarray(RESIZES[resize](mask, size).convert("L"), np.float32) / 255 >= 0.5
    keep = 1 - repaint[None, ::factor, ::factor].astype(np.float32)
    return Canvas(pixels, keep, _greyed(pixels, repaint))


def _a1111_mask(
    pixels: Pixels, mask: Image.Image, size: tuple[int, int], resize: str, blur: int, factor: int
) -> Canvas:
    """Blur the mask before it is fitted. A latent is repainted or kept whole. The image is laid over the result along
    the soft edge.
    """
    from PIL import Image

    grey = _binary_alpha(mask) if mask.mode == "RGBA" and mask.getextrema()[-1] != (255, 255) else mask.convert("L")
    if blur:
        grey = Image.fromarray(gaussian_blur(np.asarray(grey, np.uint8), blur))
    fitted = RESIZES[resize](grey, size)
    repaint = np.asarray(fitted, np.float32)
    latent = np.asarray(fitted.convert("RGB").resize((size[0] // factor, size[1] // factor)), np.float32)[..., 0] / 255
    keep = 1 - np.around(latent)[None]
    overlay = 1 - np.clip(repaint * 2, 0, 255)[..., None] / 255
    return Canvas(
        pixels, keep.astype(np.float32), _greyed(pixels, np.around(repaint / 255) > 0), overlay.astype(np.float32)
    )


def _binary_alpha(mask: Image.Image) -> Image.Image:
    return mask.split()[-1].convert("L").point(lambda value: 255 if value > 128 else 0)


def _greyed(pixels: Pixels, repaint: NDArray[np.bool_]) -> Pixels:
    return np.where(repaint[..., None], np.uint8(128), pixels)


def laid_over(picture: Pixels, canvas: Canvas) -> Pixels:
    """The finished picture `[H, W, 3]` with the kept parts of the image laid over it."""
    if canvas.overlay is None:
        return picture
    blended = canvas.pixels * canvas.overlay + picture * (1 - canvas.overlay)
    return np.around(blended).astype(np.uint8)


def gaussian_blur(grey: NDArray[np.uint8], sigma: int) -> NDArray[np.uint8]:
    """A mask `[H, W]` softened as AUTOMATIC1111 does it: OpenCV's Gaussian of 2 int(2.5 sigma + 0.5) + 1 taps, rows and
    then columns, with reflected edges.
    """
    reach = int(2.5 * sigma + 0.5)
    taps = np.exp(-(np.arange(-reach, reach + 1, dtype=np.float64) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    result = grey
    for _ in range(2):
        result = np.ascontiguousarray(_filtered_rows(result, taps).T)
    return result


def _filtered_rows(rows: NDArray[np.uint8], taps: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Every row convolved with the taps, through Fourier transforms. The time does not grow with the radius, and the
    memory does not grow with the mask.
    """
    reach, width = len(taps) // 2, rows.shape[1]
    if width == 1:
        return rows
    length = -(-(width + 2 * reach) // 128) * 128
    spectrum = np.fft.rfft(taps, length)
    result = np.empty_like(rows)
    strip = max(1, _STRIP // length)
    for top in range(0, len(rows), strip):
        padded = np.pad(rows[top : top + strip], ((0, 0), (reach, reach)), mode="reflect")
        convolved = np.fft.irfft(np.fft.rfft(padded, length) * spectrum, length)
        result[top : top + strip] = np.around(convolved[:, 2 * reach : 2 * reach + width]).clip(0, 255)
    return result


def stretch(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to the size and ignore the proportions."""
    from PIL import Image

    return image.resize(size, Image.Resampling.LANCZOS)


def crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Cover the size, and cut off what sticks out on both sides."""
    from PIL import Image

    (width, height), (whole_width, whole_height) = size, _scaled_size(image, size, cover=True)
    if whole_width * whole_height <= MAX_PIXELS:
        return _centred(stretch(image, (whole_width, whole_height)), size)
    # The image is so thin that most of it would be cut off: only the part that stays is scaled.
    across, down = image.width / whole_width, image.height / whole_height
    left, top = -((width - whole_width) // 2), -((height - whole_height) // 2)
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    return image.resize(size, Image.Resampling.LANCZOS, box=box)


def fill(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Fit within the size, and repeat the outermost pixels up to its edges."""
    scaled = stretch(image, _scaled_size(image, size, cover=False))
    result = _centred(scaled, size)
    (width, height), left, top = size, (size[0] - scaled.width) // 2, (size[1] - scaled.height) // 2
    right, bottom = left + scaled.width, top + scaled.height
    for target, source in (
        ((0, 0, left, height), (left, 0, left + 1, height)),
        ((right, 0, width, height), (right - 1, 0, right, height)),
        ((0, 0, width, top), (0, top, width, top + 1)),
        ((0, bottom, width, height), (0, bottom - 1, width, bottom)),
    ):
        wide, high = target[2] - target[0], target[3] - target[1]
        if wide and high:
            result.paste(result.crop(source).resize((wide, high)), target[:2])
    return result


def _scaled_size(image: Image.Image, size: tuple[int, int], *, cover: bool) -> tuple[int, int]:
    (width, height), wider = size, size[0] * image.height > size[1] * image.width
    scaled = (
        (width, image.height * width // image.width)
        if wider == cover
        else (image.width * height // image.height, height)
    )
    return max(1, scaled[0]), max(1, scaled[1])


def _centred(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    result = Image.new(image.mode, size)
    result.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return result


RESIZES: dict[str, Callable[[Image.Image, tuple[int, int]], Image.Image]] = {
    "stretch": stretch,
    "crop": crop,
    "fill": fill,
}


def _flattened(image: Image.Image) -> Image.Image:
    """The image as RGB; transparent parts become white."""
    from PIL import Image

    if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
