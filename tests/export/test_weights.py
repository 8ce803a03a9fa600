"""The weights file: the same bytes however its tensors come to be made, few of them in memory, and threads that end."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from sdrt.errors import CheckpointError
from sdrt.export import weights as weights_module
from sdrt.export.read.checkpoint import Tensor
from sdrt.export.read.tensor_file import open_tensor_file
from sdrt.export.weights import Made, Written, write_weights

COUNT = 40


@pytest.fixture
def tensors(tmp_path: Path) -> Iterator[dict[str, Tensor]]:
    """As many as `COUNT`, of 40 KB in float16 each, and their names in the order in which they are written."""
    random = torch.Generator().manual_seed(0)
    stored = {f"t{i:02}": torch.randn(20_480, generator=random).half() for i in range(COUNT)}
    save_file(stored, tmp_path / "x.safetensors")
    with open_tensor_file(tmp_path / "x.safetensors") as file:
        yield {name: Tensor(file, entry) for name, entry in sorted(file.entries.items())}


def write(
    path: Path, tensors: dict[str, Tensor], progress: Callable[[float], None] = lambda done: None, **made: Made
) -> Written:
    return write_weights(path, tensors, [], "fp16", progress, made)


def on_read(monkeypatch: pytest.MonkeyPatch, act: Callable[[str, np.ndarray], None]) -> None:
    """Call `act` with each tensor's name and values when it was read, in the thread that reads."""
    original = Tensor.read

    def read(tensor: Tensor) -> np.ndarray:
        values = original(tensor)
        act(tensor.entry.name, values)
        return values

    monkeypatch.setattr(Tensor, "read", read)


def test_the_order_in_which_tensors_are_made_does_not_show(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write(tmp_path / "a", tensors)
    random = np.random.RandomState(0)
    waits = dict(zip(tensors, random.permutation(COUNT) / 4_000, strict=True))
    finished: list[str] = []

    def act(name: str, values: np.ndarray) -> None:
        time.sleep(waits[name])
        finished.append(name)

    on_read(monkeypatch, act)
    assert write(tmp_path / "b", tensors) == expected
    assert finished != sorted(finished) and set(finished) == set(tensors)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert expected.record.sha256 == hashlib.sha256((tmp_path / "b").read_bytes()).hexdigest()


def test_the_next_tensors_are_made_while_one_is_written(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """The third is read before the first is reported as written, though that is waited for."""
    third = threading.Event()
    names = list(tensors)

    def make(name: str) -> Made:
        def made(fused: Callable[[str], np.ndarray]) -> np.ndarray:
            if name == names[2]:
                third.set()
            return np.zeros(1, np.float32)

        return Made((1,), tmp_path, made)

    write(
        tmp_path / "w", {}, lambda done: third.wait(60) or pytest.fail("not made ahead"), **{n: make(n) for n in names}
    )


@pytest.mark.parametrize("ahead_bytes", [1, 200_000])
def test_few_tensors_are_in_memory(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, ahead_bytes: int
) -> None:
    """Those being made, those that wait within the limit, and the one that is written."""
    monkeypatch.setattr(weights_module, "_AHEAD_BYTES", ahead_bytes)
    lock, alive, most = threading.Lock(), 0, 0

    def count(change: int) -> None:
        nonlocal alive, most
        with lock:
            alive += change
            most = max(most, alive)

    def act(name: str, values: np.ndarray) -> None:
        count(1)
        weakref.finalize(values, count, -1)

    on_read(monkeypatch, act)
    write(tmp_path / "w", tensors, lambda done: time.sleep(0.002))
    assert alive == 0
    assert 2 < most <= 2 + 2 + ahead_bytes // 40_960


def test_the_first_tensor_that_fails_is_named_and_threads_end(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two bad ones is found first."""
    monkeypatch.setattr(weights_module, "_AHEAD_BYTES", 200_000)
    read: list[str] = []

    def act(name: str, values: np.ndarray) -> None:
        read.append(name)
        if name == "t04":
            time.sleep(0.2)
        if name in ("t04", "t05"):
            values[3] = np.inf

    on_read(monkeypatch, act)
    before = threading.active_count()
    with pytest.raises(CheckpointError, match="t04: 1 of 20480 values are NaN or infinite"):
        write(tmp_path / "w", tensors)
    assert threading.active_count() == before and len(read) < COUNT


def test_an_interrupted_write_ends_its_threads(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "_AHEAD_BYTES", 200_000)
    read: list[str] = []
    on_read(monkeypatch, lambda name, values: read.append(name))

    def interrupt(done: float) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "w", tensors, interrupt)
    assert threading.active_count() == before and len(read) < COUNT


def test_a_norm_keeps_the_digits_that_the_manifest_tells() -> None:
    """float32 alone would lose some in the largest weights."""
    for values in (np.full((5000, 3001), 0.1, np.float32), np.float32(3), np.zeros((0, 2), np.float32)):
        exact = math.sqrt(float(np.sum(np.square(np.asarray(values, np.float64)))))
        assert math.isclose(weights_module._norm(np.asarray(values)), exact, rel_tol=1e-6)


PRODUCTS = """
import hashlib
import numpy as np
from sdrt.export.adapters.formula import Delta, additive
from sdrt.export.adapters.spelling import DOWN, MID, UP
random, digest = np.random.RandomState(0), hashlib.sha256()
for rank, shape in ((32, (1280, 1280)), (128, (640, 5120)), (7, (1283, 1277)), (32, (640, 320, 3, 3))):
    parts = {UP: (shape[0], rank), DOWN: (rank, *shape[1:])}
    if len(shape) == 4:
        parts = {UP: (shape[0], rank, 1, 1), DOWN: (rank, shape[1], 1, 1), MID: (rank, rank, 3, 3)}
    values = {part: random.standard_normal(size).astype(np.float32) for part, size in parts.items()}
    digest.update(additive(Delta({part: part for part in parts}, shape), values.__getitem__))
print(digest.hexdigest())
"""


def test_the_number_of_cores_does_not_show() -> None:
    """BLAS sums in another order where it divides a product among threads."""
    environments = [os.environ | {"OPENBLAS_NUM_THREADS": n, "PYTHONPATH": str(ROOT)} for n in ("1", "2", "3")]
    run = partial(subprocess.run, [sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True)
    assert len({run(env=environment).stdout for environment in environments}) == 1
