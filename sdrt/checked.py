"""Remembers which files of weights have been found to have the hash they should have, so that a start need not read gigabytes that nobody touched.

What is remembered is what the file system says of the file: device, inode, size, and the times of its last change, to the nanosecond; the second of
these times is the kernel's own, which nobody but root can set back. What this does not show is a byte that the disk itself lost, and one changed through
a shared mapping that has stayed open since before the check: `sdrt verify` reads everything, always. Standard library only.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sdrt.bundle.folder import Bundle, check_files
from sdrt.document import read_document
from sdrt.errors import SdrtError
from sdrt.publish import cache_folder, staged_file, write_file

_MAX_BYTES = 1 << 12
_SETTLED_NS = 2_000_000_000
"""A file changed more recently than this is read again next time: a second change within one tick of the file system's clock would not show."""


def check_file(bundle: Bundle, name: str) -> None:
    """Compare a file's SHA-256 with the manifest, unless it was found right before and has not changed since.

    Raises:
        BundleError: the file differs.
    """
    check_once(bundle.file(name), bundle.manifest.files[name].sha256, lambda: check_files(bundle, [name]))


def check_once(path: Path, sha256: str, check: Callable[[], None]) -> None:
    """Call `check`, which reads a file and raises if it has another hash, unless the file was found right before and has not changed since."""
    seen = _identity(path)
    if seen is not None and _remembered(seen) == sha256:
        return
    check()
    if seen is not None and seen == _identity(path):  # nor has it changed while it was read
        try:
            _place(seen).parent.mkdir(parents=True, exist_ok=True)
            with staged_file(_place(seen)) as stage:
                write_file(stage, f"{seen} {sha256}\n".encode())
        except (OSError, SdrtError) as error:  # it only saves time
            logging.getLogger("sdrt").info("not remembered that %s is unchanged: %s", path, error)


def _identity(path: Path) -> str | None:
    """What changes with a file's contents, as text; None where the system does not tell, or it has just changed."""
    if os.name != "posix":  # elsewhere st_ctime is another thing
        return None
    try:
        found = path.stat()
    except OSError:  # gone: reading it says so
        return None
    newest = max(found.st_mtime_ns, found.st_ctime_ns)
    if newest > time.time_ns() - _SETTLED_NS:
        return None
    return f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _remembered(identity: str) -> str | None:
    with suppress(OSError, ValueError, SdrtError):
        known, _, digest = read_document(_place(identity), _MAX_BYTES).data.decode("ascii").rstrip("\n").rpartition(" ")
        if known == identity:
            return digest
    return None


def _place(identity: str) -> Path:
    device, inode, _ = identity.split(" ", 2)
    return cache_folder() / "checked" / f"{device}-{inode}"
