"""The engines of one command appear together or not at all, and what `auto` takes can make an ordinary picture."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from write_faults import Fault

from sdrt.bundle.folder import open_bundle
from sdrt.bundle.graphs import GRAPHS
from sdrt.bundle.manifest import ENGINES
from sdrt.cli.app import app
from sdrt.compile import openvino, worker
from sdrt.compile.options import GraphReport
from sdrt.engines.store import list_engines
from sdrt.errors import ResourceError
from sdrt.files import publish
from sdrt.runtime.backend import load_engine


@pytest.fixture
def copied(small_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_bundle, tmp_path / "x.sdrt"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blobs of a few bytes: what is compiled does not matter here."""
    blob = openvino._Blob(b"blob", GraphReport(0.0, 0.0, 1, 4, (), None))
    monkeypatch.setattr(openvino, "_compile", lambda *_: blob)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def targets(bundle: Path) -> list[str]:
    return sorted(record.key.target for _, record in list_engines(open_bundle(bundle)))


def fail_at(number: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    calls: list[None] = []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == number:
            raise error
        return function(*arguments, **options)

    return failing


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("error", "code"), [(ResourceError("no room"), 6), (KeyboardInterrupt(), 130)])
def test_a_command_that_fails_at_its_second_engine(
    copied: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(openvino, "write_engine", fail_at(2, openvino.write_engine, error))
        assert run("compile", copied, "--target", "openvino").exit_code == code
    assert targets(copied) == [] and list((copied / ENGINES).iterdir()) == []
    assert run("compile", copied, "--target", "openvino").exit_code == 0
    assert targets(copied) == ["openvino"] * 4


@pytest.mark.usefixtures("quick")
def test_a_command_that_fails_at_its_second_target(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        worker,
        "save_model",
        fail_at(len(GRAPHS), lambda *_: ({"build_s": 0.0, "exact": True}, None), ResourceError("no room")),
    )
    monkeypatch.setattr("sdrt.compile.onnxruntime._plan", lambda model: openvino.Plan(model.name, 0, "0" * 64, None))
    assert run("compile", copied, "--target", "openvino", "--target", "onnxruntime").exit_code == 6
    assert targets(copied) == []


def replace_two(folder: Path) -> None:
    with publish.staged_folders(replace=True) as staged:
        for name in ("a", "b"):
            with staged(folder / name) as stage:
                publish.write_file(stage / "is", b"new")


@pytest.mark.parametrize("existing", [("a", "b"), ("a",), ("b",), ()])
@pytest.mark.parametrize("exchanges", [True, False])
def test_d1_two_folders_at_every_point_of_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: tuple[str, ...], exchanges: bool
) -> None:
    if not exchanges:
        real = publish._renameat2
        monkeypatch.setattr(publish, "_renameat2", lambda old, new, flags: 38 if flags == 2 else real(old, new, flags))
    before = {name: "old" if name in existing else None for name in ("a", "b")}
    number = failed = 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        for name in existing:
            (folder / name).mkdir(parents=True)
            (folder / name / "is").write_text("old")
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(publish, "at_point", (fault := Fault(number, "enospc")).point)
        error = None
        try:
            replace_two(folder)
        except ResourceError as caught:
            error = caught
        monkeypatch.setattr(publish, "at_point", None)
        found = {name: (folder / name / "is").read_text() if (folder / name).exists() else None for name in ("a", "b")}
        assert found in (before, {"a": "new", "b": "new"}), (number, found)
        left = {path.name for path in folder.iterdir()} - {name for name, what in found.items() if what}
        assert not left or fault.passed[number - 1][0] == "remove"  # which a later sweep does
        failed += error is not None and found == before
        if len(fault.passed) < number:
            break
    assert failed >= 6


def test_auto_takes_what_serves_an_ordinary_request(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half of an earlier command, another size or another prompt is passed over with a word; the rest of them then
    does.
    """
    for options in (
        ["--branches", "1"],
        ["--size", "64x128", "--branches", "2"],
        ["--tokens", "154", "--branches", "2"],
    ):
        assert run("compile", copied, "--target", "openvino", *options).exit_code == 0
    with caplog.at_level(logging.WARNING, logger="sdrt"):
        assert load_engine(open_bundle(copied), "auto").backend == "onnxruntime"
    assert "none for its own size 64x64 with guidance" in caplog.text
    caplog.clear()
    assert run("compile", copied, "--target", "openvino", "--branches", "2", "--batch", "2").exit_code == 0
    with caplog.at_level(logging.WARNING, logger="sdrt"):
        assert load_engine(open_bundle(copied), "auto").backend == "openvino"
    assert not caplog.text
