"""Processes that meet a fault at one point of their writing, and disks that are too small."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

HERE = Path(__file__).parent


ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",  # under a limit on the size of files Python would leave cut-off bytecode behind
}


def run_python(*arguments: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT | (environment or {}), timeout=300, cwd=ROOT
    )


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"may not mount: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def folder(locks: Path, name: str) -> None:
    (locks / name).mkdir()
