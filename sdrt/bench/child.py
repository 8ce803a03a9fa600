"""Starts a measuring process and reports how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sdrt import errors
from sdrt.bench.measure import Request
from sdrt.errors import MachineError, ResourceError, printable

_COMMAND = "from sdrt.bench.measure import serve; serve()"
_STDERR_BYTES = 1 << 14
_LATER = {"prompts": "--prompts"}
"""Fields that the first version with benchmarks does not know and would ignore, with their options."""


def in_fresh_process(request: Request) -> dict[str, Any]:
    """Measure in a process of its own.

    Raises:
        SdrtError: the error that the process raised.
        ResourceError: the system killed the process.
        MachineError: the process died in another way, or its version of sdrt does not know everything that was asked.
    """
    with measuring(request, _COMMAND) as child:
        return understood(request, child.answer())


def measuring(request: Request, command: str, *, talks: bool = False) -> Child:
    """Start a process that measures."""
    return Child(
        command, asdict(replace(request, spawned_ns=time.monotonic_ns())), request.python, request.bundle, talks=talks
    )


def understood(request: Request, answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, if the sdrt of that process knew everything that was asked.

    Raises:
        MachineError: it did not.
    """
    ignored = [
        option for name, option in _LATER.items() if getattr(request, name) and name not in answer.get("understood", ())
    ]
    if ignored:
        raise MachineError(
            f"--old-python {request.python}: the sdrt there does not know {', '.join(ignored)} and measured without it",
            f"Leave {' and '.join(ignored)} out, or install a newer sdrt there.",
        )
    return answer


class Child:
    """Python code in a fresh process. It reads `asked` from the file in `sys.argv[1]` and writes its answer to the file
    in `sys.argv[2]`. `what` names the process in errors.

    A process that `talks` reads words from its standard input and writes words to its standard output, one per line.
    Leaving the block ends the process.
    """

    def __init__(
        self, command: str, asked: Mapping[str, Any], python: str | None, what: str, *, talks: bool = False
    ) -> None:
        self._what, self._python = what, python or sys.executable
        variables = dict(os.environ)
        if python is None:  # the modules of this process; another interpreter has its own
            variables["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
        stack = ExitStack()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self._noise = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (closed with the stack)
        self._kept = stack
        request, self._answered = folder / "request.json", folder / "answer.json"
        request.write_text(json.dumps(asked), encoding="utf-8")
        self._process = subprocess.Popen(
            [self._python, "-P", "-c", command, str(request), str(self._answered)],
            env=variables,
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE if talks else self._noise,
            stderr=self._noise,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self._kept.close()

    def say(self, word: str) -> None:
        """Send the process a word. If the process has ended, `hear` reports it."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(word.encode() + b"\n")
            self._process.stdin.flush()

    def hear(self) -> str:
        """The process's next word.

        Raises:
            SdrtError: the process raised an error or died.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode(errors="replace")
        if not line:
            self.answer()
            raise MachineError(f"{self._what}: the measuring process ended too early", "Run: sdrt verify BUNDLE")
        return line.strip()

    def answer(self) -> dict[str, Any]:
        """Wait for the end of the process, and read its answer.

        Raises:
            SdrtError, ResourceError, MachineError: as `in_fresh_process`.
        """
        code = self._process.wait()
        if code:
            self._noise.seek(max(0, self._noise.seek(0, os.SEEK_END) - _STDERR_BYTES))
            lines = [line for line in self._noise.read().decode(errors="replace").splitlines() if line.strip()]
            raise _death(self._what, code, lines)
        try:
            answer: dict[str, Any] = json.loads(self._answered.read_bytes())
        except (OSError, ValueError) as error:
            raise MachineError(
                f"{self._what}: the measuring process ended without an answer",
                f"Is {self._python} a Python with sdrt in it?",
            ) from error
        if "error" in answer:
            told = answer["error"]
            raise getattr(errors, told["kind"], MachineError)(told["message"], told["fix"])
        return answer


def _death(what: str, code: int, lines: Sequence[str]) -> errors.SdrtError:
    if code == -getattr(signal, "SIGKILL", 9):
        return ResourceError(
            f"{what}: the measuring process was killed by the system, most likely out of memory",
            "Lower --size or --batch, or free memory.",
        )
    how = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
    said = f": {printable(lines[-1])[:300]}" if lines else ""
    return MachineError(
        f"{what}: the measuring process {how}{said}",
        "Run: sdrt verify BUNDLE, then sdrt generate BUNDLE with the same settings.",
    )
