"""Locks between processes that only save double work: two builds of one output, two traces of one architecture.

Correctness never depends on them, since everything is published by rename. So where there can be no lock (a read-only
cache folder, a file system without locks, Windows) the work goes on without one. Standard library only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdrt.errors import LockedError, UsageError
from sdrt.files.publish import cache_folder

if sys.platform != "win32":
    import fcntl

TIMEOUT_S = 1800.0
_POLL_S = 0.05


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock on what is about to be written at `path`. While another process holds it, `waiting` is called again
    and again.

    The kernel releases a lock when its holder dies, however it dies. The lock lives on a file in the cache folder,
    which is removed at the end.

    Raises:
        LockedError: another process still holds the lock after half an hour, or $SDRT_LOCK_TIMEOUT seconds; the message
            names the process.
        UsageError: that variable is not a number.
    """
    deadline = time.monotonic() + _timeout_s()
    place = path.parent.resolve() / path.name
    descriptor = None
    try:
        while True:
            try:
                file = cache_folder() / "locks" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.lock"
                descriptor = _acquire(file)
            except OSError as error:
                logging.getLogger("sdrt").info("no lock on %s, going on without: %s", path, error)
                break
            if descriptor is not None:
                break
            if time.monotonic() >= deadline:
                raise LockedError(
                    f"{path}: {_holder(file)} is writing it, and was not done in time",
                    "Wait until it has finished, or stop it.",
                )
            waiting()
            time.sleep(_POLL_S)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                file.unlink()  # before the lock is released: whoever locks a file without a name tries again
            os.close(descriptor)


def _acquire(file: Path) -> int | None:
    """A descriptor that holds the lock; None while another process holds it. OSError where there are no locks."""
    if sys.platform == "win32":
        raise OSError("not on Windows")
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == file.stat().st_ino:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, b"%d" % os.getpid())
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _holder(file: Path) -> str:
    with suppress(OSError, ValueError):
        return f"process {int(file.read_text())}"
    return "another process"


def _timeout_s() -> float:
    text = os.environ.get("SDRT_LOCK_TIMEOUT", "")
    try:
        return float(text) if text else TIMEOUT_S
    except ValueError:
        raise UsageError(f"SDRT_LOCK_TIMEOUT={text}: expected seconds") from None
