"""The only writer. Everything that sdrt leaves on a disk is written into a stage beside the target, flushed, then
renamed into place.

A failed or killed write leaves the target as it was; what a killed process left is swept when the same target is next
written. Tests fail every operation on the file system in turn, through `at_point`. Serves every part of sdrt; standard
library only.
"""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from sdrt.errors import LockedError, ResourceError, UsageError

if sys.platform != "win32":
    import fcntl

at_point: Callable[[str, Path], bool] | None = None
"""Called before each operation on the file system, with its name and path. Only tests set it: what it raises fails the
operation, and true makes a write take half of its bytes. Nothing outside the process can.
"""
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100
_BUFFER_BYTES = 1 << 20
_STALE_S = 24 * 3600
_ATTEMPTS = 100
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE)


@contextmanager
def staged_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new empty folder that becomes `target` when the block ends without an exception.

    Fill it with `new_folder`, `new_file` and `write_file`. Write the file that lists the others last. With `replace`,
    an existing `target` is exchanged atomically and then removed; the caller has checked that it may be. Stages that
    killed processes left beside the target are swept first.

    Raises:
        UsageError: `target` exists and `replace` is off, or its parent folder cannot be written.
        ResourceError: the disk is full or a write failed.
    """
    with staged_folders(replace=replace) as staged, staged(target) as stage:
        yield stage


@contextmanager
def staged_folders(*, replace: bool = False) -> Iterator[Callable[[Path], AbstractContextManager[Path]]]:
    """Yield a function like `staged_folder`. All its targets appear together when this block ends. None appears if the
    block or one of its folders fails.

    If the process is killed between two renames, the targets renamed so far stay, each of them whole.

    Raises:
        UsageError, ResourceError: as `staged_folder`.
    """
    stages: list[tuple[Path, Path]] = []
    held: list[int] = []

    @contextmanager
    def staged(target: Path) -> Iterator[Path]:
        target = target.absolute()
        with _reported(target):
            _sweep(target)
            stages.append((stage := stage_name(target), target))
            new_folder(stage)
            if (descriptor := _hold(stage)) is not None:
                held.append(descriptor)
            yield stage
            _flush_tree(stage)

    try:
        yield staged
        _put_all_in_place(stages, replace)
        for target in {target.parent: target for _, target in stages}.values():
            with _reported(target):
                _flush(target.parent)
    finally:
        for descriptor in held:
            os.close(descriptor)
        for stage, _ in stages:
            # After an exchange the stage holds the old folder; after an error, the unfinished one.
            _remove_tree(stage)


@contextmanager
def staged_file(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a path beside `target`. The file that `write_file` or `new_file` puts there becomes `target` when the block
    ends without an exception.

    Raises:
        UsageError: the folder cannot be written, or a folder is in the way.
        FileExistsError: there is a file already, and `replace` is off.
        ResourceError: the disk is full or a write failed.
    """
    target = target.absolute()
    stage = stage_name(target)
    with suppress(OSError):
        _sweep(target)
    try:
        with _reported(target):
            yield stage
            _flush(stage)
            if replace:
                _point("rename", target)
                stage.replace(target)
            elif not _rename_to_new(stage, target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            _flush(target.parent)
    finally:
        with suppress(OSError):
            stage.unlink()


@contextmanager
def folders_made(option: str, folder: Path) -> Iterator[None]:
    """Make a missing folder, and its missing parents. If the block fails, the new folders are removed again, unless
    something is in them.

    Raises:
        UsageError: `folder`, the value of `option`, cannot be made.
        ResourceError: the disk is full.
    """
    line = [folder.absolute(), *folder.absolute().parents]
    there = next(place for place in line if os.path.lexists(place))
    if not there.is_dir():
        raise UsageError(f"{option} {folder}: {there} is no folder", "Choose another name.")
    made: list[Path] = []
    with _reported(folder):
        for missing in reversed(line[: line.index(there)]):
            with suppress(FileExistsError):  # another process was first
                new_folder(missing)
                made.append(missing)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for own in reversed(made):
                own.rmdir()
        raise


@contextmanager
def new_file(path: Path, size_bytes: int = 0) -> Iterator[BinaryIO]:
    """Open a file of a stage for writing. If its size is known, the room for it is taken at once, so that a full disk
    shows before the work.

    Nothing is flushed to disk yet. The stage does that for all its files before it is published.
    """
    _point("open", path)
    raw = (io.FileIO if at_point is None else _FaultyFile)(path, "wb")
    with io.BufferedWriter(raw, _BUFFER_BYTES) as stream:
        if size_bytes and sys.platform == "linux":
            with _unsupported_is_fine(f"{path.name} needs {size_bytes:,} bytes"):
                os.posix_fallocate(raw.fileno(), 0, size_bytes)
        yield cast(BinaryIO, stream)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file of a stage."""
    with new_file(path) as stream:
        stream.write(data)


def new_folder(path: Path) -> None:
    """Make a folder of a stage."""
    _point("mkdir", path)
    path.mkdir()


def remove_folder(folder: Path) -> None:
    """Remove a published folder in one step: readers see all of it or nothing."""
    aside = stage_name(folder)
    _point("rename", folder)
    folder.rename(aside)
    _remove_tree(aside)


def check_space(
    folder: Path, needed_bytes: int, what: str, fix: str = "Free some space there, or write somewhere else."
) -> None:
    """Fail before the work instead of during it.

    Raises:
        ResourceError: fewer than `needed_bytes` are free where `folder` lies; the message has both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ResourceError(f"{folder}: {what} needs about {needed_bytes:,} bytes, {free:,} are free there", fix)


def no_room(target: Path, error: OSError) -> ResourceError | None:
    """The error to report for an operating-system error at `target` that means a full or failing disk, or too many open
    files. None for any other error.
    """
    if error.errno not in _FULL:
        return None
    free = shutil.disk_usage(target.parent).free if target.parent.exists() else 0
    return ResourceError(
        f"{target}: {error.strerror}, {free:,} bytes free there", "Free some space there, or write somewhere else."
    )


def stage_name(target: Path) -> Path:
    """A new hidden name beside `target`. A later sweep recognises the name once this process is gone."""
    return target.with_name(f".{target.name}-{os.getpid()}-{secrets.token_hex(4)}")


def sweep_stages(folder: Path) -> None:
    """Remove the stages of killed processes in `folder`, whatever their targets."""
    if folder.is_dir():
        found = (re.fullmatch(r"\.(.+)-\d+-[0-9a-f]{8}(\.old)?", path.name) for path in folder.iterdir())
        for name in {match[1] for match in found if match is not None}:
            _sweep(folder / name)


def cache_folder() -> Path:
    """Where sdrt keeps files that it can make again: $SDRT_CACHE_DIR, else the user's cache folder.

    Raises:
        OSError: the user has no home folder, as in a container without a list of users.
    """
    if chosen := os.environ.get("SDRT_CACHE_DIR"):
        return Path(chosen)
    if known := os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"):
        return Path(known) / "sdrt"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "no home folder to keep a cache in; set $SDRT_CACHE_DIR") from error
    return (home / "AppData" / "Local" if sys.platform == "win32" else home / ".cache") / "sdrt"


class _FaultyFile(io.FileIO):
    """A file whose every write is a point."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if _point("write", Path(self.name)):
            view = view[: -(-len(view) // 2)]
        return super().write(view)


def _point(operation: str, path: Path) -> bool:
    return at_point is not None and at_point(operation, path)


@contextmanager
def _reported(target: Path) -> Iterator[None]:
    """Turn an operating-system error into one that names the place and the next step."""
    try:
        yield
    except OSError as error:
        if (full := no_room(target, error)) is not None:
            raise full from error
        if error.errno in (
            errno.ENOENT,
            errno.EACCES,
            errno.EROFS,
            errno.EPERM,
            errno.ENOTDIR,
            errno.EISDIR,
            errno.ENAMETOOLONG,
        ):
            raise UsageError(
                f"{target}: cannot write there: {error.strerror}",
                "Choose another --output, in a folder that may be written.",
            ) from error
        raise


@contextmanager
def _unsupported_is_fine(needed: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OSError(error.errno, f"{os.strerror(error.errno)}: {needed}") from error


def _flush(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return
    _point("fsync", path)
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _flush(path)
    _flush(folder)


def _renameat2(old: Path, new: Path, flags: int) -> int:
    """Linux's rename with flags. Returns 0, or the error's number; ENOSYS where the system has no such call."""
    if sys.platform != "linux":
        return errno.ENOSYS
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return errno.ENOSYS
    return (
        ctypes.get_errno() or errno.EINVAL
        if rename(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags)
        else 0
    )


def _put_all_in_place(stages: Sequence[tuple[Path, Path]], replace: bool) -> None:
    """Put each stage in place of its target. If one fails, take the others back."""
    placed: list[tuple[Path, Path]] = []
    try:
        for stage, target in stages:
            with _reported(target):
                _put_in_place(stage, target, replace)
            placed.append((stage, target))
    except BaseException:
        for stage, target in reversed(placed):
            with suppress(OSError):
                if stage.exists():  # the old folder
                    _exchange(stage, target)
                else:
                    target.rename(stage)
        raise


def _put_in_place(stage: Path, target: Path, replace: bool) -> None:
    """Rename the stage to its target, or exchange the two. Other processes may do the same at the same time; the last
    one wins.
    """
    for _ in range(_ATTEMPTS):
        if replace and target.exists():
            with suppress(FileNotFoundError):
                return _exchange(stage, target)
        elif _rename_to_new(stage, target):
            return None
        elif not replace:
            raise UsageError(
                f"{target}: exists already", "Choose another --output, or pass --force to replace a bundle."
            )
    raise LockedError(f"{target}: other processes keep replacing it", "Run one build of an output at a time.")


def _rename_to_new(stage: Path, target: Path) -> bool:
    """Rename the stage to a free name; false if the name is taken."""
    _point("rename", target)
    code = _renameat2(
        stage, target, _RENAME_NOREPLACE
    )  # a plain rename would replace an empty folder that has just appeared
    if code and code != errno.EEXIST and not os.path.lexists(target):
        stage.rename(target)
        return True
    return not code


def _exchange(stage: Path, target: Path) -> None:
    """Swap the two folders in one step where the system can (Linux renameat2). Elsewhere the old one is renamed aside
    first.
    """
    _point("exchange", target)
    code = _renameat2(stage, target, _RENAME_EXCHANGE)
    if code == 0:
        return
    if code == errno.ENOENT:
        raise FileNotFoundError(code, os.strerror(code), str(target))
    aside = stage.with_name(stage.name + ".old")
    try:
        target.rename(aside)
        _point("rename", target)
        stage.rename(target)
    except BaseException:
        if not target.exists():
            aside.rename(target)
        raise
    aside.rename(stage)


def _remove_tree(stage: Path) -> None:
    """Remove a stage. A later sweep removes what cannot be removed now."""
    with suppress(OSError):
        _point("remove", stage)
        shutil.rmtree(stage, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove abandoned stages of `target`. If a replacement was cut short after it had set the old folder aside, that
    folder goes back in place.
    """
    if not target.parent.is_dir():
        return
    pattern = re.compile(re.escape(f".{target.name}-") + r"(\d+)-[0-9a-f]{8}(\.old)?")
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or path.is_symlink() or not _abandoned(path, int(match[1])):
            continue
        if match[2] and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        logging.getLogger("sdrt").info("swept %s, which a killed process left", path)


def _hold(stage: Path) -> int | None:
    """Lock a stage while the descriptor is open. Without the lock a process in another container would sweep it,
    because our process number names nobody there.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(stage, os.O_RDONLY)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _abandoned(stage: Path, pid: int) -> bool:
    """Whether nobody works in a stage: its process is gone, and so is its lock. After a day only the lock counts,
    because process numbers are used again.
    """
    if sys.platform == "win32" or not stage.is_dir():
        return not _alive(pid)
    try:
        descriptor = os.open(stage, os.O_RDONLY)
    except OSError:  # another user's, or another process has just swept it
        return False
    try:
        changed_s = os.fstat(descriptor).st_mtime  # the name may be gone the next moment
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        return not _alive(pid)
    finally:
        os.close(descriptor)
    return not _alive(pid) or (pid != os.getpid() and time.time() - changed_s > _STALE_S)


def _alive(pid: int) -> bool:
    if sys.platform == "win32":
        return True  # signal 0 would end the process there, so leave the stage to its owner
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process, or a number that names none: not ours to sweep
        return True
    return True
