"""The only way in for pictures: paths, bytes, file objects, Pillow images and arrays all become the same thing,
upright, within the limits and hashed.

This file says which formats are read and how large a picture may be. `canvas.py` decides what to do with a picture.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from struct import error as struct_error
from typing import TYPE_CHECKING

import numpy as np

from sdrt.bundle.manifest import MAX_SIDE
from sdrt.errors import InputFileError, UsageError, printable
from sdrt.files.read import read_document

if TYPE_CHECKING:
    from PIL import Image

    from sdrt.runtime.request import ImageInput

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = MAX_SIDE * MAX_SIDE
MAX_FILE_BYTES = 512 << 20
_FIX = f"Give a {', '.join(FORMATS)} file."


@dataclass(frozen=True)
class Given:
    """A picture as it was given, upright. `sha256` is that of the bytes of its file. For a Pillow image or an array it
    is that of the pixels.
    """

    image: Image.Image
    sha256: str


def open_picture(setting: str, source: ImageInput) -> Given:
    """Open the picture given for a setting such as `init_image`. A file object is read from its current position to its
    end.

    Raises:
        InputFileError: it cannot be read as a picture, has a format that is not read, or is larger than the limits.
        UsageError: it cannot be a picture at all, or is an array of another shape or type.
    """
    from PIL import Image

    name = setting.replace("_", " ")
    if isinstance(source, (str, Path)):
        return _read(f"{name} {source}", _bytes_of_file(name, Path(source)))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read(name, bytes(source))
    if isinstance(source, np.ndarray):
        good = (
            source.dtype == np.uint8
            and (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4)))
            and 0 not in source.shape
        )
        if not good:
            raise UsageError(
                f"{name}: array of shape {list(source.shape)} and {source.dtype}, expected uint8 [H, W], [H, W, 3] or"
                " [H, W, 4]"
            )
        _check_pixels(name, source.shape[1], source.shape[0])
        return _of_pixels(Image.fromarray(source))
    if isinstance(source, Image.Image):
        if source.format not in (None, *FORMATS):  # perhaps not loaded yet; Pillow would then read it only now
            raise InputFileError(
                f"{name}: a Pillow image read from {printable(str(source.format))}",
                f"{_FIX} If you trust it, give image.copy().",
            )
        return _of_pixels(_upright(name, source))
    if callable(getattr(source, "read", None)):
        return _read(name, _bytes_of_stream(name, source))
    raise UsageError(
        f"{name}: expected a path, bytes, a file object, a Pillow image or an array, found {type(source).__name__}"
    )


def _bytes_of_file(name: str, path: Path) -> bytes:
    try:
        return read_document(path, MAX_FILE_BYTES).data
    except FileNotFoundError as error:
        raise InputFileError(f"{name} {path}: no such file") from error
    except InputFileError as error:
        raise InputFileError(f"{name} {error.message}", _FIX) from error


def _bytes_of_stream(name: str, stream: object) -> bytes:
    try:
        data = stream.read(MAX_FILE_BYTES + 1)  # type: ignore[attr-defined]
    except (OSError, ValueError) as error:  # ValueError: the stream is closed
        raise InputFileError(
            f"{name}: cannot be read: {printable(str(error))}", "Give a file object that is open for reading."
        ) from error
    if not isinstance(data, bytes):
        raise UsageError(
            f"{name}: a file object that gives {type(data).__name__}, expected bytes", "Open it in binary mode."
        )
    if not data:
        raise InputFileError(f"{name}: the file object has nothing left to read", "Rewind it with seek(0).")
    if len(data) > MAX_FILE_BYTES:
        raise InputFileError(f"{name}: more than the limit of {MAX_FILE_BYTES:,} bytes", _FIX)
    return data


def _read(where: str, data: bytes) -> Given:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                return Given(_upright(where, image), hashlib.sha256(data).hexdigest())
    except UnidentifiedImageError as error:  # Pillow's message names an object in memory, not the file
        raise InputFileError(
            f"{where}: cannot be read as a picture: it is none of {', '.join(FORMATS)}", _FIX
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputFileError(
            f"{where}: {printable(str(error))}", f"The limit is {MAX_PIXELS:,} pixels: make it smaller."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct_error) as error:
        raise _unreadable(where, error) from error


def _upright(where: str, image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data says, with its pixels in memory. The given picture is not changed."""
    from PIL import ImageOps

    _check_pixels(where, *image.size)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, EOFError, struct_error) as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> InputFileError:
    return InputFileError(f"{where}: cannot be read as a picture: {printable(str(error))}", _FIX)


def _of_pixels(image: Image.Image) -> Given:
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode())
    digest.update(image.tobytes())
    return Given(image, digest.hexdigest())


def _check_pixels(name: str, width: int, height: int) -> None:
    if math.prod((width, height)) > MAX_PIXELS:
        raise InputFileError(f"{name}: {width}x{height} pixels, the limit is {MAX_PIXELS:,}", "Make it smaller first.")
