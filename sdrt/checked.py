"""Remembers which files of weights have been found to have the hash they should have, so that a start need not read gigabytes that nobody touched.

What is remembered is what the file system says of the file: device, inode, size, and the times of its last change, to the nanosecond; the second of
these times is the kernel's own, which nobody but root can set back. That holds where this kernel alone writes to the disk: so nothing is remembered but
on the file systems of `/` and of the home folder, where they are of a kind that this kernel keeps itself, and nothing beyond the next start of the system.
What this does not show is a byte that the disk itself lost, and one changed through a shared mapping that has stayed open since before the check:
`sdrt verify` reads everything, always. Standard library only.
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

from sdrt.bundle.folder import Bundle, check_files
from sdrt.document import read_document
from sdrt.errors import SdrtError
from sdrt.publish import cache_folder, staged_file, write_file

_MAX_BYTES = 1 << 12
_SETTLED_NS = 2_000_000_000
"""A file changed more recently than this is read again next time: a second change within one tick of the file system's clock would not show."""


_BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Another one at each start of the system: what was changed on a disk while the system was off shows no other time."""
_OWN_KINDS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs", "overlay", "tmpfs")
"""File systems whose times are this kernel's own. Of FUSE and the network a server gives them, and others have no time of the last change."""


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
    """What changes with a file's contents, as text; None where the system does not tell, its word cannot be trusted, or it has just changed."""
    if sys.platform != "linux":
        return None
    try:
        found = path.stat()
        boot = _BOOT.read_text("ascii").strip()
        if not stat.S_ISREG(found.st_mode) or found.st_dev not in _own_devices() or not _kept_by_this_kernel(path):
            return None
    except (OSError, ValueError):  # gone: reading it says so
        return None
    newest = max(found.st_mtime_ns, found.st_ctime_ns)
    if newest > time.time_ns() - _SETTLED_NS:
        return None
    return f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {boot}"


def _own_devices() -> set[int]:
    """Devices of `/` and of the home folder: others come and go, and what comes may have the number, inodes and times of what went."""
    devices = {Path("/").stat().st_dev}
    with suppress(OSError, RuntimeError):
        devices.add(Path.home().stat().st_dev)
    return devices


def _kept_by_this_kernel(path: Path) -> bool:
    kind, source = _mount(path)
    return kind in _OWN_KINDS and not source.startswith("/dev/loop")


def _mount(path: Path) -> tuple[str, str]:
    """Kind and source of the file system that a file lies on, such as ext4 and /dev/sda1; ValueError where the system does not tell."""
    descriptor = os.open(path, os.O_PATH)
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text("ascii").splitlines())
    finally:
        os.close(descriptor)
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
