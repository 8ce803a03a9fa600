"""Starting a measuring process, and what became of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sdrt import errors
from sdrt.bench.measure import Request
from sdrt.errors import MachineError, ResourceError, printable

_COMMAND = "from sdrt.bench.measure import serve; serve()"
_STDERR_BYTES = 1 << 14
_LATER = {"prompts": "--prompts"}
"""Fields that the first version with benchmarks does not know and would ignore, and their options."""


def in_fresh_process(request: Request) -> dict[str, Any]:
    """Measure in a process of its own.

    Raises:
        SdrtError: what the process raised.
        ResourceError: it was killed by the system.
        MachineError: it died otherwise, or is of a version that does not know all that was asked.
    """
    answer = child_answer(_COMMAND, asdict(replace(request, spawned_ns=time.monotonic_ns())), request.python, request.bundle)
    ignored = [option for name, option in _LATER.items() if getattr(request, name) and name not in answer.get("understood", ())]
    if ignored:
        raise MachineError(
            f"--old-python {request.python}: the sdrt there does not know {', '.join(ignored)} and measured without it",
            f"Leave {' and '.join(ignored)} out, or install a newer sdrt there.",
        )
    return answer


def child_answer(command: str, asked: Mapping[str, Any], python: str | None, what: str) -> dict[str, Any]:
    """Run Python code in a fresh process that reads `asked` from the file in `sys.argv[1]` and answers into the other. `what` names it in errors.

    Raises:
        SdrtError, ResourceError, MachineError: as `in_fresh_process`.
    """
    variables = dict(os.environ)
    if python is None:  # where we found our modules; another interpreter has its own
        variables["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as noise:
        request, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps(asked), encoding="utf-8")
        with subprocess.Popen(
            [python or sys.executable, "-P", "-c", command, str(request), str(answered)], env=variables, stdin=subprocess.DEVNULL, stdout=noise, stderr=noise
        ) as child:
            try:
                code = child.wait()
            except BaseException:
                child.kill()
                raise
        if code:
            noise.seek(max(0, noise.seek(0, os.SEEK_END) - _STDERR_BYTES))
            lines = [line for line in noise.read().decode(errors="replace").splitlines() if line.strip()]
            raise _death(what, code, lines)
        try:
            answer: dict[str, Any] = json.loads(answered.read_bytes())
        except (OSError, ValueError) as error:
            raise MachineError(f"{what}: the measuring process ended without an answer", f"Is {python or sys.executable} a Python with sdrt in it?") from error
    if "error" in answer:
        told = answer["error"]
        raise getattr(errors, told["kind"], MachineError)(told["message"], told["fix"])
    return answer


def _death(what: str, code: int, lines: Sequence[str]) -> errors.SdrtError:
    if code == -getattr(signal, "SIGKILL", 9):
        return ResourceError(f"{what}: the measuring process was killed by the system, most likely out of memory", "Lower --size or --batch, or free memory.")
    how = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
    said = f": {printable(lines[-1])[:300]}" if lines else ""
    return MachineError(f"{what}: the measuring process {how}{said}", "Run: sdrt verify BUNDLE, then sdrt generate BUNDLE with the same settings.")
