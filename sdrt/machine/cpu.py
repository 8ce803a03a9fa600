"""What this machine and its processor are, and how many of its cores this process may use. Standard library only."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path

from sdrt.errors import UsageError, printable

CORES = ("own", "shared")
"""Whether the cores belong to this process alone ("own"), or other processes keep them busy too ("shared"). On shared
cores, threads sleep instead of spinning while they wait, may move to another core, and take over each other's work.
"""

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# The flags by which inference libraries choose their kernels. An engine depends on no other flag.
_KERNEL_FLAGS = re.compile(r"sse4_2|avx|avx2|fma|f16c|avx_\w+|avx512\w*|amx_\w+|asimd\w*|sve\w*|bf16|i8mm")


@cache
def cpu_identity() -> str:
    """The model and the instruction sets by which kernels are chosen, such as "AMD EPYC 9B45 (avx avx2 avx512_bf16
    avx512f)". Without commas.
    """
    name, flags = "", set[str]()
    try:
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            field, _, value = line.partition(":")
            if field.strip() == "model name":
                name = name or value.strip()
            elif field.strip() in ("flags", "Features"):
                flags |= {flag for flag in value.split() if _KERNEL_FLAGS.fullmatch(flag)}
    except OSError:  # not Linux
        pass
    name = printable(name or platform.processor() or platform.machine()).replace(",", "")
    return f"{name} ({' '.join(sorted(flags))})" if flags else name


def platform_name() -> str:
    """This machine's operating system and processor, such as linux-x86_64."""
    machine = platform.machine().lower()
    return f"{platform.system().lower()}-{'x86_64' if machine == 'amd64' else machine}"


def bound_cores() -> int:
    """How many cores this process is bound to: all cores of the machine if it is not bound."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores() -> int:
    """How many cores this process may keep busy: those it is bound to, or as many as its container's quota pays for,
    whichever is fewer; at least 1.
    """
    cores, quota = bound_cores(), _quota()
    return max(1, cores if quota is None else min(cores, quota))


def _quota() -> int | None:
    """Whole cores that the container's quota pays for, rounded up; None without a quota."""
    try:
        limit, period = _CGROUP_QUOTA.read_text().split()
        return None if limit == "max" else -(-int(limit) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def check_threads(threads: int | None) -> None:
    """Raise UsageError for more threads than cores. Such threads would take turns and be slower than fewer threads."""
    cores = usable_cores()
    if threads is not None and threads > cores:
        raise UsageError(
            f"threads {threads}: this process may use {cores} core{'s' * (cores > 1)}",
            f"Choose 1 to {cores}, or leave the choice to the engine.",
        )
