"""Remembers the hashes of large files (a bundle's weights, the files that bundles are built from), so that a start need
not read gigabytes that nobody touched.

A file is recognised by what the file system says about it: device, inode, size, and two times in nanoseconds, those of
the last change of its content (mtime) and of its state (ctime). The kernel sets the second time itself, and only root
can set it back. This can be trusted only where no other kernel writes to the disk. So a file is remembered only on the
file systems of `/` and of the home folder, only if their kind is one that this kernel keeps itself, and only until the
next start of the system.

Two kinds of change stay unseen: a byte that the disk itself lost, and a change through a shared mapping that has been
open since before the check. `sdrt verify` always reads everything. Standard library only.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event

from sdrt.bundle.folder import Bundle, check_files, file_record
from sdrt.errors import SdrtError
from sdrt.files.publish import cache_folder, staged_file, write_file
from sdrt.files.read import read_document

_MAX_BYTES = 1 << 12
_SETTLED_NS = 2_000_000_000
"""A file changed more recently than this is read again at the next start. A second change within one tick of the file
system's clock would not show.
"""


_BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Differs after each start of the system. A change to a disk while the system was off leaves no other trace in the
times.
"""
_OWN_KINDS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs", "overlay", "tmpfs")
"""File systems whose times come from this kernel. On FUSE and network file systems a server gives the times; others
have no ctime.
"""


def check_file(bundle: Bundle, name: str, stop: Event | None = None) -> None:
    """Compare a file's SHA-256 with the manifest, unless the file passed before and has not changed since.

    Raises:
        BundleError: the file differs.
        CancelledError: `stop` was set before the end.
    """
    check_once(bundle.file(name), bundle.manifest.files[name].sha256, lambda: check_files(bundle, [name], stop))


def check_once(path: Path, sha256: str, check: Callable[[], None]) -> None:
    """Call `check`, unless the file passed before and has not changed since. `check` reads the file and raises if its
    hash is another.
    """
    seen = _identity(path)
    if seen is not None and _remembered(seen) == sha256:
        return
    check()
    _remember(path, seen, sha256)


def sha256_of(path: Path, reading: Callable[[], None] = lambda: None) -> str:
    """A file's SHA-256: as it was found before, unless the file has changed since; else `reading` is called, and the
    file is read.

    Raises:
        OSError: it cannot be read.
    """
    seen = _identity(path)
    if seen is not None and (known := _remembered(seen)) is not None:
        return known
    reading()
    found = file_record(path).sha256
    _remember(path, seen, found)
    return found


def _remember(path: Path, seen: str | None, sha256: str) -> None:
    """Keep the hash of a file that was `seen` before it was read, unless it has changed since then."""
    if seen is None or seen != _identity(path):
        return
    try:
        _place(seen).parent.mkdir(parents=True, exist_ok=True)
        with staged_file(_place(seen)) as stage:
            write_file(stage, f"{seen} {sha256}\n".encode())
    except (OSError, SdrtError) as error:  # remembering only saves time
        logging.getLogger("sdrt").info("the hash of %s is not remembered: %s", path, error)


def _identity(path: Path) -> str | None:
    """A text that changes with a file's content. None where the system does not tell, cannot be trusted, or where the
    file has just changed.
    """
    if sys.platform != "linux":
        return None
    try:
        descriptor = os.open(path, os.O_PATH)
        try:
            found, trusted = os.fstat(descriptor), changes_show(descriptor)
        finally:
            os.close(descriptor)
        boot = _BOOT.read_text("ascii").strip()
    except OSError:  # the file is gone; reading it reports that
        return None
    if not trusted or found.st_dev not in _own_devices():
        return None
    return f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {boot}"


def changes_show(descriptor: int) -> bool:
    """Whether every change of an open file from now on will show in its size or its two times: it is a regular file,
    this kernel keeps the times, and none was set so lately that the next could be the same.
    """
    if sys.platform != "linux":
        return False
    try:
        found = os.fstat(descriptor)
        kind, source = _mount(descriptor)
    except (OSError, ValueError):
        return False
    settled = max(found.st_mtime_ns, found.st_ctime_ns) <= time.time_ns() - _SETTLED_NS
    return settled and stat.S_ISREG(found.st_mode) and kind in _OWN_KINDS and not source.startswith("/dev/loop")


def _own_devices() -> set[int]:
    """Devices of `/` and of the home folder. Other disks come and go, and a new disk may repeat the number, inodes and
    times of an old one.
    """
    devices = {Path("/").stat().st_dev}
    with suppress(OSError, RuntimeError):
        devices.add(Path.home().stat().st_dev)
    return devices


def _mount(descriptor: int) -> tuple[str, str]:
    """Kind and source of the file system of an open file, such as ext4 and /dev/sda1. ValueError where the system does
    not tell.
    """
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text("ascii").splitlines()
    )
    number = fields.get("mnt_id", "").strip()
    for line in Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines():
        mount, _, system = line.partition(" - ")
        if mount.split(" ", 1)[0] == number:
            kind, source, _ = system.split(" ", 2)
            return kind, source
    raise ValueError("no such mount")


def _remembered(identity: str) -> str | None:
    with suppress(OSError, ValueError, SdrtError):
        known, _, digest = read_document(_place(identity), _MAX_BYTES).data.decode("ascii").rstrip("\n").rpartition(" ")
        if known == identity:
            return digest
    return None


def _place(identity: str) -> Path:
    device, inode, _ = identity.split(" ", 2)
    return cache_folder() / "checked" / f"{device}-{inode}"
