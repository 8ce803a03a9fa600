"""Fixtures of the commands: a bundle whose engine is loaded once, and an empty working folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdrt.compile import compilers
from sdrt.runtime import Pipeline


@pytest.fixture(autouse=True)
def nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--target auto` is ONNX Runtime here, whatever is installed; compiling has tests of its own."""
    monkeypatch.setattr(compilers, "_automatic", lambda: "onnxruntime")


@pytest.fixture(scope="module")
def loaded(small_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(small_bundle, threads=1) as pipe:
        yield pipe


@pytest.fixture
def shared(loaded: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small bundle, whose engine is loaded once for many commands."""

    def load(path: Path, **_: object) -> Pipeline:
        assert path == loaded.bundle.path
        return Pipeline(loaded.bundle, loaded._engine, loaded._conditioner._tokenizer)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "load", load)
    return loaded.bundle.path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"
