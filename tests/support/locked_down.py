"""Python in a process of its own, without the packages of a build and without sockets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

BUILD_ONLY = (
    "torch",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "diffusers",
    "peft",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnx_ir",
)


# Refuses the packages of a build, and every use of a socket.
LOCKED_DOWN = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BUILD_ONLY!r}:
            raise ImportError(name + " is not for the runtime")
sys.meta_path.insert(0, Refuse())
def audit(event, arguments):
    if event.startswith("socket."):
        raise AssertionError(event)
sys.addaudithook(audit)
"""


def run_python(script: str, *arguments: str, cwd: Path = ROOT) -> str:
    """Run a script in a fresh interpreter that treats warnings as errors, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {
        "PYTHONPATH": str(ROOT)
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
