"""Nothing reports to anybody: sockets are refused below Python, in the process itself, and the home and temporary
folders are looked at afterwards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from sdrt.machine import engine_libraries
from sdrt.machine.doctor import _IDENTITY

CI = ("CI", "TF_BUILD", "GITHUB_", "GITLAB_", "CIRCLECI", "TRAVIS", "JENKINS_", "CODEBUILD_", "BUILDKITE", "TEAMCITY_")
"""How variables begin by which ONNX Runtime knows a CI's machine. It reports nothing there."""
COMPILER = shutil.which("gcc") or shutil.which("cc")


class Watched:
    """Runs processes with an empty home and temporary folder, and sees what they reach for."""

    def __init__(self, shim: Path, folder: Path) -> None:
        self.shim, self.folder = shim, folder
        self.home, self.temporary, self._seen = folder / "home", folder / "tmp", folder / "seen"
        self.home.mkdir()
        self.temporary.mkdir()

    def run(self, *command: str) -> str:
        dropped = ("PYTEST", "XDG_", "ORT_", *CI)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        environment |= {
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "LD_PRELOAD": str(self.shim),
            "SOCKETS_SEEN": str(self._seen),
        }
        environment |= {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=self.folder, env=environment, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def seen(self) -> str:
        return self._seen.read_text() if self._seen.exists() else ""

    def left(self) -> list[str]:
        return sorted(
            path.relative_to(self.folder).as_posix()
            for place in (self.home, self.temporary)
            for path in place.rglob("*")
        )


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or COMPILER is None:
        pytest.skip("sockets are watched by a library that is preloaded: needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("shim") / "sockets_seen.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, ROOT / "tests" / "sockets_seen.c"], check=True)
    return library


@pytest.fixture
def watched(shim: Path, tmp_path: Path) -> Watched:
    return Watched(shim, tmp_path)


def test_b13_no_command_opens_a_socket_or_leaves_a_file(watched: Watched, small_checkpoint: Path) -> None:
    bundle = str(watched.folder / "small.sdrt")
    for command in (
        ["build", "--checkpoint", str(small_checkpoint), "--target", "openvino", "--output", bundle],
        ["compile", bundle, "--target", "onnxruntime"],
        ["generate", bundle, "apple", "--steps", "1", "--backend", "openvino", "--output", "a.png"],
        ["generate", bundle, "apple", "--steps", "1", "--backend", "onnxruntime", "--output", "b.png"],
        ["verify", bundle],
        ["doctor"],
        ["bench", "run", bundle, "--processes", "1", "--pictures", "1", "--steps", "1", "--warm-up", "0.1"],
    ):
        watched.run("-m", "sdrt", *command)
        assert watched.seen == "" and watched.left() == [], command


def test_it_would_be_seen(watched: Watched) -> None:
    """The two libraries as they are by themselves; and Python's own sockets."""
    watched.run(
        "-c", f"import onnxruntime; onnxruntime.InferenceSession({_IDENTITY!r}, providers=['CPUExecutionProvider'])"
    )
    onnxruntime = watched.left()
    watched.run("-c", "import openvino")
    openvino = watched.left()
    watched.run("-c", "import socket\ntry: socket.socket()\nexcept PermissionError: pass")
    assert "home/.cache" in onnxruntime and "home/intel" in openvino
    assert "getaddrinfo www.google-analytics.com" in watched.seen and "socket" in watched.seen.split()


def test_the_package_that_reports_stays_importable() -> None:
    before = sys.modules.get("openvino_telemetry")
    engine_libraries.openvino()
    assert sys.modules.get("openvino_telemetry") is before
    assert "openvino_telemetry" not in sys.modules or sys.modules["openvino_telemetry"] is not None
