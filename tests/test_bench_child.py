"""The measuring process: what it may die of, what travels to it and back, and interpreters that are not ours."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sdrt.bench import child, measure
from sdrt.bench.child import in_fresh_process
from sdrt.bench.measure import Request
from sdrt.errors import BundleError, InputFileError, MachineError, ResourceError, UsageError


def test_a_child_that_dies_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for script, kind, text in (
        ("import os; os.kill(os.getpid(), 9)", ResourceError, "out of memory"),
        ("import os; os.abort()", MachineError, "signal 6"),
        ("import sys; print('first'); sys.exit('the last words')", MachineError, "exit code 1: the last words"),
        ("import os; os._exit(3)", MachineError, "exit code 3"),
        ("", MachineError, "ended without an answer"),
        ("import sys; open(sys.argv[2], 'w').write('{')", MachineError, "ended without an answer"),
    ):
        monkeypatch.setattr(child, "_COMMAND", script)
        with pytest.raises(kind, match=text) as caught:
            in_fresh_process(Request("toy.sdrt"))
        assert "toy.sdrt" in str(caught.value)


def test_errors_of_a_child_keep_their_kind(flat_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="no such bundle"):
        in_fresh_process(Request(str(tmp_path / "none.sdrt")))
    with pytest.raises(UsageError, match="sampler"):
        in_fresh_process(Request(str(flat_bundle), sampler="eulr", pictures=1, warm_up_s=0.1))


def test_a_changed_bundle_is_not_measured(flat_bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(flat_bundle, tmp_path / "changed.sdrt"))
    file = copy / "tokenizer" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b'"a"', b'"b"', 1))
    with pytest.raises(BundleError, match="changed since the build"):
        in_fresh_process(Request(str(copy)))


def test_requests_and_answers_travel_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version's fields are ignored; errors become part of the answer."""
    asked: list[Request] = []

    def fail(request: Request, turns: object) -> Any:
        asked.append(request)
        raise UsageError("steps 0: expected 1 to 1000", "Choose more.")

    monkeypatch.setattr(measure, "measure", fail)
    monkeypatch.setattr("sys.argv", ["-c", str(tmp_path / "request"), str(tmp_path / "answer")])
    (tmp_path / "request").write_text(json.dumps(asdict(Request("x", size=(64, 72), prompts=("sun", "cat"))) | {"of the future": 1}))
    measure.serve()
    assert asked == [Request("x", size=(64, 72), prompts=("sun", "cat"))]
    assert json.loads((tmp_path / "answer").read_text()) == {
        "error": {"kind": "UsageError", "message": "steps 0: expected 1 to 1000", "fix": "Choose more."}
    } | {"understood": sorted(asdict(Request("x")))}


def test_another_interpreter_finds_its_own_modules(tmp_path: Path) -> None:
    """`--old-python` starts what it is given, and does not show it our modules."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\nprintf \'{"path": "%s"}\' "$PYTHONPATH" > "$5"\n')
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", "theirs")
        assert in_fresh_process(Request("toy.sdrt", python=str(script))) == {"path": "theirs"}


def test_an_older_version_that_ignores_prompts_is_not_believed(tmp_path: Path) -> None:
    """It would have measured another prompt than the other side."""
    script = tmp_path / "python"
    for answered, fails in (("{}", True), ('{"understood": ["prompts"]}', False)):
        script.write_text(f"#!/bin/sh\necho '{answered}' > \"$5\"\n")
        script.chmod(0o755)
        request = Request("toy.sdrt", python=str(script), prompts=("sun", "cat"))
        if fails:
            with pytest.raises(MachineError, match="the sdrt there does not know --prompts and measured without it"):
                in_fresh_process(request)
            assert in_fresh_process(replace(request, prompts=())) == {}
        else:
            assert in_fresh_process(request) == {"understood": ["prompts"]}
