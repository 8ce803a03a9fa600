"""Every way to give a picture: the same picture comes out, upright, and what cannot be one is refused with a reason."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdrt.errors import InputFileError, UsageError
from sdrt.runtime.pictures import input as picture_input
from sdrt.runtime.pictures.input import open_picture


def phone_photo(orientation: int) -> bytes:
    """A JPEG that stands in its file as the sensor saw it, with EXIF data that say how it was held."""
    random = np.random.default_rng(3)
    image = Image.fromarray(random.integers(0, 255, (3, 5, 3), np.uint8)).resize((40, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = BytesIO()
    image.save(stream, "JPEG", exif=exif)
    return stream.getvalue()


WAYS: dict[str, Callable[[Path, bytes], Any]] = {
    "path": lambda path, data: path,
    "text": lambda path, data: str(path),
    "bytes": lambda path, data: data,
    "bytearray": lambda path, data: bytearray(data),
    "memoryview": lambda path, data: memoryview(data),
    "file object": lambda path, data: BytesIO(data),
    "Pillow": lambda path, data: Image.open(BytesIO(data)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_phone_photo_is_upright_however_it_is_given(tmp_path: Path, way: str) -> None:
    for orientation in range(1, 9):
        data = phone_photo(orientation)
        (tmp_path / "x.jpg").write_bytes(data)
        with Image.open(BytesIO(data)) as opened:
            expected = np.asarray(ImageOps.exif_transpose(opened))
        given = open_picture("init_image", WAYS[way](tmp_path / "x.jpg", data))
        assert np.array_equal(np.asarray(given.image), expected), orientation
        assert given.image.size == ((24, 40) if orientation > 4 else (40, 24)), orientation
        if way != "Pillow":
            assert given.sha256 == hashlib.sha256(data).hexdigest(), orientation


def test_the_hash_of_pixels() -> None:
    """Equal pixels, equal hashes, as an array and as a Pillow image; another picture, mode or shape, another hash."""
    pixels = np.random.default_rng(1).integers(0, 255, (8, 6, 3), np.uint8)
    first = open_picture("mask", pixels).sha256
    assert open_picture("mask", Image.fromarray(pixels)).sha256 == first
    others = [pixels ^ 1, pixels.reshape(6, 8, 3), np.ascontiguousarray(pixels[..., 0])]
    assert len({first, *(open_picture("mask", other).sha256 for other in others)}) == 4


def gif() -> bytes:
    stream = BytesIO()
    Image.new("P", (8, 8)).save(stream, "GIF")
    return stream.getvalue()


def closed() -> BytesIO:
    stream = BytesIO(b"x")
    stream.close()
    return stream


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (lambda: gif(), InputFileError, "init image: cannot be read as a picture: it is none of PNG, JPEG, WEBP, BMP"),
        (lambda: BytesIO(gif()), InputFileError, "it is none of PNG"),
        (lambda: Image.open(BytesIO(gif())), InputFileError, "init image: a Pillow image read from GIF"),
        (
            lambda: Image.open(BytesIO(phone_photo(6)[:700])),
            InputFileError,
            "init image: cannot be read as a picture: image file is truncated",
        ),
        (lambda: b"", InputFileError, "none of PNG"),
        (lambda: BytesIO(), InputFileError, "nothing left to read"),
        (closed, InputFileError, "closed file"),
        (lambda: StringIO("x"), UsageError, "gives str, expected bytes"),
        (lambda: [[1, 2]], UsageError, "expected a path, bytes, a file object, a Pillow image or an array, found list"),
        (lambda: Image.new("L", (9000, 9000)), InputFileError, "9000x9000 pixels, the limit is 67,108,864"),
        (lambda: np.zeros((9000, 9000), np.uint8), InputFileError, "9000x9000 pixels"),
    ],
)
def test_what_cannot_be_a_picture(source: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        open_picture("init_image", source())
    assert "object at 0x" not in str(raised.value)


def test_a_file_object_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        def read(self, size: int) -> bytes:
            return b"x" * size

    monkeypatch.setattr(picture_input, "MAX_FILE_BYTES", 1000)
    with pytest.raises(InputFileError, match="more than the limit of 1,000 bytes"):
        open_picture("init_image", Endless())  # type: ignore[arg-type]
