"""Pictures as input: fitting and masks against diffusers' image processor and Pillow's own compositing, and everything
that is no picture.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from picture_files import bomb
from PIL import Image, ImageDraw, ImageOps

from sdrt.errors import InputFileError, SdrtError, UsageError
from sdrt.runtime.pictures import canvas as images
from sdrt.runtime.pictures.canvas import RESIZES, blank_canvas, canvas, gaussian_blur, laid_over
from sdrt.runtime.pictures.input import MAX_PIXELS


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours with an edge, so that resampling shows."""
    y, x = np.mgrid[0:height, 0:width]
    bands = [
        128 + 100 * np.sin(x / 7),
        128 + 100 * np.cos(y / 5),
        np.where(x * height > y * width, 220, 30),
        np.full_like(x, 255) - (x + y) % 256,
    ]
    return Image.fromarray(np.stack(bands[: len(mode)], axis=-1).astype(np.uint8), mode if mode == "RGBA" else None)


def disc(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).ellipse((width * 0.2, height * 0.3, width * 0.8, height * 0.9), fill=255)
    return mask


def made(
    init: Any,
    mask: Any = None,
    size: tuple[int, int] = (64, 96),
    resize: str = "stretch",
    blur: int = 0,
    compat: str = "a1111",
) -> Any:
    return canvas(init, mask, size, resize=resize, blur=blur, compat=compat, factor=8)


# Fitting


def test_stretch_is_what_diffusers_does() -> None:
    from diffusers.image_processor import VaeImageProcessor

    image = photo(200, 130)
    expected = VaeImageProcessor(vae_scale_factor=8).preprocess(image, height=96, width=64)
    found = torch.from_numpy(made(image).pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("resize", RESIZES)
def test_every_mode_gives_the_size(resize: str) -> None:
    sources = [(200, 100), (100, 200), (640, 480), (64, 96), (30, 20), (1, 1), (1000, 3)]
    for source, size in itertools.product(sources, [(64, 64), (64, 96), (128, 64)]):
        pixels = made(photo(*source), size=size, resize=resize).pixels
        assert pixels.shape == (size[1], size[0], 3) and pixels.dtype == np.uint8, (source, size)


@pytest.mark.parametrize("source", [(200, 100), (100, 200), (641, 480), (64, 96), (30, 21), (1000, 3), (3, 1001)])
def test_crop_of_a_picture_too_thin_to_be_scaled_whole(
    source: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what stays is scaled, and comes out the same but for rounding."""
    expected = made(photo(*source), resize="crop").pixels.astype(int)
    monkeypatch.setattr(images, "MAX_PIXELS", 0)
    assert np.abs(RESIZES["crop"](photo(*source), (64, 96)) - expected).max() <= 1


@pytest.mark.parametrize("size", [(1, 1_000_001), (1_000_001, 1)])
def test_crop_of_a_line(size: tuple[int, int]) -> None:
    """Whole, it would be scaled to billions of pixels."""
    line = photo(*size)
    middle = line.crop(
        tuple(max(0, side // 2 - 20) for side in size) + tuple(min(side, side // 2 + 21) for side in size)
    )
    assert np.abs(made(line, resize="crop").pixels.astype(int) - made(middle, resize="crop").pixels).max() <= 1


def test_crop_keeps_the_middle() -> None:
    """Twice as wide as it should be: a quarter goes on either side."""
    image = Image.new("RGB", (256, 64), "blue")
    image.paste("red", (96, 0, 160, 64))
    assert (made(image, size=(64, 64), resize="crop").pixels == (255, 0, 0)).all()


def test_crop_is_pillow_s_fit() -> None:
    image = photo(200, 100)
    expected = np.asarray(ImageOps.fit(image, (64, 64), Image.Resampling.LANCZOS), np.float32)
    assert (
        np.abs(made(image, size=(64, 64), resize="crop").pixels - expected).mean() < 6
    )  # it crops first and scales then


def test_fill_draws_the_edges_out() -> None:
    image = Image.new("RGB", (64, 32), "green")
    image.paste("red", (0, 0, 64, 1))
    image.paste("blue", (0, 31, 64, 32))
    pixels = made(image, size=(64, 64), resize="fill").pixels
    assert (
        (pixels[:17] == (255, 0, 0)).all()
        and (pixels[47:] == (0, 0, 255)).all()
        and (pixels[17:47] == (0, 128, 0)).all()
    )
    tall = made(image.transpose(Image.Transpose.ROTATE_90), size=(64, 64), resize="fill").pixels
    assert (tall[:, :17] == (255, 0, 0)).all() and (tall[:, 47:] == (0, 0, 255)).all()


def test_a_picture_of_the_size_is_left() -> None:
    image = photo(64, 96)
    for resize in RESIZES:
        assert np.array_equal(made(image, resize=resize).pixels, np.asarray(image))


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (64, 96), (255, 0, 0, 0))
    assert (made(image).pixels == 255).all()
    half = made(Image.new("RGBA", (64, 96), (0, 0, 0, 128))).pixels
    assert (half == 127).all()
    palette = Image.new("P", (64, 96))
    palette.info["transparency"] = 0
    assert (made(palette).pixels == 255).all()


def test_every_way_to_give_a_picture(tmp_path: Path) -> None:
    image = photo(80, 70)
    image.save(tmp_path / "x.png")
    expected = made(image).pixels
    for given in (tmp_path / "x.png", str(tmp_path / "x.png"), np.asarray(image)):
        assert np.array_equal(made(given).pixels, expected)
    grey = np.asarray(image.convert("L"))
    assert np.array_equal(made(grey).pixels, made(Image.fromarray(grey)).pixels)


def test_turned_by_its_camera(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    photo(96, 64).save(tmp_path / "x.jpg", exif=exif, quality=100)
    assert (
        np.abs(
            made(tmp_path / "x.jpg").pixels.astype(int)
            - np.asarray(photo(96, 64).transpose(Image.Transpose.ROTATE_270))
        ).mean()
        < 5
    )


# Masks


@pytest.mark.parametrize("source", [(64, 96), (150, 90)])
def test_diffusers_masks(source: tuple[int, int]) -> None:
    from diffusers.image_processor import VaeImageProcessor

    image, mask = photo(*source), disc(*source)
    processor = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    expected = processor.preprocess(mask, height=96, width=64)
    found = made(image, mask, compat="diffusers")
    assert torch.equal(torch.from_numpy(1 - found.keep)[None], F.interpolate(expected, size=(12, 8)))
    init = VaeImageProcessor(vae_scale_factor=8).preprocess(image, height=96, width=64)
    seen = torch.from_numpy(found.masked_pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    assert torch.allclose(
        seen, init * (expected < 0.5), atol=0.5 / 127.5 + 1e-6
    )  # the grey of bytes is half a level off
    assert found.overlay is None


def test_a1111_masks_against_pillow() -> None:
    """The overlay is the image, cut out by the doubled mask, over the picture; a latent is kept or repainted whole."""
    image, mask = photo(64, 96), disc(64, 96)
    found = made(image, mask, blur=4)
    soft = Image.fromarray(gaussian_blur(np.asarray(mask), 4))
    doubled = Image.fromarray(np.clip(np.asarray(soft, np.float32) * 2, 0, 255).astype(np.uint8))
    picture = Image.effect_noise((64, 96), 80).convert("RGB")
    cut = Image.new("RGBA", picture.size)
    cut.paste(image.convert("RGBA"), mask=ImageOps.invert(doubled))
    expected = np.asarray(Image.alpha_composite(picture.convert("RGBA"), cut).convert("RGB"), np.int64)
    # Pillow's compositing works in bytes, and pasting onto nothing squares the soft edge; where the mask is plain they
    # agree.
    plain = np.isin(np.asarray(doubled), (0, 255))
    laid = laid_over(np.asarray(picture), found).astype(np.int64)
    assert plain.mean() > 0.6 and (np.abs(laid - expected)[plain] <= 1).all()
    latent = np.asarray(soft.convert("RGB").resize((8, 12)), np.float32)[..., 0] / 255
    assert np.array_equal(found.keep[0], 1 - np.around(latent)) and set(np.unique(found.keep)) == {0.0, 1.0}


def test_overlay_is_the_weighted_sum() -> None:
    image, mask = photo(64, 64), disc(64, 64)
    found = made(image, mask, size=(64, 64), blur=6)
    weight = found.overlay.astype(np.float64)
    assert ((weight > 0.05) & (weight < 0.95)).any()
    picture = np.asarray(photo(64, 64).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    expected = np.asarray(image) * weight + picture * (1 - weight)
    assert np.abs(laid_over(picture, found) - expected).max() <= 0.5001


def test_all_white_and_all_black() -> None:
    for compat in ("a1111", "diffusers"):
        assert (made(photo(64, 96), Image.new("L", (64, 96), 255), compat=compat, blur=4).keep == 0).all()
        assert (made(photo(64, 96), Image.new("L", (64, 96), 0), compat=compat, blur=4).keep == 1).all()


def test_mask_in_the_alpha_channel() -> None:
    alpha = Image.merge("RGBA", [*Image.new("RGB", (64, 96)).split(), disc(64, 96)])
    assert np.array_equal(made(photo(64, 96), alpha).keep, made(photo(64, 96), disc(64, 96)).keep)


def test_blank_canvas() -> None:
    blank = blank_canvas((64, 96), 8)
    assert (
        blank.pixels.shape == (96, 64, 3)
        and (blank.pixels == 128).all()
        and blank.keep.shape == (1, 12, 8)
        and not blank.keep.any()
    )


@pytest.mark.parametrize("sigma", [1, 4, 16])
def test_blur_against_the_sum_in_float64(sigma: int) -> None:
    grey = np.asarray(disc(60, 40))
    reach = int(2.5 * sigma + 0.5)
    offsets = np.arange(-reach, reach + 1)
    taps = np.exp(-(offsets.astype(np.float64) ** 2) / (2 * sigma**2))
    taps /= taps.sum()

    def mirrored(index: int, count: int) -> int:
        period = 2 * (count - 1)
        index = abs(index) % period
        return min(index, period - index)

    def along(values: NDArray[Any], count: int) -> NDArray[Any]:
        return np.stack(
            [sum(t * values[mirrored(i + o, count)] for t, o in zip(taps, offsets, strict=True)) for i in range(count)]
        )

    rows = along(grey.T.astype(np.float64), 60).T
    expected = along(np.around(rows), 40)
    assert np.abs(gaussian_blur(grey, sigma) - expected).max() <= 0.5001


# What is no picture


def truncated(path: Path) -> Path:
    photo(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def flipped(path: Path) -> Path:
    photo(64, 64).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    return path


def text(path: Path) -> Path:
    path.write_text("not a picture")
    return path


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def svg(path: Path) -> Path:
    path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return path


@pytest.mark.parametrize("make", [bomb, truncated, flipped, text, empty, fifo, folder, svg, lambda path: path])
def test_files_that_are_no_pictures(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "x.png")
    with pytest.raises(InputFileError, match=r"init image .*x\.png"):
        made(path)
    with pytest.raises(InputFileError, match=r"mask .*x\.png"):
        made(photo(64, 64), path)


def test_the_bomb_names_the_limit(tmp_path: Path) -> None:
    with pytest.raises(InputFileError) as raised:
        made(bomb(tmp_path / "x.png"))
    assert f"{MAX_PIXELS:,} pixels" in raised.value.fix


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (np.zeros((64, 64, 3), np.float32), UsageError),
        (np.zeros((64, 64, 2), np.uint8), UsageError),
        (np.zeros((64,), np.uint8), UsageError),
        (np.zeros((0, 64, 3), np.uint8), UsageError),
        (42, UsageError),
        (None, UsageError),
    ],
)
def test_objects_that_are_no_pictures(given: Any, error: type[SdrtError]) -> None:
    with pytest.raises(error, match="init image"):
        made(given)


@pytest.mark.parametrize("compat", ["a1111", "diffusers"])
def test_mask_of_another_size(compat: str) -> None:
    with pytest.raises(UsageError, match="mask: 32x32 pixels, the init image has 64x96"):
        made(photo(64, 96), disc(32, 32), compat=compat)
