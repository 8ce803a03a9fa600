"""The memory a process says it took is its own, whatever the one that started it had."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

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
