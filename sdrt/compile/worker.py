"""A process for each graph that TensorRT compiles, or ONNX Runtime saves.

Native code that runs for minutes and takes gigabytes is better off alone: Ctrl-C ends it at once, its memory goes back
to the system, a crash or the kernel's out-of-memory killer ends the worker instead of the caller, and what it prints is
caught.

The worker reads one request, a line of JSON, from its standard input, and answers in lines of JSON on its standard
output; a plan follows its line as it is; ONNX Runtime writes its own files. It stops when its standard input ends, so
it never outlives its caller.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, BinaryIO

from sdrt import errors
from sdrt.compile.optimized_model import save_model as save_model_here
from sdrt.compile.tensorrt_network import Built, Compiler, Demand, build_error, build_graph, import_compiler, use_gpu
from sdrt.compile.watch import Progress
from sdrt.engines.record import Profile
from sdrt.errors import MachineError, ResourceError, SdrtError
from sdrt.machine.memory import peak_rss_bytes

_GRACE_S = 1.0
_SAVE = "save"
"""The task of a request that has ONNX Runtime save a model; without one TensorRT compiles."""
_STDERR_BYTES = 1 << 16
_SIGKILL = getattr(signal, "SIGKILL", 9)


@dataclass(frozen=True)
class Answer:
    """What a worker gave: its last line, the bytes after it, and the most memory it took, where the system says."""

    fields: dict[str, Any]
    data: bytes
    peak_bytes: int | None


def build(
    compiler: Compiler, graph: str, path: Path, profiles: Sequence[Profile], demand: Demand, progress: Progress
) -> tuple[Built, int | None]:
    """`build_graph` in a worker, and the most memory it took in bytes.

    Raises:
        MachineError, ResourceError: as `build_graph`; also when the worker crashes or is killed.
        KeyboardInterrupt: interrupted; the worker is gone.
    """
    request = {
        "target": compiler.target,
        "device": compiler.device,
        "gpu": compiler.gpu,
        "sms": compiler.sms,
        "graph": graph,
        "path": str(path.absolute()),
        "profiles": [profile.shapes for profile in profiles],
        "demand": asdict(demand),
    }
    where = f"{path}: {graph}: {compiler}"
    answer = _ask(request, lambda code, lines: _death(where, code, lines, demand), lambda done: progress(graph, done))
    fields = answer.fields
    return Built(
        memoryview(answer.data),
        fields["parse_s"],
        fields["build_s"],
        fields["layers"],
        tuple(fields["unfused"]),
        fields["device_memory_bytes"],
    ), answer.peak_bytes


def save_model(
    graph: str, path: Path, folder: Path, reference: Path, version: str
) -> tuple[dict[str, Any], int | None]:
    """`sdrt.compile.optimized_model.save_model` in a worker, and the most memory it took in bytes.

    Raises:
        MachineError, ResourceError: as there; also when the worker crashes or is killed.
        KeyboardInterrupt: interrupted; the worker is gone.
    """
    request = {
        "task": _SAVE,
        "graph": graph,
        "path": str(path.absolute()),
        "folder": str(folder.absolute()),
        "reference": str(reference.absolute()),
    }
    where = f"{path}: {graph}: ONNX Runtime {version}"

    def death(code: int, lines: list[str]) -> SdrtError:
        if code == -_SIGKILL:
            return ResourceError(
                f"{where}: killed by the system, most likely out of memory",
                "Free memory: this takes several times the weights of the graph.",
            )
        return MachineError(f"{where}: ended with exit code {code}: {' '.join(lines)[-300:]}", "Run: sdrt doctor")

    answer = _ask(request, death, lambda _: None)
    return answer.fields, answer.peak_bytes


def _ask(
    request: Mapping[str, Any], death: Callable[[int, list[str]], SdrtError], report: Callable[[float], None]
) -> Answer:
    """Have a worker answer a request. `death` says what it means that the worker ended without an answer."""
    modules = os.pathsep.join(map(os.path.abspath, sys.path))  # where we found ours
    command = [sys.executable, "-P", "-c", "from sdrt.compile.worker import serve; serve()"]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as noise,
        subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=noise, env=os.environ | {"PYTHONPATH": modules}
        ) as worker,
    ):
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(request).encode() + b"\n")
            worker.stdin.flush()
            answer = _listen(worker.stdout, report)
        except BrokenPipeError:
            answer = None  # it died at once; what it printed says why
        except BaseException:
            _end(worker)
            raise
        with suppress(BrokenPipeError):  # what it did not live to read
            worker.stdin.close()
        worker.wait()
        if answer is None:
            noise.seek(max(0, noise.seek(0, os.SEEK_END) - _STDERR_BYTES))
            lines = [line for line in noise.read().decode(errors="replace").splitlines() if line.strip()]
            raise death(worker.returncode, lines)
        if "error" in answer.fields:
            kind = getattr(errors, answer.fields["error"]["kind"], MachineError)
            raise kind(answer.fields["error"]["message"], answer.fields["error"]["fix"])
        return answer


def _listen(stream: Any, report: Any) -> Answer | None:
    """Follow a worker to its answer; None if it ends without one."""
    for line in stream:
        fields = json.loads(line)
        if "progress" in fields:
            report(fields["progress"])
            continue
        size = fields.pop("data_bytes", 0)
        data = stream.read(size)
        return Answer(fields, data, fields.pop("peak_bytes", None)) if len(data) == size else None
    return None


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Ask a worker to stop, and kill it if it is in the middle of something long."""
    assert worker.stdin is not None
    try:
        with suppress(OSError):
            worker.stdin.close()
        worker.wait(_GRACE_S)
    except BaseException:  # a second Ctrl-C too
        worker.kill()


def _death(where: str, code: int, lines: list[str], demand: Demand) -> SdrtError:
    """A worker that ended without an answer, as an error."""
    if code == -_SIGKILL:
        return ResourceError(
            f"{where}: killed by the system, most likely out of memory",
            f"What asks for most is {demand.words}: lower {demand.flag}, or free memory.",
        )
    return build_error(f"{where}: ended with exit code {code}", lines, demand)


def serve() -> None:
    """Be a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the caller, which ends us
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever native code prints must not mix with answers
    with os.fdopen(0, "rb", closefd=False) as requests:
        request = json.loads(requests.readline())
    stop = Event()

    def watch() -> None:
        os.read(0, 1)  # returns when the caller closes its end, or dies
        stop.set()
        if request.get("task") == _SAVE:  # ONNX Runtime does not look whether it should stop
            os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, daemon=True).start()
    try:
        fields, data = _answer(request, answers, stop)
    except SdrtError as error:
        fields, data = (
            {"error": {"kind": type(error).__name__, "message": error.line, "fix": error.fix}},
            memoryview(b""),
        )
    except (KeyboardInterrupt, BrokenPipeError):
        return
    _say(answers, fields | {"data_bytes": data.nbytes, "peak_bytes": peak_rss_bytes()})
    answers.write(data)
    answers.flush()


def _answer(request: dict[str, Any], answers: BinaryIO, stop: Event) -> tuple[dict[str, Any], memoryview]:
    if request.get("task") == _SAVE:
        return save_model_here(
            request["graph"], Path(request["path"]), Path(request["folder"]), Path(request["reference"])
        ), memoryview(b"")
    compiler = import_compiler(request["target"], request["device"], request["gpu"], tuple(request["sms"]))
    use_gpu(compiler)
    profiles = [
        Profile({name: (tuple(low), tuple(optimal), tuple(high)) for name, (low, optimal, high) in shapes.items()})
        for shapes in request["profiles"]
    ]
    built = build_graph(
        compiler,
        request["graph"],
        Path(request["path"]),
        profiles,
        Demand(**request["demand"]),
        lambda _, done: _say(answers, {"progress": done}),
        stop,
    )
    fields: dict[str, Any] = {
        "parse_s": built.parse_s,
        "build_s": built.build_s,
        "layers": built.layers,
        "unfused": built.unfused,
    }
    return fields | {"device_memory_bytes": built.device_memory_bytes}, built.plan


def _say(answers: BinaryIO, fields: dict[str, Any]) -> None:
    answers.write(json.dumps(fields).encode() + b"\n")
    answers.flush()
