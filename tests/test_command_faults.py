"""Whole commands on failing machines: `sdrt build` and `sdrt compile` killed and failed at points of the writer, on disks that are too small, and two at once.

The points are a seeded sample; `benchmarks/faults.py` takes all of them.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from faulty_jobs import names, state
from test_faults import ENVIRONMENT, HERE, run_python, small_disk
from typer.testing import CliRunner

from sdrt.bundle.folder import open_bundle
from sdrt.bundle.manifest import WEIGHTS
from sdrt.cli import app
from sdrt.compile.watch import WAITING
from sdrt.errors import InputFileError, LockedError, ResourceError
from sdrt.export import build as build_module
from sdrt.export.build import BuildOptions, build
from sdrt.export.tensor_entry import TensorEntry
from sdrt.lock import locked

SAMPLES = {
    "build": ("kill=4", "enospc=2", "eio=1", "short=1"),
    "first build": ("kill=3", "enospc=3", "eio=2", "short=1"),
    "compile": ("kill=4", "enospc=2", "eio=1", "short=1"),
    "save": ("kill=3", "enospc=2", "eio=1", "short=1"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("job", SAMPLES)
def test_d1_i1_whole_commands(tmp_path: Path, small_checkpoint: Path, small_bundle: Path, job: str) -> None:
    """The old one or the new one, whole; after a kill the next run makes what an uninterrupted one makes; otherwise exit code 6 and nothing left."""
    if job == "compile":
        pytest.importorskip("openvino")
    done = run_python(HERE / "faulty_commands.py", tmp_path, job, small_checkpoint, *SAMPLES[job])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["points"] > (5 if job == "save" else 15 if job == "compile" else 60)
    assert report["done"] == {kind: int(count) for kind, count in (sample.split("=") for sample in SAMPLES[job])}
    assert not report["problems"], "\n".join(report["problems"])


def stub(folder: Path) -> None:
    """What --force takes for a bundle of ours."""
    folder.mkdir()
    (folder / "manifest.json").write_text('{"format": 1, "sdrt": "0", "graphs": {}, "files": {}}')


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.getuid() != 0, reason="only root may mount; the limit on file size stands in")
@pytest.mark.parametrize("checked", [True, False], ids=["as it is", "filled by somebody after the check"])
def test_d1_a_build_on_disks_of_every_size(tmp_path: Path, small_checkpoint: Path, small_bundle: Path, monkeypatch: pytest.MonkeyPatch, checked: bool) -> None:
    if not checked:
        monkeypatch.setattr(build_module, "check_space", lambda *_: None)
    needed = sum(path.stat().st_size for path in small_bundle.rglob("*"))
    sizes = [64 << 10, 1 << 20, 12 << 20, 32 << 20, 45 << 20, 60 << 20] if checked else [16 << 10, *range(needed // 9, needed + (2 << 20), needed // 9)]
    outcomes = []
    for size_bytes in sizes:
        (disk := tmp_path / str(size_bytes)).mkdir()
        with small_disk(disk, size_bytes):
            stub(disk / "small.sdrt")
            before = state(disk / "small.sdrt")
            try:
                build(BuildOptions(small_checkpoint, output=disk / "small.sdrt", force=True))
                assert state(disk / "small.sdrt") == state(small_bundle)
                outcomes.append(True)
            except ResourceError as error:
                assert str(disk) in error.message and error.exit_code == 6 and error.fix
                assert " free there" in error.message and ("needs about" if checked else "No space left on device") in error.message
                assert state(disk / "small.sdrt") == before
                outcomes.append(False)
            assert names(disk) == ["small.sdrt"]
    assert outcomes == sorted(outcomes) and {*outcomes} == {True, False}  # too small, then large enough


LIMITED = """
import resource, sys
from sdrt.export import build as module
limit, write_weights = int(sys.argv.pop(1)), module.write_weights
def limited(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return write_weights(*arguments)
module.write_weights = limited
from sdrt.cli import app
app()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_d1_a_limit_on_the_size_of_files(tmp_path: Path, small_checkpoint: Path, small_bundle: Path) -> None:
    stub(tmp_path / "x.sdrt")
    before = state(tmp_path / "x.sdrt")
    done = run_python(
        "-c", LIMITED, "1000000", "build", "--checkpoint", small_checkpoint, "--target", "onnxruntime", "--force", "--output", tmp_path / "x.sdrt"
    )
    assert done.returncode == 6, done.stderr
    size_bytes = (small_bundle / WEIGHTS).stat().st_size
    assert (
        f"File too large: weights.safetensors needs {size_bytes:,} bytes" in done.stderr
        and "bytes free there" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert state(tmp_path / "x.sdrt") == before and names(tmp_path) == ["x.sdrt"]


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.getuid() != 0, reason="only root may mount")
def test_d2_a_full_folder_for_temporary_files(tmp_path: Path, small_checkpoint: Path, small_bundle: Path) -> None:
    """A build does without it."""
    (disk := tmp_path / "tmp").mkdir()
    with small_disk(disk, 4096):
        arguments = ["build", "--checkpoint", small_checkpoint, "--target", "onnxruntime", "--output", tmp_path / "small.sdrt"]
        done = run_python("-c", "from sdrt.cli import app; app()", *arguments, environment={"TMPDIR": str(disk)})
        assert done.returncode == 0, done.stderr
    assert state(tmp_path / "small.sdrt") == state(small_bundle)


@pytest.mark.parametrize("command", ["build", "generate"])
def test_d3_no_more_threads(tmp_path: Path, small_checkpoint: Path, small_bundle: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Root is not held to a limit on processes, so Python's answer to one is given here in its place."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    arguments = {
        "build": ["build", "--checkpoint", small_checkpoint, "--target", "onnxruntime", "--output", tmp_path / "out.sdrt"],
        "generate": ["generate", small_bundle, "x", "--size", "64x64", "--steps", "1", "--output", tmp_path / "out.png"],
    }[command]
    monkeypatch.setattr(threading.Thread, "start", refuse)
    answer = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert answer.exit_code == 6 and ("threads" in answer.stderr or "out of memory" in answer.stderr), answer.stderr
    assert names(tmp_path) == []


def test_d4_an_engine_that_is_out_of_memory_and_says_so_at_the_end_of_a_long_text() -> None:
    import onnxruntime

    from sdrt.runtime.onnxruntime_model import explained as of_onnxruntime
    from sdrt.runtime.openvino_model import explained

    text = f"{'x' * 500} Failed to allocate memory for requested buffer of size 1 {'x' * 500}"
    assert isinstance(of_onnxruntime(onnxruntime, "step", RuntimeError(text)), ResourceError)
    assert isinstance(explained(None, "step", RuntimeError(text)), ResourceError)


def test_d1_a_disk_that_fails_under_an_input(tmp_path: Path, small_checkpoint: Path, small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input is to blame, not the output that is being written."""
    from sdrt.export.tensor_file import TensorFile

    read = TensorFile.read_bytes

    class Failing:
        def seek(self, position: int) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def close(self) -> None:
            pass

    def read_bytes(self: TensorFile, entry: TensorEntry) -> bytearray:
        if self.path == small_checkpoint:
            self._stream.close()
            monkeypatch.setattr(self, "_stream", Failing())
        return read(self, entry)

    monkeypatch.setattr(TensorFile, "read_bytes", read_bytes)
    with pytest.raises(InputFileError, match=r"small\.safetensors: cannot be read: Input/output error"):
        build(BuildOptions(small_checkpoint, output=tmp_path / "x.sdrt"))
    assert names(tmp_path) == []


# Two at once


def compile_arguments(bundle: Path) -> list[object]:
    return ["compile", bundle, "--target", "openvino", "--tokens", "77", "--branches", "2", "--precision", "fp32", "--json"]


@pytest.fixture
def copied(small_bundle: Path, tmp_path: Path) -> Path:
    import shutil

    pytest.importorskip("openvino")
    return Path(shutil.copytree(small_bundle, tmp_path / "x.sdrt"))


def test_i6_two_compilations_of_one_engine(copied: Path) -> None:
    """One compiles; the other waits for it, or comes after it, and finds the engine."""
    command = [sys.executable, "-c", "from sdrt.cli import app; app()", *map(str, compile_arguments(copied))]
    running = [subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    (first,), (second,) = (json.loads(out)["engines"] for out, _ in said)
    assert sorted([first["cached"], second["cached"]]) == [False, True]
    assert first["path"] == second["path"] and names(copied / "engines") == [Path(first["path"]).name]


def test_i7_an_engine_that_another_process_compiles(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdrt.compile.openvino import compile_bundle
    from sdrt.compile.report import CompileOptions

    options = CompileOptions("openvino", tokens=(77, 77), branches=(2,), precision="fp32")
    (report,) = compile_bundle(open_bundle(copied), options)
    monkeypatch.setenv("SDRT_LOCK_TIMEOUT", "0.2")
    stages = []
    with locked(report.path.parent), pytest.raises(LockedError, match=f"process {os.getpid()} is writing it") as caught:
        compile_bundle(open_bundle(copied), options, lambda stage, done: stages.append(stage))
    assert caught.value.exit_code == 7 and WAITING in stages
    (report,) = compile_bundle(open_bundle(copied), options)
    assert report.cached


def test_i1_what_a_killed_compilation_left_is_swept_by_one_that_finds_its_engine(copied: Path) -> None:
    from sdrt.compile.openvino import compile_bundle
    from sdrt.compile.report import CompileOptions

    options = CompileOptions("openvino", tokens=(77, 77), branches=(2,), precision="fp32")
    (report,) = compile_bundle(open_bundle(copied), options)
    (stage := report.path.with_name(f".{report.path.name}-4194999-0123abcd")).mkdir()
    (report,) = compile_bundle(open_bundle(copied), options)
    assert report.cached and not stage.exists()
