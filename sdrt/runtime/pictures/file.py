"""A finished picture as a PNG, JPEG or WebP file that says how the picture was made.

The settings are in the file twice: as AUTOMATIC1111's text, which other tools read, and as JSON with all of them. A PNG
holds the text in its chunk `parameters` and the JSON in the chunk `sdrt`. JPEG and WebP hold them as EXIF, in
UserComment and MakerNote. `sdrt.runtime.pictures.settings` reads the JSON back, so that a picture can be made again.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from struct import error as struct_error
from typing import Any

from sdrt.errors import InputFileError, UsageError, one_of, printable
from sdrt.files.publish import staged_file, write_file
from sdrt.files.read import read_document
from sdrt.runtime.engine import Pixels
from sdrt.runtime.pictures.infotext import infotext
from sdrt.runtime.pictures.input import MAX_FILE_BYTES

PICTURE_FORMATS = ("png", "jpeg", "webp")
FORMAT_OF_ENDING = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
JSON_CHUNK, TEXT_CHUNK = "sdrt", "parameters"
CONTACT_SHEET = "contact sheet"
"""The text of a contact sheet, which has no settings."""
QUALITY = 90
_MAX_CHUNK = 1 << 20
_EXIF, _USER_COMMENT, _MAKER_NOTE = 0x8769, 0x9286, 0x927C
_UNICODE, _OURS = b"UNICODE\0", b"sdrt\0"
"""The first bytes of the two EXIF values: EXIF's own code for UTF-16, and the writer of the note."""


def encode(image: Pixels, parameters: Mapping[str, Any], format: str = "png", *, quality: int = QUALITY) -> bytes:
    """One picture as the bytes of a file that says how it was made.

    Args:
        image: uint8 `[H, W, 3]`.
        parameters: the parameters of a result, with the picture's own `seed` and its `engine`.
        format: png, jpeg or webp.
        quality: 1 to 100, for jpeg and webp; webp loses nothing at 100.

    Raises:
        UsageError: an unknown format, a quality out of range, or more text than JPEG holds.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    one_of("format", format, PICTURE_FORMATS)
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise UsageError(f"quality {quality!r}: expected a whole number from 1 to 100")
    text, everything = infotext(parameters), json.dumps(dict(parameters), ensure_ascii=False)
    stream = BytesIO()
    picture = Image.fromarray(image)
    if format == "png":
        info = PngInfo()
        info.add_text(TEXT_CHUNK, text)
        info.add_itxt(JSON_CHUNK, everything)
        picture.save(stream, "PNG", pnginfo=info)
        return stream.getvalue()
    exif = Image.Exif()
    exif.get_ifd(_EXIF).update(
        {_USER_COMMENT: _UNICODE + text.encode("utf-16-be"), _MAKER_NOTE: _OURS + everything.encode()}
    )
    if format == "webp":
        picture.save(stream, "WEBP", quality=quality, lossless=quality == 100, exif=exif)
        return stream.getvalue()
    try:
        picture.save(stream, "JPEG", quality=quality, exif=exif)
    except ValueError as error:  # JPEG holds all of it in one segment of 65,533 bytes
        raise UsageError(
            "format 'jpeg': the prompt and settings are longer than a JPEG's EXIF holds", "Choose png or webp."
        ) from error
    return stream.getvalue()


def save_picture(path: Path, data: bytes) -> None:
    """Write the bytes of a picture to a file, whole or not at all. An existing file is replaced.

    Raises:
        ResourceError: the disk is full.
        UsageError: the folder cannot be written.
    """
    with staged_file(path) as stage:
        write_file(stage, data)


def save_new_picture(path: Path, data: bytes) -> Path:
    """Write the bytes of a picture to a file of that name. If the name is taken, the first free one is used: NAME-2,
    NAME-3 and so on.

    Raises:
        ResourceError: the disk is full.
        UsageError: the folder cannot be written.
    """
    for number in itertools.count(1):
        free = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        if os.path.lexists(free):
            continue
        try:
            with staged_file(free, replace=False) as stage:
                write_file(stage, data)
        except FileExistsError:  # another process was faster
            continue
        break
    return free


@dataclass(frozen=True)
class Said:
    """What a picture says about how it was made: AUTOMATIC1111's text, and our JSON as text. None where it has none."""

    text: str | None
    ours: str | None


def read_said(path: Path) -> Said:
    """Read what `encode`, or AUTOMATIC1111, wrote into a picture.

    Raises:
        InputFileError: there is no such file, or it is no PNG, JPEG or WebP.
    """
    from PIL import Image, UnidentifiedImageError

    fix = "Give a picture written by sdrt generate or AUTOMATIC1111."
    names = [name.upper() for name in PICTURE_FORMATS]
    try:
        with Image.open(BytesIO(read_document(path, MAX_FILE_BYTES, fix).data), formats=names) as image:
            if image.format == "PNG":
                return Said(
                    *(
                        text if isinstance(text := image.info.get(name), str) else None
                        for name in (TEXT_CHUNK, JSON_CHUNK)
                    )
                )
            exif = image.getexif().get_ifd(_EXIF)
    except FileNotFoundError as error:
        raise InputFileError(f"{path}: no such file", fix) from error
    except UnidentifiedImageError as error:  # Pillow's message names an object in memory, not the file
        raise InputFileError(f"{path}: cannot be read as a picture: it is none of {', '.join(names)}", fix) from error
    except (OSError, SyntaxError, ValueError, struct_error, Image.DecompressionBombError) as error:
        raise InputFileError(f"{path}: cannot be read as a picture: {printable(str(error))}", fix) from error
    comment, note = (
        value if isinstance(value := exif.get(tag), bytes) else b"" for tag in (_USER_COMMENT, _MAKER_NOTE)
    )
    return Said(
        comment.removeprefix(_UNICODE).decode("utf-16-be", "replace") if comment.startswith(_UNICODE) else None,
        note.removeprefix(_OURS).decode("utf-8", "replace") if note.startswith(_OURS) else None,
    )


def is_ours(path: Path) -> bool:
    """Whether sdrt made the file at `path`."""
    try:
        return read_said(path).ours is not None
    except InputFileError:
        return False


def parameters_of(path: Path, said: Said) -> dict[str, Any]:
    """The parameters that `encode` wrote, unchanged.

    Raises:
        InputFileError: sdrt did not write this picture.
    """
    fix = "Give a picture written by sdrt generate."
    if said.ours is None:
        other = "; --settings-from takes what AUTOMATIC1111's text says" if said.text is not None else ""
        raise InputFileError(f"{path}: does not say how sdrt made it{other}", fix)
    if said.ours == CONTACT_SHEET:
        raise InputFileError(
            f"{path}: a contact sheet, expected a picture", "Give the picture that generate wrote beside it."
        )
    try:
        parameters = json.loads(said.ours[:_MAX_CHUNK])
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path}: its settings are damaged: {printable(str(error))}", fix) from error
    if not isinstance(parameters, dict):
        raise InputFileError(f"{path}: its settings are damaged", fix)
    return parameters
