"""The memory a process says it took is its own, whatever the one that started it had."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdrt.machine import memory
from sdrt.machine.memory import peak_rss_bytes

ASK = "from sdrt.machine.memory import peak_rss_bytes; print(peak_rss_bytes())"
LARGE_BYTES = 400_000_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system counts the process's whole life")
def test_a_parents_memory_is_not_counted() -> None:
    held = np.ones(LARGE_BYTES, np.uint8)
    own = peak_rss_bytes()
    child = subprocess.run([sys.executable, "-c", ASK], check=True, capture_output=True, text=True)
    assert own is not None and own >= held.nbytes
    assert 5_000_000 < int(child.stdout) < LARGE_BYTES // 4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is mapped")
def test_pages_of_a_mapped_file_are_unloaded(tmp_path: Path) -> None:
    """They are no longer in the process's memory, and are still what the file holds. Changed pages are left alone."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (1 << 16))
    with path.open("rb") as stream:
        shared = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        changed = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    assert sum(shared[::4096]) == 0 and shared[255] == 255
    changed[0] = 7
    loaded = memory.rss_bytes()
    memory.unload_mapped(path)
    left = memory.rss_bytes()
    assert loaded is not None and left is not None and loaded - left > 12 << 20
    assert shared[255] == 255 and changed[0] == 7
