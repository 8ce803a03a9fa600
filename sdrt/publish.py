"""How sdrt writes: into a stage folder or file beside the target, flushed to disk, then renamed into place.

A failed or killed write leaves the target as it was. Serves every part of sdrt; standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdrt.errors import ResourceError, UsageError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def staged_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new empty folder that becomes `target` when the block ends without an exception.

    With `replace`, an existing `target` is exchanged atomically and then removed; the caller has made sure it may be.
    Stages that earlier, killed processes left beside the target are swept first.

    Raises:
        UsageError: `target` exists and `replace` is off, or its parent folder cannot be written.
        ResourceError: the disk is full or a write failed.
    """
    target = target.absolute()
    stage = stage_name(target)
    with _reported(target):
        _sweep(target)
        stage.mkdir()
    try:
        with _reported(target):
            yield stage
            _flush_tree(stage)
            if replace and target.exists():
                _exchange(stage, target)
            else:
                _rename_to_new(stage, target)
            _flush_folder(target.parent)
    finally:
        # After an exchange the stage holds the old folder; after an error, the unfinished one.
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`; what is written there replaces `target` atomically when the block ends without an exception."""
    target = target.absolute()
    stage = stage_name(target)
    try:
        with _reported(target):
            yield stage
            _flush_file(stage)
            stage.replace(target)
    finally:
        with suppress(OSError):
            stage.unlink()


def stage_name(target: Path) -> Path:
    """A new hidden name beside `target`, which a later sweep recognises once this process is gone."""
    return target.with_name(f".{target.name}-{os.getpid()}-{secrets.token_hex(4)}")


@contextmanager
def _reported(target: Path) -> Iterator[None]:
    """Turn an operating-system error into one that names the place and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE):
            free = shutil.disk_usage(target.parent).free if target.parent.exists() else 0
            raise ResourceError(f"{target}: {error.strerror}, {free:,} bytes free there", "Free some space or choose another --output.") from error
        if error.errno in (errno.ENOENT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
            raise UsageError(f"{target}: cannot write there: {error.strerror}", "Choose another --output; its folder must exist and be writable.") from error
        raise


def _flush_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    if sys.platform != "win32":
        _flush_file(path)


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _flush_folder(path)
        else:
            _flush_file(path)
    _flush_folder(folder)


def _rename_to_new(stage: Path, target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target}: exists already", "Choose another --output, or pass --force to replace a bundle.")
    stage.rename(target)


def _exchange(stage: Path, target: Path) -> None:
    """Swap the two folders in one step where the system can (Linux renameat2), else by renaming the old one aside."""
    if sys.platform == "linux":
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if rename is not None and rename(_AT_FDCWD, os.fsencode(stage), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
            return
    aside = stage.with_name(stage.name + ".old")
    try:
        target.rename(aside)
        stage.rename(target)
    except BaseException:
        if not target.exists():
            aside.rename(target)
        raise
    aside.rename(stage)


def _sweep(target: Path) -> None:
    """Remove stages of `target` whose process is gone. A folder set aside by a replacement that was cut short goes back in place."""
    if not target.parent.is_dir():
        return
    pattern = re.compile(re.escape(f".{target.name}-") + r"(\d+)-[0-9a-f]{8}(\.old)?")
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or path.is_symlink() or _alive(int(match[1])):
            continue
        if match[2] and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sweep_stages(folder: Path) -> None:
    """Remove what killed processes left in `folder`, whatever it was to become."""
    if folder.is_dir():
        found = (re.fullmatch(r"\.(.+)-\d+-[0-9a-f]{8}(\.old)?", path.name) for path in folder.iterdir())
        for name in {match[1] for match in found if match is not None}:
            _sweep(folder / name)


def cache_folder() -> Path:
    """Where sdrt keeps what it can make again: $SDRT_CACHE_DIR, else the user's cache folder."""
    if chosen := os.environ.get("SDRT_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "sdrt"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdrt"


def _alive(pid: int) -> bool:
    if sys.platform == "win32":
        return True  # signal 0 would end the process there; leave the stage for its owner
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's process, or a number that names none: not ours to sweep
        return True
    return True
