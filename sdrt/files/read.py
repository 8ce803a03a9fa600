"""Small files from the user (JSON, TOML, keys, text), each read whole and only once. A build checks at its end that
they have not changed meanwhile.

This file limits their size, and refuses a pipe, device or folder in their place at once. Serves every part of sdrt;
standard library only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdrt.errors import InputFileError, printable

_UNSIZED_BYTES = 1 << 16
"""How many bytes are read of a file of /proc, whose stated size is always 0."""
_MAX_DIGITS = 18


@dataclass(frozen=True)
class Document:
    """A small file as it was when it was read."""

    path: Path
    data: bytes
    limit: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def check_unchanged(self) -> None:
        """Raise InputFileError if the file has changed since it was read."""
        try:
            same = read_document(self.path, self.limit) == self
        except (OSError, InputFileError):
            same = False
        if not same:
            raise InputFileError(
                f"{self.path}: changed during the build", "Run the build again when nothing writes to the file."
            )


def read_document(path: Path, limit: int, fix: str = "", kind: type[InputFileError] = InputFileError) -> Document:
    """Read a regular file of at most `limit` bytes. A link to one is followed.

    Raises:
        FileNotFoundError: there is no such file.
        InputFileError, or the `kind` asked for: it cannot be read, is no regular file, or is larger.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise kind(f"{path}: cannot open: {error.strerror if isinstance(error, OSError) else error}", fix) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise kind(
                f"{path}: expected a file, found"
                f" {'a folder' if stat.S_ISDIR(status.st_mode) else 'a device, pipe or socket'}",
                fix,
            )
        if status.st_size > limit:
            raise kind(f"{path}: {status.st_size:,} bytes, more than the limit of {limit:,} bytes", fix)
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            room = min(limit, max(status.st_size, _UNSIZED_BYTES))
            data = stream.read(room + 1) or b""  # None: a file of /proc without anything to read yet
    except OSError as error:
        raise kind(f"{path}: cannot be read: {printable(str(error.strerror))}", fix) from error
    finally:
        os.close(descriptor)
    if len(data) > room:
        raise kind(f"{path}: more than {room:,} bytes, which its size does not say", fix)
    return Document(path, data, limit)


def read_given(path: Path, limit: int, fix: str) -> Document:
    """`read_document` for a file that must exist.

    Raises:
        InputFileError: there is none, it cannot be read, is no regular file, or is larger.
    """
    try:
        return read_document(path, limit, fix)
    except FileNotFoundError as error:
        raise InputFileError(f"{path}: cannot be read: {error.strerror}", fix) from error


def strict_json(data: bytes) -> Any:
    """The value of a JSON text. Names are unique within an object, every number is finite, and a whole number has at
    most 18 digits.

    Raises:
        ValueError, RecursionError: the text is something else.
    """
    return json.loads(data, object_pairs_hook=unique, parse_int=_whole, parse_float=_finite, parse_constant=_finite)


class DuplicateKeyError(ValueError):
    """A name that stands twice in one JSON object. `name` is the name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"duplicate keys: {name}")
        self.name = name


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of these pairs, for `object_pairs_hook`.

    Raises:
        DuplicateKeyError: a name stands there twice.
    """
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise DuplicateKeyError(name)
        result[name] = value
    return result


def _whole(text: str) -> int:
    if len(text.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]}, expected a finite one")
    return number
