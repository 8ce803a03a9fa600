"""Describes the machine of a benchmark, as far as this needs no privileges, and without a host name. Standard library
only.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

_JOB_URL = ("CI_JOB_URL", "BUILD_URL")


@cache
def environment() -> dict[str, Any]:
    """Python, system, processor and load. Unknown values are None."""
    return {
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "os": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": _memory_bytes(),
        "governor": _first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "container": any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv")),
        "hypervisor": "hypervisor" in (_cpuinfo("flags") or "").split(),
        "ci_job": _ci_job(os.environ),
    }


def load() -> dict[str, float | None]:
    """Load average of the last minute, and the time that other guests took from this one so far, in seconds."""
    average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    fields = (_first_line(Path("/proc/stat")) or "").split()
    steal = int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 and fields[8].isdecimal() else None
    return {"load_1min": average, "steal_s": steal}


@cache
def git_revision() -> str | None:
    """Commit of the working folder, with `+` if files differ from it. Without a repository, the commit as CI names
    it.
    """
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
        return found + "+" * bool(changed)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("GITHUB_SHA") or os.environ.get("CI_COMMIT_SHA")


def _ci_job(variables: Mapping[str, str]) -> str | None:
    if {"GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID"} <= variables.keys():
        return "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}/actions/runs/{GITHUB_RUN_ID}".format_map(variables)
    return next((variables[name] for name in _JOB_URL if name in variables), None)


def _cpuinfo(field: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), None)


def _cpu_model() -> str | None:
    if sys.platform == "darwin":
        try:
            return subprocess.run(
                ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None
    return _cpuinfo("model name") or platform.processor() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").partition("\n")[0].strip()
    except OSError:
        return None
