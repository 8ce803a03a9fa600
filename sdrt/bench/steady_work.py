"""The same small piece of work over and over, timed. It shows what a machine's noise does to a program that never
changes. One process of `--check-machine`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

_SIDE = 384
_VALUES = 400_000
_WARM_UP = 0.2
"""Share of the time after which samples count."""


def timed_work(seconds: float) -> list[float]:
    """Milliseconds of each piece of work: matrix products, an exponential and a copy, a few ms in all, on numpy's
    threads.
    """
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((_SIDE, _SIDE), np.float32) for _ in range(2))
    values = random.standard_normal(_VALUES, np.float32)
    product, powers, copied = np.empty_like(a), np.empty_like(values), np.empty_like(values)
    began, found = time.monotonic(), list[tuple[float, float]]()
    while not found or time.monotonic() - began < seconds:
        started = time.perf_counter_ns()
        for _ in range(4):
            np.matmul(a, b, out=product)
        np.exp(values, out=powers)
        np.copyto(copied, powers)
        found.append((time.monotonic() - began, (time.perf_counter_ns() - started) / 1e6))
    return [ms for at, ms in found if at >= _WARM_UP * seconds] or [found[-1][1]]


def serve() -> None:
    """Run as the process. `sys.argv` holds the paths of the request and of the answer."""
    asked = json.loads(Path(sys.argv[1]).read_bytes())
    Path(sys.argv[2]).write_text(json.dumps({"samples": timed_work(float(asked["seconds"]))}), encoding="utf-8")
