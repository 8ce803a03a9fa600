"""How much memory this process has taken, and how much more it may take. Serves compile, runtime and bench; standard
library only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_DONTNEED = 4  # MADV_DONTNEED of madvise(2)
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not say. On Linux this is the count
    for the program itself; `getrusage` would start from the parent's memory.
    """
    if (peak := _status_bytes("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def rss_bytes() -> int | None:
    """Resident memory of this process now, None where the system does not say."""
    return _status_bytes("VmRSS")


def available_bytes() -> int | None:
    """How much more this process may take before the system runs out of memory or ends the process. None where the
    system does not say, as outside of Linux.

    This is the smallest of several numbers: the free memory of the machine, swap included, and the room under the limit
    of each control group around the process, such as a container's. Files that are only cached count as free, because
    the kernel drops them first.
    """
    machine = _fields(_PROC / "meminfo", "kB")
    if "MemAvailable" not in machine:
        return None
    swap = machine.get("SwapFree", 0)
    return max(0, min([machine["MemAvailable"] + swap, *(left + swap for left in _left_by_groups())]))


def unload_mapped(path: Path) -> None:
    """Take the pages of a file out of this process's memory where they are mapped to be read only. The file stays
    mapped: a page that is read again comes back, as a rule from the system's cache. Does nothing outside of Linux.
    """
    if sys.platform != "linux":
        return
    import ctypes

    name = str(path.resolve())
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with suppress(OSError):
        for line in (_PROC / "self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            fields = line.split(maxsplit=5)
            # A page that can be written may hold what the file does not.
            if len(fields) == 6 and fields[5] == name and fields[1].startswith("r--"):
                first, last = (int(end, 16) for end in fields[0].split("-"))
                madvise(first, last - first, _DONTNEED)


def _left_by_groups() -> Iterator[int]:
    """The room that each control group around this process leaves, for both versions of control groups."""
    with suppress(OSError, ValueError):  # ValueError: a system with another form of these files
        for line in (_PROC / "self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = _CGROUPS / "memory" if controllers else _CGROUPS
            limit, used = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
            )
            inside = root / path.strip("/")
            # A container sees its own group as the root, under a path that may be the host's.
            for group in (folder for folder in (inside, *inside.parents) if folder == root or root in folder.parents):
                with suppress(OSError, ValueError):  # ValueError: "max", which is no limit
                    most = int((group / limit).read_text())
                    cached = _fields(group / "memory.stat")
                    prefix = "total_" if controllers else ""
                    yield (
                        most
                        - int((group / used).read_text())
                        + sum(cached.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
                    )


def _status_bytes(name: str) -> int | None:
    return _fields(_PROC / "self/status", "kB").get(name)


def _fields(path: Path, unit: str = "") -> dict[str, int]:
    """The numbers in a file of names and numbers, in bytes. With a `unit`, only the lines that have this unit. Empty
    where the file cannot be read.
    """
    found: dict[str, int] = {}
    with suppress(OSError):
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            parts = line.split()
            if len(parts) == 2 + bool(unit) and parts[1].isdecimal() and (not unit or parts[2] == unit):
                found[parts[0].rstrip(":")] = int(parts[1]) * (1024 if unit else 1)
    return found
