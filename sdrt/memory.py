"""How much memory this process has taken, and how much is left. Serves compile and bench; standard library only."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process, None where the system does not say. Linux's own count for the program; `getrusage` starts from what the
    parent had."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """Memory that another process may take before something is pushed out: the system's, or what the control group leaves. None where neither tells."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit.isdecimal():
            cache = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()).get("inactive_file", "0")
            found.append(int(limit) - int((group / "memory.current").read_text(encoding="ascii")) + int(cache))
    except (OSError, ValueError):
        pass
    return min(found, default=None)
