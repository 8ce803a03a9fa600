"""Files that sdrt can make again, kept in the user's cache folder under a key of everything that shapes them.

The cache only saves time: an entry that is missing or damaged is made again, and a cache that cannot be written fails
nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from sdrt.errors import LockedError
from sdrt.files.lock import locked
from sdrt.files.publish import cache_folder, staged_folder, write_file

log = logging.getLogger("sdrt")
_DATA, _HASH = "data", "sha256"


def cache_key(parts: Mapping[str, Any]) -> str:
    """A key made of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def is_cached(kind: str, key: str) -> bool:
    """Whether an intact entry is there."""
    return read_entry(kind, key) is not None


def read_entry(kind: str, key: str) -> bytes | None:
    """An entry. None if it is missing or damaged, or there is no cache."""
    with suppress(OSError):
        return _read(cache_folder() / kind / key)
    return None


def write_entry(kind: str, key: str, data: bytes) -> None:
    """Put an entry in the place of the one that is there, if any. Of several processes that do, the last one wins."""
    with suppress(OSError):
        _write(cache_folder() / kind / key, data)


def cached(kind: str, key: str, make: Callable[[], bytes]) -> tuple[bytes, bool]:
    """The entry `key` of a kind, which `make` makes if it is not there. The flag says whether it was.

    Processes that want the same entry wait for the one that makes it.
    """
    try:
        folder = cache_folder() / kind / key
    except OSError as error:
        log.info("no cache: %s", error)
        return make(), False
    if (data := _read(folder)) is not None:
        return data, True
    with ExitStack() as stack:
        with suppress(LockedError):  # another process has been making it for very long: make it here too
            stack.enter_context(locked(folder))
        if (data := _read(folder)) is not None:
            return data, True
        data = make()
        _write(folder, data)
    return data, False


def _write(folder: Path, data: bytes) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with staged_folder(folder, replace=folder.exists()) as stage:
            write_file(stage / _DATA, data)
            write_file(stage / _HASH, hashlib.sha256(data).hexdigest().encode() + b"\n")
    except Exception as error:  # a full disk there, or a process that was faster
        log.info("cache not written: %s: %s", folder, error)


def _read(folder: Path) -> bytes | None:
    """The data of an entry. None if the entry is missing or damaged."""
    try:
        data = (folder / _DATA).read_bytes()
        intact = hashlib.sha256(data).hexdigest() == (folder / _HASH).read_text().strip()
    except (OSError, ValueError):
        return None
    return data if intact else None
