"""The bundles in the user's cache folder: which there are, which of them are in use, and which go when there are too
many.

`bundles/<key>/NAME.sdrt`, where the key stands for everything that shapes the bundle; `sdrt.cached_bundle` makes it. An
entry was last used when its folder was last changed. Whoever uses it holds a lock on that folder. It appears and goes
by a rename, so that nobody meets a part of it. Standard library only.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sdrt.bundle.folder import IN_CACHE, open_bundle
from sdrt.bundle.manifest import Source
from sdrt.errors import BundleError, SdrtError, UsageError
from sdrt.files.publish import cache_folder, remove_folder, staged_file, sweep_stages, write_file
from sdrt.files.read import read_document

if sys.platform != "win32":
    import fcntl

DEFAULT_LIMIT_BYTES = 20_000_000_000
"""Two bundles of SDXL's size and three of Stable Diffusion 1.5's."""
VARIABLE = "SDRT_CACHE_LIMIT"
ELSEWHERE = "Set SDRT_CACHE_DIR to a folder that may be written."
_LIMIT = "bundles.limit"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Entry:
    """A bundle in the cache. `used_s` is when it was last used, in seconds since 1970. `problem` says why it cannot be
    used; its sources are not known then.
    """

    folder: Path
    name: str
    bundle: Path | None
    size_bytes: int
    used_s: float
    sources: tuple[Source, ...] = ()
    problem: str = ""

    @property
    def key(self) -> str:
        return self.folder.name


def bundles_folder() -> Path:
    """The folder of all entries.

    Raises:
        UsageError: the user has no home folder, and no other place is set.
    """
    try:
        return cache_folder() / IN_CACHE
    except OSError as error:
        raise UsageError(f"no cache: {error.strerror}", ELSEWHERE) from error


@contextmanager
def in_use(folder: Path) -> Iterator[Path | None]:
    """Yield the bundle of an entry, or None where there is no entry. It stays until the block ends, whoever else needs
    room.

    Raises:
        BundleError, InputFileError, MachineError: the bundle is damaged.
    """
    descriptor = _hold(folder)
    try:
        bundle = _bundle_in(folder)
        if bundle is not None:
            open_bundle(bundle)
            with suppress(OSError):  # a cache that may only be read
                os.utime(folder)
        yield bundle
    finally:
        if descriptor is not None:
            os.close(descriptor)


def entries() -> list[Entry]:
    """Every bundle in the cache, last used first. What killed processes left is removed.

    Raises:
        UsageError: as `bundles_folder`; or the folder cannot be read.
    """
    root = bundles_folder()
    try:
        sweep_stages(root.parent)
        sweep_stages(root)
        folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{root}: cannot be read: {error.strerror}", ELSEWHERE) from error
    found = [entry for folder in folders if (entry := _entry(folder)) is not None]
    return sorted(found, key=lambda entry: (-entry.used_s, entry.key))


def remove(entry: Entry) -> bool:
    """Remove an entry in one step. False if a process uses it.

    Raises:
        UsageError: it may not be removed.
    """
    try:
        descriptor = os.open(entry.folder, os.O_RDONLY) if sys.platform != "win32" else None
    except FileNotFoundError:
        return True
    except OSError as error:
        raise _not_removed(entry.folder, error) from error
    try:
        if descriptor is not None:
            with suppress(OSError):  # no locks on this file system
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
        with suppress(FileNotFoundError):
            remove_folder(entry.folder)
        return True
    except OSError as error:
        raise _not_removed(entry.folder, error) from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


def others() -> dict[Path, int]:
    """The folders of whatever else the cache keeps, each of a kind that can be made again, and their bytes."""
    root = bundles_folder().parent
    if not root.is_dir():
        return {}
    kinds = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {path: _bytes_below(path) for path in kinds if path.name not in (IN_CACHE, "locks")}


def remove_others() -> int:
    """Remove all of `others`. Returns how many bytes that were.

    Raises:
        UsageError: one may not be removed.
    """
    found = others()
    for folder in found:
        try:
            remove_folder(folder)
        except OSError as error:
            raise _not_removed(folder, error) from error
    return sum(found.values())


def keep_to_limit(newest: Path | None = None) -> list[Entry]:
    """Remove the entries that have not been used for longest, until the rest is within the limit. Those in use stay,
    and so does the `newest`. Returns what was removed.

    Raises:
        UsageError: the limit is no size, or an entry may not be removed.
    """
    limit, removed = limit_bytes(), list[Entry]()
    found = entries()
    total = sum(entry.size_bytes for entry in found)
    for entry in reversed(found):
        if limit is None or total <= limit:
            break
        if entry.folder != newest and remove(entry):
            total -= entry.size_bytes
            removed.append(entry)
    return removed


def limit_bytes() -> int | None:
    """How much all bundles in the cache may take: what $SDRT_CACHE_LIMIT says, else what `set_limit` has kept, else 20
    GB. None is any amount.

    Raises:
        UsageError: what one of them says is no size.
    """
    if chosen := os.environ.get(VARIABLE):
        return _parse(chosen, VARIABLE)
    path = bundles_folder().with_name(_LIMIT)
    if not os.path.exists(path):
        return DEFAULT_LIMIT_BYTES
    return _parse(read_document(path, 1 << 10).data.decode(errors="replace").strip(), str(path))


def set_limit(text: str) -> None:
    """Keep what all bundles in the cache may take, such as 20GB, or none for any amount.

    Raises:
        UsageError: it is no size, or the cache folder cannot be written.
        ResourceError: the disk is full.
    """
    _parse(text, "limit")
    root = bundles_folder().parent
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{root}: cannot be made: {error.strerror}", ELSEWHERE) from error
    with staged_file(root / _LIMIT) as stage:
        write_file(stage, text.strip().encode() + b"\n")


def _parse(text: str, what: str) -> int | None:
    if text.strip().lower() == "none":
        return None
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{what} {text!r}: expected a size", "Write it as 20GB or 500MB, or none for no limit.")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def _hold(folder: Path) -> int | None:
    """A descriptor that keeps an entry from being removed while it is open. None where there is no entry."""
    if sys.platform == "win32":
        return None
    while True:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:
            return None
        try:
            with suppress(OSError):  # no locks on this file system
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        except FileNotFoundError:  # removed while we waited for the lock
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _bundle_in(folder: Path) -> Path | None:
    """The bundle in an entry's folder. None where there is no such folder.

    Raises:
        BundleError: it is not alone there, or is not there.
    """
    try:
        found = [path for path in folder.iterdir() if path.suffix == ".sdrt"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BundleError(f"{folder}: cannot be read: {error.strerror}") from error
    if len(found) != 1:
        raise BundleError(f"{folder}: expected one bundle, found {len(found)}")
    return found[0]


def _entry(folder: Path) -> Entry | None:
    """What is in an entry's folder. None if it has just been removed."""
    bundle, problem, sources = None, "", tuple[Source, ...]()
    try:
        used_s = folder.stat().st_mtime
        bundle = _bundle_in(folder)
        if bundle is None:
            return None
        sources = open_bundle(bundle).manifest.sources
    except FileNotFoundError:
        return None
    except SdrtError as error:
        problem = error.message
    name = folder.name if bundle is None else bundle.name.removesuffix(".sdrt")
    return Entry(folder, name, bundle, _bytes_below(folder), used_s, sources, problem)


def _bytes_below(folder: Path) -> int:
    """The sizes of all files below a folder, as far as they can be read."""
    total = 0
    for below, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(below, name).lstat().st_size
    return total


def _not_removed(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"{folder}: cannot be removed: {error.strerror}", "Remove it as the user who made it.")
