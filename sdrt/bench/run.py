"""Running a benchmark: fresh processes one after the other for one bundle, or interleaved for two."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdrt import __version__, errors
from sdrt.bench.compare import Comparison, compare
from sdrt.bench.environment import environment, git_revision, load
from sdrt.bench.measure import Request
from sdrt.bench.metrics import Gates
from sdrt.bench.result import Document, assemble
from sdrt.bundle import WEIGHTS, Bundle
from sdrt.errors import MachineError, ResourceError, printable

Measure = Callable[[Request], Mapping[str, Any]]
"""Measures one bundle in one process and returns what the process answered."""
Progress = Callable[[str], None]
_MORE_PAIRS = 9
"""At most this many times the pairs asked for are added to settle an ambiguous metric."""
_COMMAND = "from sdrt.bench.measure import serve; serve()"
_STDERR_BYTES = 1 << 14


def in_fresh_process(request: Request) -> dict[str, Any]:
    """Measure in a process of its own.

    Raises:
        SdrtError: what the process raised.
        ResourceError: it was killed by the system.
        MachineError: it died otherwise.
    """
    variables = dict(os.environ)
    if request.python is None:  # where we found our modules; another interpreter has its own
        variables["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as noise:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(asdict(replace(request, spawned_ns=time.monotonic_ns()))), encoding="utf-8")
        command = [request.python or sys.executable, "-P", "-c", _COMMAND, str(asked), str(answered)]
        with subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stdout=noise, stderr=noise) as child:
            try:
                code = child.wait()
            except BaseException:
                child.kill()
                raise
        if code:
            noise.seek(max(0, noise.seek(0, os.SEEK_END) - _STDERR_BYTES))
            lines = [line for line in noise.read().decode(errors="replace").splitlines() if line.strip()]
            raise _death(request.bundle, code, lines)
        answer: dict[str, Any] = json.loads(answered.read_bytes())
    if "error" in answer:
        error = answer["error"]
        raise getattr(errors, error["kind"], MachineError)(error["message"], error["fix"])
    return answer


def _death(bundle: str, code: int, lines: Sequence[str]) -> errors.SdrtError:
    if code == -getattr(signal, "SIGKILL", 9):
        return ResourceError(f"{bundle}: the measuring process was killed by the system, most likely out of memory", "Lower --size or --batch, or free memory.")
    how = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
    said = f": {printable(lines[-1])[:300]}" if lines else ""
    return MachineError(f"{bundle}: the measuring process {how}{said}", "Run: sdrt verify BUNDLE, then sdrt generate BUNDLE with the same settings.")


def run(bundle: Bundle, request: Request, processes: int, progress: Progress, measure: Measure = in_fresh_process) -> Document:
    """Measure a bundle in `processes` fresh processes, one after the other. Layers are profiled in the first.

    Raises:
        SdrtError: what a process raised.
    """
    before = load()
    answers = []
    for index in range(processes):
        progress(f"process {index + 1} of {processes}")
        answers.append(measure(replace(request, process=index, layers=request.layers and index == 0)))
    return document_of(bundle, request, answers, before)


def interleave(
    old: tuple[Bundle, Request], new: tuple[Bundle, Request], gates: Gates, progress: Progress, *, max_s: float, measure: Measure = in_fresh_process
) -> Comparison:
    """Measure two bundles in turn, A B B A, in fresh processes, and judge.

    Where that leaves a gated metric AMBIGUOUS, as many further pairs as it needs are made once, if they fit into `max_s` from the start;
    looking again and again until something shows would raise false alarms.
    """
    started, before = time.monotonic(), load()
    answers: tuple[list[Any], list[Any]] = ([], [])

    def make(pairs: int) -> None:
        for _ in range(pairs):
            pair = len(answers[0])
            for side in (0, 1) if pair % 2 == 0 else (1, 0):
                progress(f"pair {pair + 1}, {('old', 'new')[side]}")
                answers[side].append(measure(replace((old, new)[side][1], process=pair)))

    def judged() -> Comparison:
        base, changed = (document_of(*side, found, before) for side, found in zip((old, new), answers, strict=True))
        return compare(base, changed, gates, interleaved=True)

    make(1)
    judged()  # two that cannot be compared are told apart after one pair
    make(gates.pairs - 1)
    result = judged()
    needed = [row.needed for row in result.undecided]
    if needed and not result.failures and None not in needed:
        per_pair = (time.monotonic() - started) / len(answers[0])
        more = max(number for number in needed if number is not None) - len(answers[0])
        if 0 < more <= _MORE_PAIRS * gates.pairs and more * per_pair <= max_s - (time.monotonic() - started):
            make(more)
            result = judged()
    return result


def document_of(bundle: Bundle, request: Request, answers: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> Document:
    """The result document of what the processes answered."""
    manifest, parameters, engine = bundle.manifest, answers[0]["parameters"], answers[0]["engine"]
    settings = {
        name: getattr(request, name)
        for name in ("scenario", "steps", "cfg", "sampler", "schedule", "prompt", "negative", "seed", "batch", "threads", "pictures", "limit_s", "warm_up_s")
    }
    if request.scenario == "server":
        settings |= {name: getattr(request, name) for name in ("rate", "duration_s", "queue")}
    if request.prompts:
        settings |= {
            "prompt": request.prompts[0],
            "prompts": {"count": len(request.prompts), "sha256": hashlib.sha256("\n".join(request.prompts).encode()).hexdigest()},
        }
    config = settings | {"size": list(parameters["size"]), "sampler": parameters["sampler"], "schedule": parameters["schedule"], "processes": len(answers)}
    after = load()
    env = environment() | {
        "gpu": None if engine.get("device") == "cpu" else engine.get("device"),
        "load_before": before["load_1min"],
        "load_after": after["load_1min"],
    }
    env["steal_s"] = None if before["steal_s"] is None or after["steal_s"] is None else round(after["steal_s"] - before["steal_s"], 3)
    identity = {
        "id": uuid.uuid4().hex,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool": {"sdrt": __version__, "git": git_revision()},
        "bundle": {
            "name": manifest.name, "family": manifest.family, "precision": manifest.precision, "weights": manifest.files[WEIGHTS].sha256,
            "sha256": _digest(bundle), "lora": [source.name for source in manifest.sources if source.kind == "lora"],
        },
        "config": config,
        "env": env,
    }  # fmt: skip
    document = assemble(answers, identity, _busy(env))
    document["packages"] = answers[0].get("packages", [])
    if layers := next((answer["layers"] for answer in answers if answer.get("layers")), None):
        document["layers"] = layers
    return document


def _busy(env: Mapping[str, Any]) -> list[str]:
    cores = env["affinity"] or env["cores"] or 1
    found = []
    if env["load_before"] is not None and env["load_before"] > 0.5 * cores:
        found.append(f"the machine was busy before the run: load {env['load_before']:.1f} on {cores} cores; prefer `sdrt bench ab`, which interleaves")
    if env["steal_s"] and env["steal_s"] > 1:
        found.append(f"other guests of this machine took {env['steal_s']:.1f} s of processor time during the run")
    return found


def _digest(bundle: Bundle) -> str:
    """A hash of what every file of the bundle hashes to."""
    text = json.dumps({name: record.sha256 for name, record in bundle.manifest.files.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
