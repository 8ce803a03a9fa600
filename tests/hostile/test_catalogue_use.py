"""A loaded pipeline in the hands of threads: cancelled anywhere, closed while it runs, used from loops, processes and
at exit; and a short soak.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from sdrt.errors import ClosedError
from sdrt.runtime import Pipeline

SETTINGS: dict[str, Any] = {"steps": 3, "cfg": 3.0, "seed": 5, "size": (64, 64)}


@pytest.fixture(scope="module")
def pipe(flat_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(flat_bundle, backend="onnxruntime", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expected(pipe: Pipeline) -> Any:
    return pipe("red apple", **SETTINGS).images


@pytest.mark.parametrize("steps", range(5))
def test_t4_cancel_anywhere(pipe: Pipeline, expected: Any, steps: int) -> None:
    """Before the start, after each step, after the end; twice."""
    stream = pipe.stream("red apple", **SETTINGS)
    for _, _ in zip(range(steps), stream, strict=False):
        pass
    stream.close()
    stream.close()
    assert not list(stream)
    assert np.array_equal(pipe("red apple", **SETTINGS).images, expected)


def test_t5_an_exception_between_steps(pipe: Pipeline, expected: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in pipe.stream("red apple", **SETTINGS):
            _ = 1 // 0
    assert np.array_equal(pipe("red apple", **SETTINGS).images, expected)


def test_t5_a_picture_within_a_picture(pipe: Pipeline, expected: Any) -> None:
    inner = []
    for step in pipe.stream("red apple", **SETTINGS):  # noqa: B007
        inner.append(pipe("red apple", **SETTINGS).images)
    assert step.result is not None
    assert all(np.array_equal(images, expected) for images in [step.result.images, *inner])


def test_t6_from_an_event_loop(pipe: Pipeline, expected: Any) -> None:
    async def several() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(pipe, "red apple", **SETTINGS) for _ in range(3)))

    assert all(np.array_equal(result.images, expected) for result in asyncio.run(several()))


def _draw(bundle: Path) -> bytes:
    with Pipeline.load(bundle, backend="onnxruntime", threads=1) as loaded:
        return loaded("red apple", **SETTINGS).images.tobytes()


def test_t6_in_a_spawned_process(flat_bundle: Path, pipe: Pipeline, expected: Any) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_draw, (flat_bundle,)) == expected.tobytes()


EXIT = """
import sys, threading
from sdrt.runtime import Pipeline
pipe = Pipeline.load(sys.argv[1], backend="onnxruntime", threads=1)
stream = pipe.stream("red apple", steps=50, size=(64, 64), seed=1)
next(stream)
if sys.argv[2] == "thread":
    started = threading.Event()
    def work():
        for step in pipe.stream("red apple", steps=20, size=(128, 128), seed=1):
            started.set()
    threading.Thread(target=work).start()  # not a daemon: Python waits for it
    started.wait()
print("leaving")
"""


@pytest.mark.parametrize("how", ["stream", "thread"])
def test_t6_exit_while_running(flat_bundle: Path, how: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {
        "PYTHONPATH": str(ROOT)
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXIT, flat_bundle, how],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.stdout == "leaving\n"
    assert done.returncode == 0, done.stderr


def test_t7_closed_while_it_runs(flat_bundle: Path, expected: Any) -> None:
    loaded = Pipeline.load(flat_bundle, backend="onnxruntime", threads=1)
    reached, closed, found = threading.Event(), threading.Event(), []

    def work() -> None:
        for step in loaded.stream("red apple", **SETTINGS):
            reached.set()
            closed.wait()
            if step.result is not None:
                found.append(step.result)

    thread = threading.Thread(target=work)
    thread.start()
    reached.wait()
    loaded.close()
    with pytest.raises(ClosedError, match="closed"):
        loaded("red apple", **SETTINGS)
    closed.set()
    thread.join()
    assert np.array_equal(found[0].images, expected)
    loaded.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_s1_s3_s4_a_short_soak(flat_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures only: memory needs the long form, `benchmarks/checks/soak.py`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "checks")
    import soak

    report = soak.soak(flat_bundle, 30, 4, 0)
    assert report.pictures >= 30 and report.wrong == ()
    assert report.cancelled + report.refused
    assert report.descriptors[0] == report.descriptors[1] and report.threads[0] == report.threads[1]


def test_the_slope_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "checks")
    import soak

    assert soak.slope([(i, 1000 + 50 * i) for i in range(100)]) == 50
    assert soak.slope([(i, 10**9 if i == 50 else 7) for i in range(100)]) == 0
    assert soak.slope([(3, 9)]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_s2_loading_again_and_again(flat_bundle: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    Pipeline.load(flat_bundle, backend="onnxruntime", threads=1).close()
    before, threads = descriptors(), threading.active_count()
    for _ in range(3):
        with Pipeline.load(flat_bundle, backend="onnxruntime", threads=1) as loaded:
            loaded("red apple", **SETTINGS)
    assert (descriptors(), threading.active_count()) == (before, threads)
